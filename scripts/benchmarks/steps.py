"""Time and peak memory of one optimiser step, row by row (scripts/benchmark.py train-step, memory)."""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.models import ROWS, SETTINGS, Batch, check_equal_losses, make_batch
from prefixlib.compute.accumulation import OncePerStep
from prefixlib.runs import record
from prefixlib.system.errors import UserError

WARM_UP = 2


def now(device: str) -> float:
    """Seconds on a clock, after the device has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def make_step(args: argparse.Namespace, row: str, batches: Sequence[Batch]) -> tuple[Callable[[], float], float]:
    """A function that makes one optimiser step per batch and returns their seconds, and the loss before any step.

    A step processes its batch in --accumulate parts; this package runs the prefix network once for all of them, as in
    its trainers.
    """
    model, loss_of = ROWS[row](args)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)  # as in Trainer and this package, in every row
    ours = args.accumulate > 1 and row in ("prefix", "checkpointing")
    once = OncePerStep(model.prefix) if ours else None

    def step() -> float:
        started = now(args.device)
        for batch in batches:
            optimizer.zero_grad()
            for part in parts(batch, args.accumulate):
                (loss_of(part) / args.accumulate).backward()
            if once:
                once.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
        return now(args.device) - started

    with torch.no_grad():
        first_loss = loss_of(batches[0]).item()
    return step, first_loss


def parts(batch: Batch, count: int) -> list[Batch]:
    """The rows of a batch in `count` batches; the batch itself for 1."""
    split = {name: rows.chunk(count) for name, rows in batch.items()}
    return [dict(zip(split, part, strict=True)) for part in zip(*split.values(), strict=True)]


def take_turns(steps: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each row's seconds in every round; a machine's drift affects all rows of a round alike."""
    seconds: dict[str, list[float]] = {row: [] for row in steps}
    for _ in range(rounds):
        for row, step in steps.items():
            seconds[row].append(step())
    return seconds


def pairwise_ratio(first: Sequence[float], other: Sequence[float]) -> float:
    """The median over the rounds of first / other."""
    return statistics.median(a / b for a, b in zip(first, other, strict=True))


def timed(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict]:
    """Median seconds per row, and the first row's time divided by it."""
    first = next(iter(seconds.values()))
    return {
        row: {
            "seconds": statistics.median(times),
            "time_ratio": pairwise_ratio(first, times),
            "all_seconds": [round(value, 5) for value in times],
        }
        for row, times in seconds.items()
    }


def train_step(args: argparse.Namespace) -> dict[str, dict]:
    """One step on a batch without padding, all rows in turn."""
    batches = [make_batch(args)]
    table = in_turn(args, {row: batches for row in args.rows})
    for numbers in table.values():
        numbers["tokens_per_second"] = args.bsz * (args.source + args.tokens) / numbers["seconds"]
    return table


def in_turn(args: argparse.Namespace, batches: Mapping[str, Sequence[Batch]]) -> dict[str, dict]:
    """Each row trained on its batches for `rounds` rounds. Raises UserError if losses that must agree differ."""
    steps, losses = {}, {}
    for row, own in batches.items():
        steps[row], losses[row] = make_step(args, row, own)
    check_equal_losses(args, losses)
    take_turns(steps, WARM_UP)
    table = timed(take_turns(steps, args.rounds))
    for row, numbers in table.items():
        numbers["first_loss"] = losses[row]
    return table


def peak_of_three_steps(args: argparse.Namespace, row: str) -> dict[str, int]:
    """Peak memory of this process after and before three steps of `row`; call it where nothing else runs.

    Two steps if they accumulate: the optimiser's state exists from the second on.
    """
    before = record.peak_memory_bytes()["host"]
    step, _ = make_step(args, row, [make_batch(args)])
    for _ in range(3 if args.accumulate == 1 else 2):
        step()
    return {**record.peak_memory_bytes(), "libraries": before}


def peak_memory(module: str, row: str, settings: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of a fresh process that runs `row` alone: `host`, `libraries` (its part before the model); `gpu` on a GPU.

    module: python -m MODULE ROW SETTINGS prints them.
    """
    command = [sys.executable, "-m", module, row, json.dumps(settings, default=str)]
    scripts = Path(__file__).resolve().parents[1]
    result = subprocess.run(command, cwd=scripts, capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"measuring the memory of {row!r} failed: {(result.stderr.strip() or '?').splitlines()[-1]}")
    return json.loads(result.stdout.splitlines()[-1])


def memory(args: argparse.Namespace) -> dict[str, dict]:
    """Peak memory per row, and the first row's peak divided by it: whole, and without the libraries."""
    table, first = {}, None
    settings = {name: getattr(args, name) for name in ("shape", "device", "bf16", "accumulate", *SETTINGS)}
    for row in args.rows:
        found = peak_memory("benchmarks.steps", row, settings)
        whole = found["gpu"] if args.device == "cuda" else found["host"]
        own = whole if args.device == "cuda" else whole - found["libraries"]
        first = first or (whole, own)
        table[row] = {"peak_memory_bytes": whole, "memory_ratio": first[0] / whole}
        table[row] |= {"own_memory_bytes": own, "own_memory_ratio": first[1] / own}
    return table


if __name__ == "__main__":  # the process that `peak_memory` starts
    print(json.dumps(peak_of_three_steps(argparse.Namespace(**json.loads(sys.argv[2])), sys.argv[1])))
