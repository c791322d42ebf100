"""The stepwise model that prefixlib.beam_search drives, decoding prompts in batches, and from tokens back to text.

Legend: N sentences of a batch, K beams, T tokens of the longest prompt, P prefix length, W cached positions, H heads,
D head size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Cache

from gpt2.flags import Decoding
from gpt2.frozen_lm import count_positions, position_mask
from gpt2.train_control import Past
from prefixlib import onednn
from prefixlib.beam_search import DecodingRule, Hypothesis, beam_search, cut_at, sample, stop_rule
from prefixlib.beam_tree import BeamTree, growing_cache
from prefixlib.errors import UserError
from prefixlib.head import Head
from prefixlib.tasks import clean_up

SIMILAR = 0.75  # of the longest prompt's length, read together with it


class CausalSteps:
    """A decoder-only model over a batch of prompts: a `StepwiseModel` of prefixlib.beam_search.

    Prompts are padded on the left; the padding is masked and takes no position, so a row's numbers do not depend on
    its neighbours. The prefix (layers of keys and values, (1, H, P, D), or (N, H, P, D) where every prompt has its own)
    seeds the cache; text starts at position P. `visible`, bool (N, P), is False where a prompt's prefix is padded. The
    beams of a prompt share its row of the cache (prefixlib.beam_tree).
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        layers: Sequence[tuple[Tensor, Tensor]] | None,
        visible: Tensor | None = None,
        head: Head | None = None,
    ):
        self.body, self.head, self.config = model.base_model, head or Head(model), model.config
        embeddings = model.get_input_embeddings().weight
        self.lengths = [len(prompt) for prompt in prompts]
        self.groups = of_similar_length(self.lengths)
        rows, width = len(prompts), max(self.lengths)
        length = layers[0][0].shape[2] if layers else 0
        self.input_ids = torch.zeros(rows, width, dtype=torch.long)
        mask = torch.zeros(rows, length + width, dtype=torch.bool)
        mask[:, :length] = True if visible is None else visible
        for row, prompt in enumerate(prompts):
            self.input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, length + width - len(prompt) :] = True
        self.input_ids, mask = self.input_ids.to(embeddings.device), mask.to(embeddings.device)
        self.positions = count_positions(mask)  # (N, W) of what is cached; first real token: P
        self.tree = BeamTree(mask)
        self.cache = growing_cache()
        for index, layer in enumerate(layers or ()):
            self.cache.update(*(states.to(embeddings).expand(rows, -1, -1, -1) for states in layer), index)

    def prefill(self) -> Tensor:
        """Prompts of similar length are read together, so that little of what is read is padding."""
        count, width = self.input_ids.shape
        if len(self.groups) == 1:
            return self.head(self._read(torch.arange(count), width, self.cache))
        last, caches = [], []
        for group in self.groups:
            rows, cache = torch.tensor(group), growing_cache()
            for index, layer in enumerate(self.cache.layers):  # the prefix
                cache.update(layer.keys[rows], layer.values[rows], index)
            last.append(self._read(rows, self.lengths[group[0]], cache))
            caches.append(cache)
        order = torch.tensor([row for group in self.groups for row in group]).argsort()
        length = self.positions.shape[1] - width
        for index, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
            read = ([layer.keys for layer in layers], [layer.values for layer in layers])
            whole = (torch.cat([_widened(states[:, :, length:], width) for states in kind])[order] for kind in read)
            self.cache.update(*whole, index)
        return self.head(torch.cat(last)[order])

    def _read(self, rows: Tensor, width: int, cache: Cache) -> Tensor:
        """Last hidden states (N', E) of the prompts `rows` (N'), appended to `cache`, which holds their prefix.

        width: tokens of the longest of them.
        """
        cached = self.positions.shape[1]
        length = cached - self.input_ids.shape[1]
        blank = self.input_ids.shape[1] - width  # columns that are padding in all of them
        column = torch.arange(cached, device=self.input_ids.device)
        column = torch.cat([column[:length], column[length + blank :]])
        token = column[length:].unsqueeze(1)  # the columns of the tokens themselves, (T', 1)
        # padding attends to itself: a query without any key would give NaN
        seen = (self.tree.visible[rows][:, :, column] & (column <= token)) | (column == token)  # (N', T', P+T')
        return self._forward(self.input_ids[rows, blank:], seen, self.positions[rows][:, column], cache)[:, -1]

    def advance(self, rows: Tensor, tokens: Tensor) -> Tensor:
        staying = self.tree.advance(rows)
        if staying is not None:
            self.positions = self.positions[staying]
            for layer in self.cache.layers:
                layer.keep(staying)
        sentences, beams, _ = self.tree.visible.shape
        self.positions = torch.cat([self.positions, self.positions[:, -1:].expand(-1, beams) + 1], dim=1)
        tokens = tokens.view(sentences, beams).to(self.positions.device)
        return self.head(self._forward(tokens, self.tree.visible, self.positions, self.cache).flatten(0, 1))

    def _forward(self, input_ids: Tensor, seen: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Last hidden states (N, T, E) of tokens (N, T) behind the cache, each of which sees `seen` (N, T, W).

        positions: (N, W), of all columns; the last T are the tokens'.
        """
        own = positions[:, -input_ids.shape[1] :]
        return self.body(
            input_ids=input_ids,
            attention_mask=position_mask(self.config, seen, own, positions),
            position_ids=own,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state


def of_similar_length(lengths: Sequence[int]) -> list[list[int]]:
    """The numbers of the prompts in groups, longest first, whose shortest has at least SIMILAR of its longest."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if not groups or lengths[row] < SIMILAR * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(row)
    return groups


def _widened(states: Tensor, width: int) -> Tensor:
    """Keys or values (N, H, T, D) behind columns of zeros: (N, H, width, D)."""
    return nn.functional.pad(states, (0, 0, width - states.shape[2], 0))


def decode(model: nn.Module, prompts: Sequence[Sequence[int]], rule: DecodingRule, **how: Any) -> list[Hypothesis]:
    """The best hypothesis for every prompt, in the order given: see `decode_several`."""
    return [hypotheses[0] for hypotheses in decode_several(model, prompts, rule, **how)]


@torch.no_grad()
def decode_several(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    rule: DecodingRule,
    *,
    layers: Sequence[tuple[Tensor, Tensor]] | None = None,
    past: Callable[[Sequence[int]], Past] | None = None,
    strategy: str = "beam",
    count: int = 1,
    batch_size: int = 32,
    seed: int = 42,
    progress: bool = True,
) -> list[list[Hypothesis]]:
    """The `count` best hypotheses for every prompt, or as many samples; in the order given.

    layers: the prefix that all prompts share. past: gives the prefixes of the prompts with the numbers it is called
    with, where each has its own. Batches are made of prompts of similar length; results do not depend on `batch_size`.
    Raises ValueError for a prompt without tokens: there is nothing whose next token could be predicted.
    """
    if not all(map(len, prompts)):
        raise ValueError("a prompt needs at least one token")
    repeats = 1 if strategy == "beam" else count  # samples are drawn one by one
    numbered = [(n, repeat) for n in range(len(prompts)) for repeat in range(repeats)]
    numbered.sort(key=lambda job: -len(prompts[job[0]]))  # longest first: memory trouble shows at once
    results: list[list[Hypothesis]] = [[] for _ in prompts]
    head = Head(model)
    onednn.prepare_to_decode(model)
    with tqdm(total=len(numbered), desc="decoding", unit=" sentences", disable=not progress, leave=False) as bar:
        for start in range(0, len(numbered), batch_size):
            jobs = numbered[start : start + batch_size]
            members = [n for n, _ in jobs]
            batch = [prompts[n] for n in members]
            if past is None:
                steps = CausalSteps(model, batch, layers, head=head)
            else:
                own = past(members)
                steps = CausalSteps(model, batch, own.layers, own.visible, head)
            if strategy == "beam":
                found = [hypotheses[:count] for hypotheses in beam_search(steps, batch, rule)]
            else:
                seeds = [seed + n * count + repeat for n, repeat in jobs] if strategy == "nucleus" else None
                found = [[hypothesis] for hypothesis in sample(steps, batch, rule, seeds)]
            for n, hypotheses in zip(members, found, strict=True):
                results[n] += hypotheses
            bar.update(len(jobs))
    return results


def decoding_rule(settings: Decoding, tokenizer: Any, verbatim: bool = False) -> DecodingRule:
    """The rule of the settings; raises UserError for values that no search can have.

    Newlines are banned, as in the original, unless the task's texts are to stay as they are (`verbatim`).
    """
    try:
        return DecodingRule(
            eos_token_id=tokenizer.eos_token_id,
            max_new_tokens=settings.length,
            num_beams=settings.num_beams,
            length_penalty=settings.length_penalty,
            length_normalization=settings.length_normalization,
            banned_token_ids=() if verbatim else newline_token_ids(tokenizer),
            top_p=settings.top_p,
            top_k=settings.top_k,
            temperature=settings.temperature or 1.0,  # 0 is greedy, which takes none
            stop=stop_rule(settings.stop, lambda tokens: tokenizer.decode(list(tokens))),
        )
    except ValueError as error:
        raise UserError(f"decoding flags: {error}") from error


def to_text(tokenizer, tokens: Sequence[int], verbatim: bool = False, stop: Sequence[str] = ()) -> str:
    """Generated tokens as text up to the first of the strings `stop`.

    Unless `verbatim`, on one line, cleaned as the original's decoding did; `Error` where nothing is left.
    """
    text = tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    text = cut_at(text.split(tokenizer.eos_token)[0], stop)
    return text if verbatim else clean_up(text) or "Error"


def newline_token_ids(tokenizer) -> tuple[int, ...]:
    """Tokens made of newlines alone, which decoding bans (198 and 628 in GPT-2's vocabulary, <0x0A> in Llama's)."""
    vocabulary = tokenizer.get_vocab()
    return tuple(
        sorted(n for token, n in vocabulary.items() if token == "<0x0A>" or (token and set(token) <= {"Ċ", "\n"}))
    )
