"""Packing: the same losses and gradients as the padded batch, for every family; nothing packed where it matters."""

import random

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, Qwen3Config

from gpt2.dataset import Encoded, collate
from gpt2.prefix_lm import PrefixLM, best_layout, pack
from gpt2.train_control import PrefixConfig, make_prefix
from prefixlib import packing
from prefixlib.head import token_nll
from prefixlib.packing import first_fit, width_of
from tests.conftest import SETTINGS, close
from tests.unit.gpt2.test_decoder_families import FAMILIES, GROUPED, UNCHECKPOINTED, random_model

BATCH = collate(
    [
        Encoded([5, 6, 7, 8, 9, 10, 11, 49], [12, 13, 14, 49]),
        Encoded([10, 49], [11, 49]),
        Encoded([3, 49], [12, 13, 14, 49]),
        Encoded([4, 49], [15, 49]),
        Encoded([20, 21, 49], [22, 49]),
    ],
    pad_token_id=49,
)
MODELS = {
    "gpt2": GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=64),
    **FAMILIES,
    "mistral narrow": MistralConfig(**GROUPED, sliding_window=9),
    "qwen3 mixed": Qwen3Config(**GROUPED, head_dim=8, use_sliding_window=True, sliding_window=9, max_window_layers=1),
}


def rows_seen(model):
    """How many rows the base model is given, by call."""
    seen = []

    def note(module, args, kwargs):
        if "input_ids" in kwargs:  # not what an infix prefix reads
            seen.append(len(kwargs["input_ids"]))

    model.base.base_model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def with_prefix(base, checkpointing=False, **settings) -> PrefixLM:
    torch.manual_seed(1)
    config = PrefixConfig.for_model(base, **{"preseqlen": 3, "mid_dim": 8, **SETTINGS, **settings})
    return PrefixLM(base, make_prefix(config), train_base=checkpointing, checkpointing=checkpointing).train()


@pytest.mark.parametrize(
    ("name", "how"),
    [
        (name, how)
        for name in MODELS
        for how in ("prefix", "checkpointing", "no prefix")
        if not (how == "checkpointing" and name in (*UNCHECKPOINTED, "gemma3n", "gemma4"))
    ],
)
def test_losses_and_gradients_equal_those_of_the_padded_batch(name, how, monkeypatch):
    monkeypatch.setattr("prefixlib.packing.SLOWNESS", 1)  # wider rows: every kind of neighbour
    base = random_model(MODELS[name])
    model = PrefixLM(base, None).train() if how == "no prefix" else with_prefix(base, how == "checkpointing")
    trained = (model.prefix or model).parameters()
    trained = [parameter for parameter in trained if parameter.requires_grad]
    for module in model.base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    seen, found = rows_seen(model), []
    for mask in (None, BATCH["attention_mask"]):
        model.zero_grad()
        nll, rows = model(BATCH["input_ids"], BATCH["labels"], attention_mask=mask)
        (nll * torch.arange(1, len(nll) + 1)).sum().backward()  # every token counts differently
        found.append((nll, rows, [p.grad.clone() for p in trained if p.grad is not None]))
    assert seen == [5, 2]  # of 12, 4, 6, 4 and 5 tokens
    (nll, rows, gradients), (packed_nll, packed_rows, packed_gradients) = found
    assert close(packed_nll, nll)
    assert torch.equal(packed_rows, rows)
    # a key's bias has no gradient but rounding
    least = 1e-4 * max(g.abs().max() for g in gradients) if how == "no prefix" else 0
    for one, other in zip(packed_gradients, gradients, strict=True):
        assert (one - other).abs().max() < 1e-4 * max(other.abs().max(), least)


@pytest.mark.parametrize(
    "settings",
    [{"prefix_dropout": 0.1}, {"format_mode": "infix"}],
    ids=["prefix dropout", "a prefix for every source"],
)
def test_what_differs_from_row_to_row_is_not_packed(settings, monkeypatch):
    monkeypatch.setattr("prefixlib.packing.SLOWNESS", 1)
    model = with_prefix(random_model(MODELS["gpt2"]), **settings)
    seen = rows_seen(model)
    source = {"source": BATCH["input_ids"], "source_mask": BATCH["attention_mask"]}
    model.train()(**BATCH, **(source if model.prefix.config.needs_source else {}))
    assert seen[-1] == 5
    if "format_mode" not in settings:
        model.eval()(**BATCH)
        assert seen[-1] == 2


def test_equal_lengths_are_left_alone():
    assert pack(torch.ones(5, 80, dtype=torch.long), torch.ones(5, 80, dtype=torch.long), 768) is None
    assert best_layout([7], 768) == [[0]]


def test_layouts_hold_every_text_once_and_never_cost_more():
    rng = random.Random(0)
    for _ in range(200):
        lengths = [rng.randint(1, 120) for _ in range(rng.randint(1, 40))]
        rows = best_layout(lengths, 768)
        width = width_of(lengths, rows)
        assert sorted(text for row in rows for text in row) == list(range(len(lengths)))
        padded = len(lengths) * max(lengths) * (6 * 768 + packing.SLOWNESS * max(lengths))
        assert len(rows) * width * (6 * 768 + packing.SLOWNESS * width) <= padded


def test_first_fit_fills_rows_the_longest_texts_first():
    assert first_fit([3, 9, 5, 2, 1], 10) == [[1, 4], [2, 0, 3]]


def test_the_loss_behind_a_frozen_head_equals_cross_entropy(monkeypatch):
    """Value and gradient, in several chunks, with and without a bias, and behind a head that is trained."""
    monkeypatch.setattr("prefixlib.head.CHUNK", 4)
    torch.manual_seed(0)
    head, bias, targets, weights = nn.Linear(6, 11), torch.randn(1, 11), torch.randint(0, 11, (10,)), torch.rand(10)
    for frozen in (True, False):
        head.requires_grad_(not frozen)
        for extra in (None, bias):
            hidden = torch.randn(10, 6, requires_grad=True)
            logits = head(hidden) if extra is None else head(hidden) + extra
            expected = nn.functional.cross_entropy(logits, targets, reduction="none")
            (gradient,) = torch.autograd.grad((expected * weights).sum(), hidden)
            found = token_nll(hidden, targets, head, extra)
            assert close(found, expected)
            (found * weights).sum().backward()
            assert close(hidden.grad, gradient)
            with torch.no_grad():
                assert close(token_nll(hidden, targets, head, extra), expected)
    assert token_nll(hidden[:0], targets[:0], head).shape == (0,)


def test_no_logits_are_kept_behind_a_frozen_head():
    head = nn.Linear(6, 1000).requires_grad_(False)
    kept = []
    hidden = torch.randn(10, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        token_nll(hidden, torch.zeros(10, dtype=torch.long), head)
    assert max(kept) == 60


def test_gpt2s_activation_is_one_kernel_with_the_same_values(tmp_path):
    from prefixlib.base_model import load_model

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50)).save_pretrained(tmp_path)
    fused = load_model(str(tmp_path), "decoder-only")
    stock = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert isinstance(fused.transformer.h[0].mlp.act, nn.GELU)
    inputs = torch.linspace(-6, 6, 500)
    assert torch.allclose(fused.transformer.h[0].mlp.act(inputs), stock.transformer.h[0].mlp.act(inputs), atol=1e-6)
    assert torch.allclose(fused(BATCH["input_ids"]).logits, stock(BATCH["input_ids"]).logits, atol=1e-6)
    assert fused.config.activation_function == "gelu_new"  # what a saved model says of itself stays
