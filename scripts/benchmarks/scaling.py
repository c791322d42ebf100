"""Curves of time and memory against the sizes that matter, as JSON and PNG (scripts/benchmark.py scaling).

By default on gpt2-mini, 4 layers of width 256, which a CPU measures in minutes; for BART there is bart-mini, 2 and 2.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.decode import decode
from benchmarks.limit import at_the_limit, product
from benchmarks.models import is_seq2seq
from benchmarks.plots import LIMIT, Panel, plot
from benchmarks.steps import memory, train_step
from prefixlib.system.errors import UserError
from prefixlib.system.places import REPOSITORY

ROWS = {"gpt2": ("prefix", "peft", "finetune"), "bart": ("prefix", "original-style", "finetune")}
SIZES = {
    "sentences": 16,
    "batch_size": 16,
    "max_new_tokens": 50,
}  # defaults: minutes on two CPU cores
PROCESS_STEPS, PROCESS_BSZ = 30, 64  # the demo's, in the sweep over processes


@dataclass(frozen=True)
class Sweep:
    """One size, its values, and the measurement at each."""

    setting: str
    axis: str
    values: tuple[int, ...]
    kind: str = "step"  # or "decode", "processes"


SWEEPS = {
    "prefix_length": Sweep("preseqlen", "prefix length P (positions)", (1, 5, 20, 100, 200, 500)),
    "source": Sweep("source", "source tokens per row S", (32, 64, 128, 256, 512)),  # BART's
    "tokens": Sweep("tokens", "tokens per row T (BART: of the target)", (20, 40, 80, 160, 320)),
    "batch": Sweep("bsz", "training batch B (rows)", (1, 2, 4, 8, 16)),
    "decode_batch": Sweep("batch_size", "decoding batch (sentences)", (1, 2, 4, 8, 16), "decode"),
    "beams": Sweep("beams", "beams", (1, 2, 5, 8), "decode"),
    "processes": Sweep("num_processes", "training processes, one thread each", (1, 2), "processes"),
}


def thin(values: Sequence[int], most: int | None) -> list[int]:
    """At most `most` of the values, first and last among them."""
    if most is None or most >= len(values):
        return list(values)
    if most < 2:
        return [values[0]]
    return [values[round(n * (len(values) - 1) / (most - 1))] for n in range(most)]


def at_step(args: argparse.Namespace) -> dict[str, dict]:
    """Step time, and unless --no_memory peak memory, per row."""
    times, peaks = train_step(args), {} if args.no_memory else memory(args)
    table = {row: {"step time, s": times[row]["seconds"], "time ratio": times[row]["time_ratio"]} for row in args.rows}
    for row, peak in peaks.items():
        table[row]["peak memory without libraries, MiB"] = peak["own_memory_bytes"] / 2**20
    return table


def at_decode(args: argparse.Namespace) -> dict[str, dict]:
    """Sentences per second, per row."""
    return {
        row: {"sentences/s": numbers["sentences_per_second"], "speed ratio": numbers["speed_ratio"]}
        for row, numbers in decode(args).items()
    }


def at_processes(args: argparse.Namespace) -> dict[str, dict]:
    """Tokens per second of the demo's training, through the launcher; the global batch stays the same."""
    with tempfile.TemporaryDirectory() as folder:
        name = "seq2seq/train_bart.py" if is_seq2seq(args) else "gpt2/train_e2e.py"
        script, output = REPOSITORY / name, Path(folder) / "run"
        flags = {
            "demo": "yes",
            "bsz": PROCESS_BSZ,
            "max_steps": PROCESS_STEPS,
            "disable_tqdm": "yes",
        }
        flags |= {} if is_seq2seq(args) else {"skip_decode": "yes"}
        flags |= {"num_processes": args.num_processes, "logging_steps": PROCESS_STEPS, "eval_steps": 10**6}
        flags |= {"save_steps": 10**6, "output_dir": output}
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        child = subprocess.run(
            [sys.executable, str(script), *words],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}),
        )
        if child.returncode:
            raise UserError(f"training with {args.num_processes} processes failed: {child.stderr.splitlines()[-1]}")
    logged = re.findall(r"tokens/s ([\d,]+)", child.stderr)  # from the training's start to its last step
    return {"prefix": {"tokens/s": int(logged[-1].replace(",", ""))}}


MEASURES = {"step": at_step, "decode": at_decode, "processes": at_processes}
LIMITED = {"step": "step time, s", "decode": "sentences/s"}  # kind of sweep -> the quantity that has a limit
# measured quantity -> the panel's title
RATIOS = {"time ratio": "time: prefix / row (below 1: prefix faster)", "speed ratio": "sentences/s: prefix / row"}


def scaling(args: argparse.Namespace) -> dict[str, dict]:
    """Every sweep's points; writes a PNG per sweep beside the JSON."""
    there = [name for name in SWEEPS if is_seq2seq(args) or name != "source"]
    names = args.sweeps.split(",") if args.sweeps else there
    if not set(names) <= set(there):
        raise UserError(f"--sweeps {args.sweeps}: for {args.shape} choose from {', '.join(there)}")
    tree = ROWS["bart" if is_seq2seq(args) else "gpt2"]
    results, rates = {}, []
    for name in names:
        sweep, points, settings = SWEEPS[name], {}, {}
        for value in thin(sweep.values, args.points):
            if sweep.kind == "processes" and args.device == "cuda" and value > torch.cuda.device_count():
                print(f"{name} {value}: left out, a GPU for each is needed", file=sys.stderr)
                continue
            rows = [row for row in tree if row in args.rows]
            changed = {"rows": rows, "alone": 0, sweep.setting: value}
            settings[value] = argparse.Namespace(**{**vars(args), **changed})
            points[value] = MEASURES[sweep.kind](settings[value])
            print(f"{name} {value}: {points[value]}", file=sys.stderr)
            rates.append(product(args.device, torch.bfloat16 if args.bf16 else torch.float32))
        for value, table in points.items() if sweep.kind in LIMITED else ():
            # at the best rate of all measurements: a shared machine is slow at times
            table[LIMIT] = {LIMITED[sweep.kind]: at_the_limit(settings[value], sweep.kind, max(rates))}
        results[name] = {"axis": sweep.axis, "points": points}
        plot(Path(f"{args.plots}_{name}.png"), panels(points), sweep.axis, title(args, sweep))
    return results


def panels(points: dict[int, dict[str, dict]]) -> list[Panel]:
    """One panel per quantity, each with a curve per row; a ratio's panel leaves out the prefix's own, which is 1."""
    found: dict[str, Panel] = {}
    for value, table in points.items():
        for row, numbers in table.items():
            for kind, number in numbers.items():
                if kind in RATIOS and row == "prefix":
                    continue
                panel = found.setdefault(kind, Panel(RATIOS.get(kind, kind), {}, is_ratio=kind in RATIOS))
                panel.curves.setdefault(row, []).append((value, number))
    return list(found.values())


def title(args: argparse.Namespace, sweep: Sweep) -> str:
    fixed = {
        "step": {"B": args.bsz, "S": args.source, "T": args.tokens, "P": args.preseqlen},
        "decode": {"batch": args.batch_size, "beams": args.beams, "P": args.preseqlen},
        "processes": {},
    }[sweep.kind]
    swept = {"bsz": "B", "source": "S", "tokens": "T", "preseqlen": "P", "batch_size": "batch", "beams": "beams"}.get(
        sweep.setting
    )
    what = {"step": "training step", "decode": "decoding", "processes": f"demo training, batch of {PROCESS_BSZ}"}[
        sweep.kind
    ]
    sizes = ", ".join(f"{name} {value}" for name, value in fixed.items() if name != swept and value)
    shape = "" if sweep.kind == "processes" else f"{args.shape}, "
    return f"{shape}{what}, {args.device}" + (f", {sizes}" if sizes else "")
