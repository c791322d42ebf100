"""Batched decoding under the original's rules: beam search, greedy search and nucleus sampling for any language model.

Legend: N sentences in the batch, K beams, V vocabulary, R rows of the model's cache now (alive sentences x beams).

The search follows the code the paper was run with (transformers 3.2, Li & Liang's fork), which differs from today's
`generate`: a hypothesis is scored by sum of log-probabilities / length**length_penalty where the length counts the
prompt and not the final eos, and a sentence stops once its worst kept hypothesis is at least as good as its best
candidate, eos included, would be at the current length. `length_normalization="output"` divides by the generated
length alone, as transformers does today.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from prefixlib.data.tasks import InGPT2, InSeq2Seq
from prefixlib.settings.search import Search


class StepwiseModel(Protocol):
    """A language model over N prompts with a cache, which each call extends by one token per row."""

    def prefill(self) -> Tensor:
        """Next-token logits (N, V) after the prompts; the cache then has one row per prompt."""

    def advance(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Continue the rows `rows` (R',), in that order, with `tokens` (R',); return next-token logits (R', V).

        `rows` is on the CPU. The rows of a sentence are adjacent, and all sentences have equally many.
        """


@dataclass(frozen=True)
class DecodingRule:
    """The settings of one decoding. Lengths are in tokens; `min_length` counts the prompt, as in the original."""

    eos_token_id: int
    max_new_tokens: int
    num_beams: int = 5
    length_penalty: float = 1.0
    length_normalization: str = "prompt+output"  # or "output"
    min_length: int = 0
    early_stopping: bool = False
    banned_token_ids: tuple[int, ...] = ()
    no_repeat_ngram_size: int = 0
    forced_first_token_id: int | None = None
    forced_last_token_id: int | None = None
    top_p: float = 1.0  # nucleus sampling only
    top_k: int = 0  # nucleus sampling only; 0: all tokens
    temperature: float = 1.0  # nucleus sampling only
    stop: Callable[[Sequence[int]], bool] | None = None  # whether generated tokens end an output as eos does

    def __post_init__(self):
        if self.length_normalization not in ("prompt+output", "output"):
            raise ValueError(f"length_normalization {self.length_normalization!r}: 'prompt+output' or 'output'")
        if self.num_beams < 1 or self.max_new_tokens < 1:
            raise ValueError("num_beams and max_new_tokens must be at least 1")


def rule_of(search: Search, usual: InGPT2 | InSeq2Seq, **more: Any) -> DecodingRule:
    """The rule of a search; the task's row `usual` gives the values that the search leaves open, `more` is passed on.

    Raises UserError for values that are out of range.
    """
    names = ("num_beams", "length_penalty", "no_repeat_ngram_size", "early_stopping")
    values = {name: getattr(search, name) for name in names}
    chosen = {name: getattr(usual, name) if value is None else value for name, value in values.items()}
    search.check_values()
    return DecodingRule(
        **chosen,
        length_normalization=search.length_normalization,
        top_p=search.top_p,
        top_k=search.top_k,
        temperature=search.temperature or 1.0,  # 0 is greedy, which has none
        **more,
    )


@dataclass
class Hypothesis:
    """A finished output: its generated tokens without the prompt, without the final eos; and its normalised score."""

    score: float
    tokens: list[int]
    finished: bool  # ended by eos, not by the length limit


@dataclass
class _Sentence:
    """The search state of one sentence."""

    prompt: list[int]
    hypotheses: list[Hypothesis] = field(default_factory=list)
    beams: list[list[int]] = field(default_factory=list)  # generated tokens of the running beams

    def keep(self, rule: DecodingRule, tokens: list[int], log_probability: float, finished: bool) -> None:
        """Offer a finished hypothesis to the K best."""
        length = len(tokens) + (len(self.prompt) if rule.length_normalization == "prompt+output" else 0)
        score = log_probability / max(length, 1) ** rule.length_penalty
        if len(self.hypotheses) < rule.num_beams or score > min(h.score for h in self.hypotheses):
            self.hypotheses.append(Hypothesis(score, tokens, finished))
            if len(self.hypotheses) > rule.num_beams:
                self.hypotheses.remove(min(self.hypotheses, key=lambda h: h.score))

    def is_done(self, rule: DecodingRule, best_candidate: float, generated: int) -> bool:
        """The stopping rule; `generated` counts the tokens generated before this step's."""
        if len(self.hypotheses) < rule.num_beams:
            return False
        if rule.early_stopping:
            return True
        length = generated + (len(self.prompt) if rule.length_normalization == "prompt+output" else 0)
        return min(h.score for h in self.hypotheses) >= best_candidate / max(length, 1) ** rule.length_penalty


@torch.no_grad()
def beam_search(model: StepwiseModel, prompts: Sequence[Sequence[int]], rule: DecodingRule) -> list[list[Hypothesis]]:
    """Decode N prompts together; returns per prompt up to K hypotheses, best first.

    Args:
        model: the language model, prefilled on the same prompts in the same order.
        prompts: N token lists without padding; used for lengths and n-gram rules only.
        rule: beams, lengths, penalties, banned tokens.

    Finished sentences leave the batch at once. Results do not depend on which sentences share the batch.
    """
    width = rule.num_beams
    sentences = [_Sentence(list(prompt)) for prompt in prompts]
    alive = list(range(len(sentences)))
    for sentence in sentences:
        sentence.beams = [[]]
    log_probabilities = torch.zeros(len(alive), 1)
    logits = model.prefill()
    for generated in range(rule.max_new_tokens):
        states = [(sentences[n].prompt, beam) for n in alive for beam in sentences[n].beams]
        allowed = allowed_tokens(logits, states, rule, generated)
        beams_now, wide = len(sentences[alive[0]].beams), min(2 * width, allowed.shape[1])
        # the best 2K of a sentence are among the best 2K of each of its beams, so no (R, V) sum is computed
        values, token_ids = allowed.topk(wide, dim=1)  # (R, 2K)
        totals = values.view(len(alive), beams_now, wide)
        totals = (totals + log_probabilities.to(totals.device).unsqueeze(-1)).flatten(1)  # (sentences, K * 2K)
        best, flat = totals.topk(wide, dim=1)  # sorted, best first
        best, from_beams = best.tolist(), flat.div(wide, rounding_mode="floor").tolist()
        candidates = token_ids.view(len(alive), -1).gather(1, flat).tolist()
        next_alive, rows, tokens, kept = [], [], [], []
        for index, n in enumerate(alive):
            chosen = _choose(sentences[n], best[index], from_beams[index], candidates[index], rule, generated)
            if chosen is None:
                continue
            next_alive.append(n)
            sentences[n].beams = [sentences[n].beams[beam] + [token] for beam, token, _ in chosen]
            rows += [index * beams_now + beam for beam, _, _ in chosen]
            tokens += [token for _, token, _ in chosen]
            kept.append([log_probability for _, _, log_probability in chosen])
        alive = next_alive
        log_probabilities = torch.tensor(kept)
        if not alive or generated + 1 == rule.max_new_tokens:
            break
        logits = model.advance(torch.tensor(rows), torch.tensor(tokens))
    for index, n in enumerate(alive):  # the length limit is reached: the running beams compete as they are
        for beam, log_probability in zip(sentences[n].beams, log_probabilities[index].tolist(), strict=True):
            sentences[n].keep(rule, beam, log_probability, finished=False)
    return [sorted(sentence.hypotheses, key=lambda h: -h.score) for sentence in sentences]


def _choose(
    sentence: _Sentence, scores: list[float], beams: list[int], tokens: list[int], rule: DecodingRule, generated: int
) -> list[tuple[int, int, float]] | None:
    """The next K (beam, token, log-probability) of one sentence, None when it is done; stores hypotheses with eos."""
    chosen = []
    for rank, (log_probability, beam, token) in enumerate(zip(scores, beams, tokens, strict=True)):
        ended, ends = sentence.beams[beam], token == rule.eos_token_id
        if rule.stop and not ends:
            ended = [*ended, token]
            ends = rule.stop(ended)
        if ends:  # dropped if it is outside the K best, or if another token was forced in its place
            if rank < rule.num_beams and log_probability > float("-inf"):
                sentence.keep(rule, ended, log_probability, finished=True)
        else:
            chosen.append((beam, token, log_probability))
        if len(chosen) == rule.num_beams:
            break
    if sentence.is_done(rule, scores[0], generated) or not chosen:
        return None
    while len(chosen) < rule.num_beams:  # a vocabulary smaller than the beam: fill up with beams that can't win
        chosen.append((*chosen[-1][:2], float("-inf")))
    return chosen


@torch.no_grad()
def sampling(
    model: StepwiseModel,
    prompts: Sequence[Sequence[int]],
    rule: DecodingRule,
    seeds: Sequence[int] | None,
    results: Sequence[Hypothesis],
) -> Iterator[None]:
    """Extend the N `results` in place, one token each per iteration, until all of them have ended.

    Tokens are chosen by nucleus sampling (Holtzman et al. 2020), with a seed per prompt, so that a sample does not
    depend on its neighbours, or greedily if `seeds` is None. Scores are sums of log-probabilities, not normalised.
    """
    generators = None if seeds is None else [torch.Generator().manual_seed(seed) for seed in seeds]
    alive = list(range(len(prompts)))
    logits = model.prefill()
    for generated in range(rule.max_new_tokens):
        states = [(prompts[n], results[n].tokens) for n in alive]
        allowed = allowed_tokens(logits, states, rule, generated)
        picked = _pick(allowed, rule, None if generators is None else [generators[n] for n in alive])
        gained = allowed.gather(1, picked.unsqueeze(1)).squeeze(1).tolist()
        rows, next_alive = [], []
        for row, (n, token) in enumerate(zip(alive, picked.tolist(), strict=True)):
            results[n].score += gained[row]
            if token == rule.eos_token_id:
                results[n].finished = True
                continue
            results[n].tokens.append(token)
            results[n].finished = bool(rule.stop and rule.stop(results[n].tokens))
            if not results[n].finished:
                rows.append(row)
                next_alive.append(n)
        yield
        alive = next_alive
        if not alive or generated + 1 == rule.max_new_tokens:
            return
        logits = model.advance(torch.tensor(rows), picked[rows])


def sample(
    model: StepwiseModel, prompts: Sequence[Sequence[int]], rule: DecodingRule, seeds: Sequence[int] | None = None
) -> list[Hypothesis]:
    """Decode N prompts to their ends by `sampling`, with one of `seeds` per prompt, or greedily without seeds."""
    results = [Hypothesis(0.0, [], False) for _ in prompts]
    for _ in sampling(model, prompts, rule, seeds, results):
        pass
    return results


def stream(model: StepwiseModel, prompt: Sequence[int], rule: DecodingRule, seed: int | None = None) -> Iterator[int]:
    """Yield the tokens of `sample` for one prompt, each as soon as it is chosen, without the final eos."""
    result = Hypothesis(0.0, [], False)
    given = 0
    for _ in sampling(model, [prompt], rule, None if seed is None else [seed], [result]):
        yield from result.tokens[given:]
        given = len(result.tokens)


def _pick(allowed: Tensor, rule: DecodingRule, generators: Sequence[torch.Generator] | None) -> Tensor:
    """A token for each row (R,): the likeliest, or a sample from the nucleus with the row's own generator."""
    if generators is None:
        return allowed.argmax(dim=-1)
    nucleus = _nucleus(allowed, rule).cpu()
    chosen = [
        torch.multinomial(row, 1, generator=generator) for row, generator in zip(nucleus, generators, strict=True)
    ]
    return torch.cat(chosen).to(allowed.device)


def _nucleus(allowed: Tensor, rule: DecodingRule) -> Tensor:
    """Probabilities (R, V) of the smallest set of the top_k tokens whose mass reaches top_p; the others get 0."""
    probabilities, order = (allowed / rule.temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    if rule.top_k:
        probabilities[:, rule.top_k :] = 0.0
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    mass_before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill(mass_before >= rule.top_p, 0.0)
    return torch.zeros_like(allowed).scatter(1, order, probabilities)


def allowed_tokens(logits: Tensor, states: list, rule: DecodingRule, generated: int) -> Tensor:
    """Log-probabilities (R, V) in float32; forbidden tokens get -inf, which does not raise the other values.

    `states` holds (prompt, generated tokens) per row.
    """
    forced = None
    if generated == 0:
        forced = rule.forced_first_token_id
    if generated == rule.max_new_tokens - 1 and rule.forced_last_token_id is not None:
        forced = rule.forced_last_token_id
    if forced is not None:  # costs nothing, and overrides the other rules
        allowed = torch.full_like(logits, float("-inf"), dtype=torch.float32)
        allowed[:, forced] = 0.0
        return allowed
    allowed = logits.float().log_softmax(dim=-1)
    if rule.banned_token_ids:
        allowed[:, list(rule.banned_token_ids)] = float("-inf")
    forbidden = []  # (row, token)
    for row, (prompt, tokens) in enumerate(states):
        if len(prompt) + len(tokens) < rule.min_length:
            forbidden.append((row, rule.eos_token_id))
        if rule.no_repeat_ngram_size:
            repeats = _repeated_ngram_tokens([*prompt, *tokens], rule.no_repeat_ngram_size)
            forbidden += [(row, token) for token in repeats]
    if forbidden:  # one assignment: on a GPU each one would wait for all earlier work
        rows, tokens = torch.tensor(forbidden).to(allowed.device).T
        allowed[rows, tokens] = float("-inf")
    return allowed


def _repeated_ngram_tokens(tokens: list[int], size: int) -> list[int]:
    """Tokens that would complete an n-gram that already occurs in `tokens`."""
    if len(tokens) + 1 < size:
        return []
    tail = tokens[len(tokens) - size + 1 :]
    starts = range(len(tokens) - size + 1)
    return [tokens[start + size - 1] for start in starts if tokens[start : start + size - 1] == tail]
