"""This package's speed as a share of the machine's limit (scripts/benchmark.py limit).

The limit is measured in the same rounds as the rows: products of large matrices, by torch's own product and through
oneDNN (prefixlib/compute/onednn.py), whichever is faster, and a matrix read from memory once.
A row's share is its operations (benchmarks/operations.py), divided by its time and by the rate of the products.
Decoding one sentence at a time is bound by memory instead: a second share counts the bytes of all matrices, read once
a step.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from benchmarks import decode, epoch, models, steps
from benchmarks.lengths import draw, load_lengths
from benchmarks.operations import Sizes, decoding, training_step
from prefixlib.compute import onednn

MATRIX = {"cpu": 2048, "cuda": 8192}  # width of the multiplied matrices
READ = 256 * 2**20  # bytes of the matrix that is read, many times the caches
REPEATS = 3  # of each measurement of the machine in a round
PRODUCT = "{} matrix product"
MEMORY = "memory, read"


@dataclass(frozen=True)
class Row:
    """A measured piece of work: a shape, "step" or "decode", and the sizes that differ from its tree's usual ones."""

    shape: str
    work: str
    sizes: dict[str, Any]
    real_lengths: bool = False  # the texts of a batch differ in length, and are padded


ROWS = {
    "gpt2-small step, B 5, T 80, P 5": Row("gpt2-small", "step", {}),
    "llama-135m step, B 10, T 57 (E2E's mean), P 5": Row("llama-135m", "step", {"bsz": 10, "tokens": 57}),
    "bart-base step, B 5, XSum's lengths, P 200": Row("bart-base", "step", {}, real_lengths=True),
    "gpt2-small decode, 5 beams": Row("gpt2-small", "decode", {}),
    "gpt2-small decode, greedy, one at a time": Row(
        "gpt2-small", "decode", {"beams": 1, "batch_size": 1, "sentences": 4}
    ),
}


def limit(args: argparse.Namespace) -> dict[str, dict]:
    """The machine's rates, then seconds, operations and shares of every row; all take turns."""
    work = {name: prepare(args, row) for name, row in ROWS.items()}
    for run, _ in work.values():
        run(True)  # warm-up
    rates: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(args.rounds):
        for name, rate in machine(args.device).items():
            rates.setdefault(name, []).append(rate)
        for name, (run, _) in work.items():
            started = steps.now(args.device)
            run(False)
            seconds[name].append(steps.now(args.device) - started)
    table: dict[str, dict] = {
        name: {"bytes_per_second" if name == MEMORY else "operations_per_second": statistics.median(values)}
        for name, values in rates.items()
    }
    rate = rates[PRODUCT.format("bfloat16" if args.bf16 else "float32")]
    for name, (_, numbers) in work.items():
        times = seconds[name]
        table[name] = {"seconds": statistics.median(times), **numbers}
        table[name]["share"] = share(numbers["operations"], times, rate)
        if "bytes" in numbers:
            table[name]["memory_share"] = share(numbers["bytes"], times, rates[MEMORY])
        table[name]["all_seconds"] = [round(value, 4) for value in times]
    return table


def share(amount: float, seconds: list[float], rates: list[float]) -> float:
    """The median over the rounds of amount / seconds / rate."""
    return statistics.median(amount / time / rate for time, rate in zip(seconds, rates, strict=True))


def machine(device: str) -> dict[str, float]:
    """Operations per second of a matrix product in both precisions, and bytes per second of reading memory."""
    found = {PRODUCT.format(name): product(device, getattr(torch, name)) for name in ("float32", "bfloat16")}
    matrix = torch.ones(READ // 4 // MATRIX[device], MATRIX[device], device=device)
    vector = torch.ones(MATRIX[device], device=device)
    ways = (lambda: matrix @ vector), (lambda: onednn.linear(vector.unsqueeze(0), matrix))
    return {**found, MEMORY: READ / min(_median_seconds(device, way) for way in ways)}


def product(device: str, dtype: torch.dtype) -> float:
    """Operations per second of a product of two large matrices, by the faster of torch's two libraries."""
    square = torch.ones(MATRIX[device], MATRIX[device], device=device, dtype=dtype)
    ways = (lambda: linear(square, square)), (lambda: onednn.linear(square, square))
    return 2 * MATRIX[device] ** 3 / min(_median_seconds(device, way) for way in ways)


def _median_seconds(device: str, run: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPEATS + 1):
        started = steps.now(device)
        run()
        times.append(steps.now(device) - started)
    return statistics.median(times[1:])


Prepared = tuple[Callable[[bool], Any], dict[str, Any]]


def prepare(args: argparse.Namespace, row: Row) -> Prepared:
    """A row's function (True: only warm up), its operations, and for decoding the bytes that its steps read."""
    shape = f"{row.shape.split('-')[0]}-tiny" if args.tiny else row.shape
    given = {name: value for name in (*models.SETTINGS, *decode.SETTINGS) if (value := getattr(args, name)) is not None}
    own = argparse.Namespace(**{**vars(args), "shape": shape, **row.sizes, **given})
    models.fill_defaults(own)
    decode.fill_defaults(own)
    sizes = Sizes.of(models.make_base(argparse.Namespace(**{**vars(own), "device": "meta"})))
    return (_decode if row.work == "decode" else _step)(own, sizes, row.real_lengths)


def at_the_limit(args: argparse.Namespace, work: str, rate: float) -> float:
    """The limit of a "step" (seconds) or a "decode" (sentences per second) at `rate` operations per second."""
    sizes = Sizes.of(models.make_base(argparse.Namespace(**{**vars(args), "device": "meta"})))
    if work == "step":
        return sum(_operations_of_step(args, sizes).values()) / rate
    texts = decode.make_work(args)
    return len(texts.prompts) * rate / sum(_operations_of_decoding(args, sizes, texts).values())


def _operations_of_decoding(args: argparse.Namespace, sizes: Sizes, work: decode.Work) -> dict[str, int]:
    return decoding(sizes, list(map(len, work.prompts)), work.ends, args.beams, args.preseqlen)


def _operations_of_step(args: argparse.Namespace, sizes: Sizes) -> dict[str, int]:
    """Operations for a batch without padding, as `models.make_batch` makes it."""
    seq2seq = models.is_seq2seq(args)
    scored = args.bsz * (args.tokens if seq2seq else args.tokens - args.tokens // 2)
    sources = [args.source] * args.bsz if seq2seq else ()
    return training_step(sizes, [args.tokens] * args.bsz, scored, args.preseqlen, args.mid_dim, sources)


def _step(args: argparse.Namespace, sizes: Sizes, real_lengths: bool) -> Prepared:
    sources, targets = [args.source] * args.bsz, [args.tokens] * args.bsz
    batch = models.make_batch(args)
    if real_lengths:
        pairs = draw(load_lengths(args, "xsum_train"), args.bsz, args.seed)
        sources, targets = (list(side) for side in zip(*pairs, strict=True))
        batch = epoch.padded(args, pairs, list(range(args.bsz)))
    seq2seq = models.is_seq2seq(args)
    scored = sum(targets) if seq2seq else int(batch["labels"][:, 1:].ne(-100).sum())
    counted = training_step(sizes, targets, scored, args.preseqlen, args.mid_dim, sources if seq2seq else ())
    step, _ = steps.make_step(args, "prefix", [batch])
    return lambda _: step(), {"operations": sum(counted.values()), "operations_by_part": counted}


def _decode(args: argparse.Namespace, sizes: Sizes, _: bool) -> Prepared:
    work = decode.make_work(args)
    run, everyone = decode.our_decoder(args, work), list(range(len(work.prompts)))
    counted = _operations_of_decoding(args, sizes, work)
    forwards = sum(1 + max(work.ends[n] for n in group) for group in decode.batches(everyone, args.batch_size))
    read = forwards * sizes.all_weights * (2 if args.bf16 else 4)
    return lambda warm_up: run(everyone[-1:] if warm_up else everyone), {
        "operations": sum(counted.values()),
        "operations_by_part": counted,
        "bytes": read,
        "tokens": sum(work.ends),
    }
