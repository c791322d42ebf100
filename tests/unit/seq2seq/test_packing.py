"""Packing an encoder-decoder's batch: the same losses and gradients as padded; nothing packed where it matters."""

import random

import pytest
import torch
from torch import nn

from prefixlib.compute import attention, packing
from prefixlib.compute.packing import width_of
from prefixlib.decoding.search import DecodingRule
from seq2seq import prefix_lm
from seq2seq.decoding import Past, decode_batch
from seq2seq.prefix_lm import PrefixLM, best_layout, encoder_mask, pack
from seq2seq.prefixTuning import BRANCHES, PrefixConfig, PrefixTuning
from tests.seq2seq_tiny import random_model

PAD = 1
SETTINGS = {"mid_dim": 8, "prefix_dropout": 0.0, "use_deep": False, "init_shallow": False}
SETTINGS |= {branch.switch: True for branch in BRANCHES}
SIZES = [(7, 3), (40, 9), (2, 1), (12, 4), (19, 1)]  # tokens of source and target; packed: two rows of 40


def make_batch(sizes=SIZES, start=2):
    generator = torch.Generator().manual_seed(0)
    sides = []
    for rows in zip(*sizes, strict=True):
        texts = [torch.randint(4, 90, (length,), generator=generator) for length in rows]
        sides.append(nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=PAD))
    source, labels = sides
    shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return {
        "input_ids": source,
        "attention_mask": source.ne(PAD).long(),
        "decoder_input_ids": shifted,
        "labels": labels,
    }


def with_prefix(model, length=3, **settings) -> PrefixLM:
    torch.manual_seed(1)
    config = PrefixConfig.for_model(model.config, preseqlen=length, **{**SETTINGS, **settings})
    return PrefixLM(model, PrefixTuning(config)).train()


def rows_seen(lm):
    """How many rows the encoder is given, by call."""
    seen = []
    lm.base.get_encoder().register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return seen


def loss_and_gradients(lm, batch, **settings):
    lm.zero_grad()
    total, count = lm.loss(**batch, **settings)
    total.backward()
    return total.detach(), count, {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}


def compare(lm, batch, monkeypatch, **settings):
    """The loss and gradients of a batch, packed, against those padded."""
    seen = rows_seen(lm)
    packed = loss_and_gradients(lm, batch, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(prefix_lm, "pack", lambda *_, **__: None)
        padded = loss_and_gradients(lm, batch, **settings)
    assert seen == [2, len(batch["labels"])]
    assert packed[0].item() == pytest.approx(padded[0].item(), rel=1e-6)
    assert packed[1] == padded[1] == batch["labels"].ne(PAD).sum()
    assert packed[2].keys() == padded[2].keys()
    assert len(packed[2]) >= 5
    scale = max(gradient.abs().max() for gradient in padded[2].values())
    for name, gradient in padded[2].items():
        assert (packed[2][name] - gradient).abs().max() < 1e-5 * scale, name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("start", [2, PAD])
@pytest.mark.parametrize("family", ["Bart", "MBart", "Pegasus"])
def test_losses_and_gradients_equal_those_of_the_padded_batch(family, start, checkpointing, monkeypatch):
    """Also where the decoder starts with the padding's id, as Pegasus does."""
    lm = with_prefix(random_model(family, pad_token_id=PAD))
    if checkpointing:
        attention.enable_checkpointing(lm.base)
    compare(lm, make_batch(start=start), monkeypatch)


@pytest.mark.parametrize("switched_off", [branch.switch for branch in BRANCHES])
def test_with_two_of_the_three_prefixes(switched_off, monkeypatch):
    compare(with_prefix(random_model("Bart"), **{switched_off: False}), make_batch(), monkeypatch)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_model_that_is_tuned_itself(smoothing, monkeypatch):
    lm = PrefixLM(random_model("Bart"), None).train()
    compare(lm, make_batch(), monkeypatch, smoothing=smoothing)


def test_rows_without_a_label_and_padding_inside_a_target(monkeypatch):
    """A filler of several processes, and a text that says <pad>."""
    batch = make_batch()
    batch["labels"][2] = PAD
    batch["labels"][1, 4] = batch["decoder_input_ids"][1, 5] = PAD
    batch["labels"][3, 0] = batch["decoder_input_ids"][3, 1] = PAD
    compare(with_prefix(random_model("Bart")), batch, monkeypatch)


def test_what_gains_nothing_or_is_drawn_for_every_text_is_not_packed():
    lm = with_prefix(random_model("Bart"))
    seen = rows_seen(lm)
    lm.loss(**make_batch([(9, 4)] * 5))
    only_fillers = make_batch()
    only_fillers["labels"][:] = PAD
    assert [value.item() for value in lm.loss(**only_fillers)] == [0, 0]
    dropping = with_prefix(random_model("Bart"), prefix_dropout=0.1)
    seen_dropping = rows_seen(dropping)
    dropping.loss(**make_batch())
    dropping.eval().loss(**make_batch())
    assert (seen, seen_dropping) == ([5, 5], [5, 2])


def test_every_query_sees_something():
    """Some kernels answer NaN to a query without a key; its gradient would spread to all."""
    batch = make_batch([(7, 3), (40, 7), (2, 1), (12, 4), (18, 1)])
    batch = {name: batch[name] for name in ("input_ids", "attention_mask", "decoder_input_ids", "labels")}
    counted = batch.pop("labels").ne(PAD)
    packed = pack(*batch.values(), counted, padding=PAD, hidden_size=16, prefix_length=0)
    assert (packed.source.text.eq(-1).any(), packed.target.text.eq(-1).any()) == (True, True)
    for mask in (encoder_mask(packed.source), packed.decoder_mask(), packed.cross_mask()):
        assert mask.any(dim=-1).all()


@pytest.mark.parametrize("family", ["Bart", "MBart", "Pegasus"])
def test_decoding_packs_the_sources_and_says_the_same(family):
    lm = with_prefix(random_model(family, pad_token_id=PAD)).eval()
    batch, prefix, seen = make_batch(), lm.prefix(1), rows_seen(lm)
    rule = DecodingRule(eos_token_id=2, max_new_tokens=8, num_beams=3)
    ids, masks = batch["input_ids"], batch["attention_mask"]
    together = [best for best, *_ in decode_batch(lm.base, ids, masks, rule, Past(prefix))]
    alone = [decode_batch(lm.base, ids[n : n + 1], masks[n : n + 1], rule, Past(prefix))[0][0] for n in range(len(ids))]
    assert seen == [2, 1, 1, 1, 1, 1]
    assert [found.tokens for found in together] == [found.tokens for found in alone]
    assert [found.score for found in together] == pytest.approx([found.score for found in alone], abs=1e-5)
    assert len({round(found.score, 4) for found in together}) == 5


def test_positions_are_the_model_s_own_again_afterwards():
    lm = with_prefix(random_model("Bart")).eval()
    batch = make_batch()
    inputs = [batch[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")]
    with torch.no_grad():
        before = lm(*inputs)
        lm.loss(**batch)
        assert torch.equal(lm(*inputs), before)


def test_layouts_hold_every_text_once_and_never_cost_more():
    rng, length, width = random.Random(0), 200, 768

    def cost(rows, source, target):
        encoder = source * (7 * width + packing.SLOWNESS * (length + source))
        decoder = target * (7 * width + packing.SLOWNESS * (2 * length + source + target))
        return rows * (encoder + decoder)

    fewer = 0
    for _ in range(200):
        count = rng.randint(1, 20)
        sources, targets = ([rng.randint(1, most) for _ in range(count)] for most in (1024, rng.choice([60, 600])))
        rows = best_layout(sources, targets, width, length)
        assert sorted(text for row in rows for text in row) == list(range(count))
        padded = cost(count, max(sources), max(targets))
        assert cost(len(rows), width_of(sources, rows), width_of(targets, rows)) <= padded
        fewer += len(rows) < count
    assert fewer > 150
