"""Decoding rules: independence of the batch, length normalisation, bans, forced tokens, n-grams, sampling."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2 import decoding
from gpt2.decoding import CausalSteps, decode
from gpt2.train_control import split_layers
from prefixlib.decoding.naive import naive_beam_search
from prefixlib.decoding.search import DecodingRule, _choose, _Sentence, beam_search, sample
from tests.conftest import close

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 49], [3, 49], [12, 13, 14, 49], [7, 7, 7, 7, 7, 49], [20, 49]]


class Script:
    """A stepwise model whose next-token probabilities are a fixed table per generated token (first row: the prompt)."""

    def __init__(self, table: dict[tuple[int, ...], list[float]], sentences: int = 1):
        self.table, self.states = table, [()] * sentences

    def prefill(self):
        return self._logits()

    def advance(self, rows, tokens):
        self.states = [(*self.states[row], token) for row, token in zip(rows.tolist(), tokens.tolist(), strict=True)]
        return self._logits()

    def _logits(self):
        return torch.tensor([self.table[state] for state in self.states]).log()


# vocabulary: 0 = eos, 1, 2. Sum-of-log-probability order and per-token order differ, so the divisor decides.
TABLE = {
    (): [0.30, 0.60, 0.10],
    (1,): [0.30, 0.40, 0.30],
    (2,): [0.90, 0.06, 0.04],
    **{(1, n): [0.9, 0.05, 0.05] for n in (1, 2)},
    **{(2, n): [0.9, 0.05, 0.05] for n in (1, 2)},
    **{(a, b, c): [0.98, 0.01, 0.01] for a in (1, 2) for b in (1, 2) for c in (1, 2)},
}


@pytest.mark.parametrize(
    ("normalization", "prompt_length", "best"),
    [
        # ln .30 / 1 = -1.20 for "", ln(.6*.4*.9)/ (1+2) = -0.51 for "1 1": long outputs win
        ("prompt+output", 1, [1, 1]),
        # over a prompt of 100 tokens the division hardly matters: ln .30 = -1.20 against ln(.6*.3) and ln(.6*.4*.9)
        ("prompt+output", 100, []),
        ("output", 100, [1, 1]),
    ],
)
def test_what_the_score_is_divided_by(normalization, prompt_length, best):
    rule = DecodingRule(eos_token_id=0, max_new_tokens=4, num_beams=2, length_normalization=normalization)
    found = beam_search(Script(TABLE), [[5] * prompt_length], rule)[0]
    assert found[0].tokens == best
    probability = {(): 0.30, (1, 1): 0.6 * 0.4 * 0.9}[tuple(best)]
    length = max(len(best) + (prompt_length if normalization == "prompt+output" else 0), 1)
    assert found[0].score == pytest.approx(torch.tensor(probability).log().item() / length, abs=1e-6)


def test_forced_tokens_cost_nothing():
    rule = DecodingRule(eos_token_id=0, max_new_tokens=3, num_beams=2, forced_first_token_id=2, forced_last_token_id=0)
    found = beam_search(Script(TABLE), [[5]], rule)[0]
    # 2 forced, then eos at .9; or 2 forced, 1 at .06, eos forced
    assert [(h.tokens, h.finished) for h in found] == [([2], True), ([2, 1], True)]
    assert found[0].score == pytest.approx(torch.tensor(0.9).log().item() / 2, abs=1e-6)
    assert found[1].score == pytest.approx(torch.tensor(0.06).log().item() / 3, abs=1e-6)


def test_an_end_that_another_token_was_forced_for_is_no_hypothesis():
    """Among candidates at -inf any may come first, and differs between devices: here eos is second of two beams."""
    rule = DecodingRule(eos_token_id=0, max_new_tokens=3, num_beams=2, forced_first_token_id=2, early_stopping=True)
    sentence = _Sentence([5], beams=[[]])
    chosen = _choose(sentence, [0.0, -math.inf, -math.inf], [0, 0, 0], [2, 0, 1], rule, generated=0)
    assert [token for _, token, _ in chosen] == [2, 1]
    assert sentence.hypotheses == []


def test_a_forced_end_stands_above_the_minimum_length():
    rule = DecodingRule(eos_token_id=0, max_new_tokens=3, num_beams=2, min_length=9, forced_last_token_id=0)
    found = beam_search(Script(TABLE), [[5]], rule)[0]
    assert [(h.tokens, h.finished) for h in found] == [([1, 1], True), ([1, 2], True)]
    for hypothesis, probability in zip(found, (0.6 * 0.4, 0.6 * 0.3), strict=True):
        assert hypothesis.score == pytest.approx(torch.tensor(probability).log().item() / 3, abs=1e-6)


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="at least one token"):
        decode(model[0], [[], [5, 49]], DecodingRule(eos_token_id=49, max_new_tokens=3), progress=False)


def test_minimum_length_counts_the_prompt():
    rule = DecodingRule(eos_token_id=0, max_new_tokens=4, num_beams=2, min_length=4)
    assert [len(h.tokens) for h in beam_search(Script(TABLE), [[5]], rule)[0]] == [3, 3]
    assert [len(h.tokens) for h in beam_search(Script(TABLE), [[5, 5]], rule)[0]] == [2, 2]


@pytest.mark.parametrize(("penalty", "best"), [(0.0, []), (2.0, [1, 1])])
def test_length_penalty_favours_long_outputs(penalty, best):
    rule = DecodingRule(
        eos_token_id=0, max_new_tokens=4, num_beams=2, length_penalty=penalty, length_normalization="output"
    )
    assert beam_search(Script(TABLE), [[5]], rule)[0][0].tokens == best


def test_an_ngram_is_not_repeated():
    table = {state: [0.01, 0.98, 0.01] for state in [(), *TABLE]}
    rule = DecodingRule(eos_token_id=0, max_new_tokens=4, num_beams=1, no_repeat_ngram_size=2)
    assert sample(Script({**table, **{(1, 1, n): [0.01, 0.98, 0.01] for n in (1, 2)}}), [[5]], rule)[0].tokens == [1, 1]


@pytest.fixture
def model(tiny_lm):
    """A lively random model (wide weights, an output head of its own) and a prefix of length 3."""
    torch.manual_seed(1)
    config = GPT2Config(**{**tiny_lm.base.config.to_dict(), "initializer_range": 0.3, "tie_word_embeddings": False})
    base = GPT2LMHeadModel(config).eval()
    base.lm_head.weight.data.normal_(std=0.5)
    return base, split_layers(tiny_lm.prefix.flat().detach() * 3, tiny_lm.prefix.config, batch_size=1)


@pytest.mark.parametrize("strategy", ["beam", "greedy", "nucleus"])
@pytest.mark.parametrize("with_prefix", [True, False])
def test_results_do_not_depend_on_the_batch(model, strategy, with_prefix):
    base, layers = model
    rule = DecodingRule(eos_token_id=49, max_new_tokens=12, num_beams=4, banned_token_ids=(1,), top_p=0.8)
    runs = [
        decode(
            base,
            PROMPTS,
            rule,
            layers=layers if with_prefix else None,
            strategy=strategy,
            batch_size=size,
            progress=False,
        )
        for size in (1, 2, 5)
    ]
    assert len({tuple(h.tokens) for h in runs[0]}) >= 3  # the prompts really lead to different outputs
    for other in runs[1:]:
        assert [h.tokens for h in other] == [h.tokens for h in runs[0]]
        assert [h.score for h in other] == pytest.approx([h.score for h in runs[0]], abs=1e-4)
    assert all(1 not in hypothesis.tokens for run in runs for hypothesis in run)


def test_output_normalization_gives_what_transformers_generates(model):
    """With `length_normalization="output"` and early stopping off, the best beam is generate()'s."""
    base, _ = model
    rule = DecodingRule(eos_token_id=49, max_new_tokens=10, num_beams=4, length_normalization="output")
    found = decode(base, PROMPTS, rule, batch_size=5, progress=False)
    for prompt, hypothesis in zip(PROMPTS, found, strict=True):
        generated = base.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=4,
            max_new_tokens=10,
            do_sample=False,
            early_stopping=False,
            length_penalty=1.0,
            pad_token_id=49,
        )[0, len(prompt) :].tolist()
        assert hypothesis.tokens == [token for token in generated if token != 49]


def test_nucleus_keeps_the_smallest_set_that_reaches_top_p():
    rule = DecodingRule(eos_token_id=0, max_new_tokens=1, top_p=0.55)
    drawn = {tuple(sample(Script(TABLE), [[5]], rule, [seed])[0].tokens) for seed in range(40)}
    assert drawn == {(1,)}
    rule = DecodingRule(eos_token_id=0, max_new_tokens=1, top_p=0.85)
    drawn = {tuple(sample(Script(TABLE), [[5]], rule, [seed])[0].tokens) for seed in range(40)}
    assert drawn == {(1,), ()}


def test_prefill_positions_start_at_p_whatever_the_padding(model):
    base, layers = model
    steps = CausalSteps(base, PROMPTS, layers)
    assert steps.positions[1].tolist() == [0, 1, 2] + [2] * 6 + [3, 4]  # padding takes no position, its own is unseen
    assert steps.positions[0].tolist() == list(range(11))


@torch.no_grad()
@pytest.mark.parametrize("similar", [0.75, 0.0, 1.1])
def test_prompts_read_in_groups_give_what_each_gives_alone(model, monkeypatch, similar):
    """Logits and the cache behind them; the prefix is one for all, or a padded one for each."""
    base, layers = model
    monkeypatch.setattr(decoding, "SIMILAR", similar)
    torch.manual_seed(0)
    own = [tuple(states * torch.rand(len(PROMPTS), 1, 1, 1) for states in layer) for layer in layers]
    visible = torch.ones(len(PROMPTS), 3, dtype=torch.bool)
    visible[1, 0] = visible[3, :2] = False
    for prefix, seen in ((layers, None), (own, visible), (None, None)):
        together = CausalSteps(base, PROMPTS, prefix, seen)
        assert len(together.groups) == {0.75: 3, 0.0: 1, 1.1: 5}[similar]
        found = [together.prefill(), together.advance(torch.arange(5), torch.tensor([9, 8, 7, 6, 5]))]
        for n, prompt in enumerate(PROMPTS):
            rows = slice(n, n + 1) if prefix is own else slice(None)
            one = prefix and [tuple(states[rows] for states in layer) for layer in prefix]
            alone = CausalSteps(base, [prompt], one, None if seen is None else seen[n : n + 1])
            assert close(found[0][n], alone.prefill()[0])
            assert close(found[1][n], alone.advance(torch.tensor([0]), torch.tensor([9 - n]))[0])


def test_finished_sentences_leave_the_batch(model):
    base, layers = model
    sizes = []
    base.transformer.register_forward_pre_hook(lambda m, a, k: sizes.append(k["input_ids"].shape), with_kwargs=True)
    rule = DecodingRule(eos_token_id=49, max_new_tokens=20, num_beams=2)
    base.lm_head.weight.data[49] *= 3  # eos now and then
    decode(base, PROMPTS, rule, layers=layers, batch_size=5, progress=False)
    # the prompts once, those of similar length together, then a token for each beam
    assert sizes[:4] == [(2, 8), (1, 4), (2, 2), (5, 2)]
    rows, beams = zip(*sizes[3:], strict=True)
    assert set(beams) == {2}
    assert list(rows) == sorted(rows, reverse=True)
    assert rows[-1] < 5


def test_a_sentence_stops_by_the_length_before_the_step():
    """transformers 3.2 compares with best / cur_len, where cur_len has not counted the step's token yet.

    One beam, a prompt of one token: eos at .5 is kept with ln .5 / 1, which is as good as the best candidate over 1.
    Over 2 it would not be, and "1" then eos, ln(.4 * .98) / 2 = -.47 against -.69, would win.
    """
    table = {(): [0.5, 0.4, 0.1], (1,): [0.98, 0.01, 0.01]}
    found = beam_search(Script(table), [[5]], DecodingRule(eos_token_id=0, max_new_tokens=4, num_beams=1))[0]
    assert [h.tokens for h in found] == [[]]


RULES = {
    "plain": {},
    "output alone": {"length_normalization": "output", "length_penalty": 2.0},
    "early": {"early_stopping": True},
    "bans": {"banned_token_ids": (3, 7), "no_repeat_ngram_size": 2},
    "lengths": {"min_length": 6, "forced_first_token_id": 4, "forced_last_token_id": 49},
    "stop": {"stop": lambda tokens: tokens[-1] % 5 == 1},
    "one beam": {"num_beams": 1},
}


@pytest.mark.parametrize("name", RULES)
def test_beams_are_those_of_the_naive_search(tiny_lm, name):
    """The executable specification reads every beam anew, without a cache."""
    base = tiny_lm.base
    for parameter in base.parameters():
        parameter.data.mul_(4)  # a fresh model finds every token alike
    rule = DecodingRule(**{"eos_token_id": 49, "max_new_tokens": 6, "num_beams": 4, **RULES[name]})
    found = decoding.decode_several(base, PROMPTS, rule, count=rule.num_beams)
    for prompt, hypotheses in zip(PROMPTS, found, strict=True):
        expected = naive_beam_search(lambda tokens: base(torch.tensor([tokens])).logits[0, -1], prompt, rule)
        assert [(h.tokens, h.finished) for h in hypotheses] == [(h.tokens, h.finished) for h in expected]
        assert [h.score for h in hypotheses] == pytest.approx([h.score for h in expected], abs=1e-4)
    assert len({tuple(h.tokens) for hypotheses in found for h in hypotheses}) >= 5
