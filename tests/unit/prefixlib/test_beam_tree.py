"""Beams on one row of the cache: each sees what it descends from and nothing else; no position is lost or copied."""

import pytest
import torch
from transformers import MistralConfig, Qwen3Config

from gpt2.decoding import CausalSteps
from prefixlib.decoding.tree import BeamTree, GrowingLayer, growing_cache
from tests.unit.gpt2.test_decoder_families import GROUPED, random_model


def test_a_beam_sees_its_prompt_and_its_ancestors():
    tree = BeamTree(torch.tensor([[1, 1, 1], [0, 1, 1]]))  # the second prompt is padded
    assert tree.advance(torch.tensor([0, 0, 1, 1])) is None
    assert tree.visible.int().tolist() == [
        [[1, 1, 1, 1, 0], [1, 1, 1, 0, 1]],
        [[0, 1, 1, 1, 0], [0, 1, 1, 0, 1]],
    ]
    # the first sentence is done; both beams of the second go on from its second
    assert tree.advance(torch.tensor([3, 3])).tolist() == [1]
    assert tree.visible.int().tolist() == [[[0, 1, 1, 0, 1, 1, 0], [0, 1, 1, 0, 1, 0, 1]]]


@pytest.mark.parametrize("rows", [[0, 1, 0, 1], [0, 0, 1], [1, 0, 0, 0]])
def test_rows_in_another_order_are_refused(rows):
    with pytest.raises(ValueError, match="must be adjacent"):
        BeamTree(torch.ones(2, 3)).advance(torch.tensor(rows))


def test_a_growing_layer_holds_what_was_appended(monkeypatch):
    monkeypatch.setattr(GrowingLayer, "SPARE", 3)
    torch.manual_seed(0)
    parts = [torch.randn(4, 2, length, 5) for length in (6, 1, 2, 1, 4)]
    cache = growing_cache()
    for n, part in enumerate(parts):
        keys, values = cache.update(part, -part, 0)
        assert torch.equal(keys, torch.cat(parts[: n + 1], dim=2))
        assert torch.equal(values, -keys)
    kept = torch.tensor([0, 3])
    cache.layers[0].keep(kept)
    assert cache.get_seq_length() == 14
    last = torch.randn(2, 2, 1, 5)
    assert torch.equal(cache.update(last, -last, 0)[0], torch.cat([keys[kept], last], dim=2))


def test_appending_does_not_copy_what_is_there():
    cache = growing_cache()
    cache.update(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), 0)
    places = {cache.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), 0)[0].data_ptr() for _ in range(8)}
    assert len(places) == 1


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**GROUPED, sliding_window=5),
        Qwen3Config(**GROUPED, head_dim=8, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    ],
    ids=["every layer", "every other layer"],
)
@torch.no_grad()
def test_a_sliding_window_counts_positions_not_columns(config):
    """Beams on one row stand further apart in columns than in positions; each must give what its text alone gives."""
    base = random_model(config)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [3, 4]]
    steps = CausalSteps(base, prompts, None)
    texts = [[*prompt] for prompt in prompts]
    found = steps.prefill()
    rows = torch.tensor([0, 0, 0, 1, 1, 1])
    for step in range(4):
        alone = [base(torch.tensor([text])).logits[0, -1] for text in texts]
        assert torch.allclose(found, torch.stack(alone), atol=1e-4), step
        tokens = torch.tensor([(7 * step + 5 * n) % 50 for n in range(6)])
        texts = [[*texts[row], token] for row, token in zip(rows.tolist(), tokens.tolist(), strict=True)]
        found = steps.advance(rows, tokens)
        rows = torch.tensor([1, 0, 1, 5, 5, 3])  # some beams die, some split
