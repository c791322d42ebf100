"""A user's waiting times in seconds (scripts/benchmark.py startup, scores).

startup: a launcher's --help, the first training step of the demo, and the first output of a decoding, from the launch.
scores: scripts/score.py on WebNLG's whole test set, on one core.
"""

import argparse
import contextlib
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.models import make_base
from gpt2 import run_language_modeling
from gpt2.flags import Settings
from prefixlib.system.errors import UserError
from prefixlib.system.places import DEMO_DATA, REPOSITORY

HELP = ("gpt2/train_e2e.py", "seq2seq/train_bart.py", "gpt2/gen.py")
FIRST_STEP = ("gpt2/train_e2e.py", "seq2seq/train_bart.py")
ONE_STEP = ("--demo", "yes", "--max_steps", "1", "--logging_steps", "1")
DECODE = ("gpt2/gen.py", "webnlg", "yes", "valid")
ONE_OUTPUT = ("no", "--demo", "yes", "--decode_limit", "1", "--max_new_tokens", "10")
STEP_DONE, DECODED = "step 1/", "1 texts in"  # text in the log at these moments
METRICS = ("BLEU", "METEOR", "TER")
SYSTEM = Path("scoring/webnlg/systems/Baseline_all-cat.txt")  # outputs, in the folder PREFIX_TUNING_DATA


def process_seconds(script: str, *words: str) -> float:
    """Whole-process seconds of a script."""
    started = time.perf_counter()
    child = subprocess.run([sys.executable, str(REPOSITORY / script), *words], capture_output=True, text=True)
    if child.returncode:
        raise UserError(f"{script} failed: {(child.stderr.splitlines() or ['nothing said'])[-1].strip()}")
    return time.perf_counter() - started


def seconds_until(said: str, script: str, *words: str) -> float:
    """Seconds from the start of a script until its log contains `said`; the run is then stopped."""
    started = time.perf_counter()
    command = [sys.executable, str(REPOSITORY / script), *words]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        for line in child.stderr:
            lines.append(line)
            if said in line:
                return time.perf_counter() - started
    finally:
        child.kill()
        child.communicate()
    raise UserError(f"{script} never said {said!r}: {(lines or ['nothing said'])[-1].strip()}")


def first_step_seconds(script: str) -> float:
    """Seconds from the start of the launcher to its first step's log line."""
    with tempfile.TemporaryDirectory() as folder:
        return seconds_until(STEP_DONE, script, *ONE_STEP, "--output_dir", str(Path(folder) / "run"))


def make_checkpoint(args: argparse.Namespace, folder: Path) -> Path:
    """A prefix of one step, beside its random base model of --shape with the demo's tokenizer."""
    base, run = folder / "base", folder / "run"
    make_base(args).save_pretrained(base)
    AutoTokenizer.from_pretrained(DEMO_DATA / "gpt2").save_pretrained(base)
    where = {"model_name_or_path": str(base), "data_dir": str(DEMO_DATA), "output_dir": str(run)}
    brief = {"bsz": 2, "max_steps": 1, "skip_decode": True, "disable_tqdm": True, "eval_steps": 10**6}
    with contextlib.redirect_stdout(io.StringIO()):
        run_language_modeling.train(Settings(mode="webnlg", **where, **brief))
    return run


def startup(args: argparse.Namespace) -> dict[str, dict]:
    """Medians; the scripts take turns."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = str(make_checkpoint(args, Path(folder)))
        tasks = {f"{script} --help": (process_seconds, script, "--help") for script in HELP}
        tasks |= {f"{script}, first step": (first_step_seconds, script) for script in FIRST_STEP}
        tasks[f"{DECODE[0]}, first output"] = (seconds_until, DECODED, *DECODE, checkpoint, *ONE_OUTPUT)
        return in_turn(tasks, args.rounds)


def in_turn(tasks: dict[str, tuple], rounds: int) -> dict[str, dict]:
    """Median seconds of each task, a function with its arguments."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, (measure, *given) in tasks.items():
            seconds[name].append(measure(*given))
    return {
        name: {"seconds": statistics.median(times), "all_seconds": [round(value, 3) for value in times]}
        for name, times in seconds.items()
    }


def scores(args: argparse.Namespace) -> dict[str, dict]:
    """Seconds of scoring one system's outputs with each metric and with all, the processes held to one core."""
    folder = Path(os.environ.get("PREFIX_TUNING_DATA", REPOSITORY / "data"))
    outputs = folder / SYSTEM
    names: list[Sequence[str]] = [METRICS, *((metric,) for metric in METRICS)]
    if not outputs.is_file():
        print(f"scores: not run, there is no {outputs}", file=sys.stderr)
        return {" + ".join(wanted): {"not_run": f"no {SYSTEM}"} for wanted in names}
    words = ("webnlg", "--hypotheses", str(outputs), "--split", "test", "--data_dir", str(folder), "--metrics")
    tasks = {" + ".join(wanted): (process_seconds, "scripts/score.py", *words, *wanted) for wanted in names}
    with one_core():
        return in_turn(tasks, args.rounds)


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """While open, processes started here run on one core, where the system can do that."""
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    if before:
        os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        if before:
            os.sched_setaffinity(0, before)
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads
