"""Seconds of a launcher's --help, and to the first training step of the demo model (scripts/benchmark.py startup)."""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from prefixlib.errors import UserError
from prefixlib.launch import REPOSITORY

HELP = ("gpt2/train_e2e.py", "seq2seq/train_bart.py", "gpt2/gen.py")
FIRST_STEP = ("gpt2/train_e2e.py", "seq2seq/train_bart.py")
ONE_STEP = ("--demo", "yes", "--max_steps", "1", "--logging_steps", "1")
SAID = "step 1/"  # what both trees' log lines hold once the first step is done


def help_seconds(script: str) -> float:
    """Whole-process seconds of SCRIPT --help."""
    started = time.perf_counter()
    subprocess.run([sys.executable, str(REPOSITORY / script), "--help"], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def first_step_seconds(script: str) -> float:
    """Seconds from the start of the launcher to its first step's log line; the run is then stopped."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(REPOSITORY / script), *ONE_STEP, "--output_dir", str(Path(folder) / "run")]
        started = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            lines = []
            for line in child.stderr:
                lines.append(line)
                if SAID in line:
                    return time.perf_counter() - started
        finally:
            child.kill()
            child.communicate()
    raise UserError(f"{script} took no first step: {(lines or ['nothing said'])[-1].strip()}")


def startup(args: argparse.Namespace) -> dict[str, dict]:
    """Medians; the scripts take turns."""
    tasks = {f"{script} --help": (help_seconds, script) for script in HELP}
    tasks |= {f"{script}, first step": (first_step_seconds, script) for script in FIRST_STEP}
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(args.rounds):
        for name, (measure, script) in tasks.items():
            seconds[name].append(measure(script))
    return {
        name: {"seconds": statistics.median(times), "all_seconds": [round(value, 3) for value in times]}
        for name, times in seconds.items()
    }
