"""The operation counts of scripts/benchmarks/operations.py beside torch's own counter, on models of two layers."""

import argparse
import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import benchmark
from benchmarks import decode, models
from benchmarks.operations import Sizes, decoding, training_step
from prefixlib.compute import onednn
from prefixlib.compute.head import Head

STEPS = {  # shape -> sizes of the step
    "gpt2-tiny": {"bsz": 3, "tokens": 12, "preseqlen": 5, "mid_dim": 7},
    "llama-tiny": {"bsz": 2, "tokens": 9, "preseqlen": 4, "mid_dim": 11},
    "bart-tiny": {"bsz": 2, "source": 13, "tokens": 6, "preseqlen": 5, "mid_dim": 7},
}


@pytest.fixture(autouse=True)
def torchs_own_products(monkeypatch):
    """The counter knows no product of oneDNN's; the operations are the same."""
    monkeypatch.setattr(onednn, "is_faster", lambda: False)


def count(run):
    """Operations of `run` by kind of product; sdpa in plain products, since the counter has no entry for the CPU's."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops(), {str(kind): n for kind, n in counter.get_flop_counts()["Global"].items()}


def count_decoding(args, work, members):
    """The same of a decoding, without the look at the model's head that it begins with."""
    run = decode.our_decoder(args, work)
    with torch.no_grad():
        begin = count(lambda: Head(decode.sharpen(models.make_base(args))))[1]
        found = count(lambda: run(members))[1]
    return {kind: n - begin.get(kind, 0) for kind, n in found.items()}


def arguments(what, shape, **sizes):
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    return benchmark.parse_args([what, "--shape", shape, "--device", "cpu", "--vs", "", *words])


@pytest.mark.parametrize("shape", STEPS)
def test_a_training_step_takes_the_operations_that_are_counted(shape):
    args = arguments("train-step", shape, **STEPS[shape])
    model, loss_of = models.prefix_row(args)
    batch = models.make_batch(args)
    labels = batch["labels"]
    scored = int((labels[:, 1:] if not args.source else labels).ne(-100).sum())
    counted = training_step(
        Sizes.of(model.base),
        targets=[args.tokens] * args.bsz,
        scored=scored,
        prefix=args.preseqlen,
        mid_dim=args.mid_dim,
        sources=[args.source] * args.bsz if args.source else (),
    )
    assert count(lambda: loss_of(batch).backward())[0] == sum(counted.values())
    assert min(counted.values()) > 0


@pytest.mark.parametrize("shape", ["gpt2-tiny", "llama-tiny", "bart-tiny"])
def test_greedy_decoding_takes_the_operations_that_are_counted(shape):
    args = arguments("decode", shape, preseqlen=5, mid_dim=7, beams=1)
    work = decode.Work([list(range(4, 13))], [6])
    args.max_new_tokens = 12
    found = count_decoding(args, work, [0])
    sizes = Sizes.of(models.make_base(args))
    assert sum(found.values()) == sum(decoding(sizes, [9], [6], beams=1, prefix=5).values())


def test_beams_share_prompt_and_prefix():
    """Matrices and head exactly; in attention the beams' row holds other beams' tokens too, which none needs."""
    args = arguments("decode", "gpt2-tiny", preseqlen=5, mid_dim=7, beams=3)
    work = decode.Work([list(range(4, 13)), list(range(5, 14))], [6, 6])
    args.max_new_tokens = 12
    kinds = count_decoding(args, work, [0, 1])
    counted = decoding(Sizes.of(models.make_base(args)), [9, 9], [6, 6], beams=3, prefix=5)
    products = kinds.pop("aten.bmm")
    assert sum(kinds.values()) == counted["matrices"] + counted["head"]
    assert counted["attention"] < products < 2.5 * counted["attention"]


def test_padding_is_not_counted():
    """Two texts of other lengths take what each takes alone, but for the prefix network, which runs once."""
    sizes = Sizes.of(models.make_base(argparse.Namespace(shape="bart-tiny", device="cpu", bf16=False)))
    alone = [training_step(sizes, [t], t, prefix=4, mid_dim=3, sources=[s]) for s, t in ((20, 5), (9, 7))]
    both = training_step(sizes, [5, 7], 12, prefix=4, mid_dim=3, sources=[20, 9])
    networks = both.pop("prefix networks")
    assert [one.pop("prefix networks") for one in alone] == [networks, networks]
    assert both == {part: sum(one[part] for one in alone) for part in both}
    assert dataclasses.replace(sizes, encoder_layers=0).all_weights == sizes.weights + sizes.head
