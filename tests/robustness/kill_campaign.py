"""Kill a training with SIGKILL at random places, resume it, and hold everything it leaves to the unbroken run.

python -m tests.robustness.kill_campaign --kills 20 --seed 1 --folder /tmp/kills
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's library is imported: it is read only then
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

from gpt2 import run_language_modeling
from gpt2.trainer_prefix import PrefixTrainer
from prefixlib.checkpoints import checkpoint
from seq2seq import decoding, finetune
from tests.seq2seq_tiny import make_bart, make_summaries, training_flags

DEMO = Path(__file__).resolve().parents[2] / "data" / "demo"
# Where a run can be killed: before and after each call of these.
PLACES = (
    *((os, name) for name in ("replace", "fsync", "unlink", "rmdir", "mkdir")),
    *((torch, "save"), (checkpoint, "save_file"), (torch.optim.AdamW, "step")),
    *((PrefixTrainer, "prediction_step"), (decoding, "decode_batch")),
)
# What of results.json may differ: how long it took, the memory, and where it is.
FREE = {"seconds", "peak_memory_bytes", "command"}


@dataclass(frozen=True)
class Case:
    """A training to be killed: the tree and the flags that say when it logs, validates, saves and ends."""

    tree: str
    flags: dict[str, object] = field(default_factory=dict)


CASES = {
    # each writes its checkpoints, its log lines and its validations at different steps
    "gpt2, epochs": Case("gpt2", {"epoch": 2, "save_steps": 2, "logging_steps": 3, "dropout": 0.2}),
    "gpt2, steps": Case("gpt2", {"max_steps": 7, "save_steps": 3, "logging_steps": 2, "eval_steps": 2}),
    "bart, epochs": Case("seq2seq", {"save_steps": 2, "logging_steps": 4, "dropout": 0.2}),
    "bart, steps": Case("seq2seq", {"max_steps": 9, "save_steps": 1, "logging_steps": 4, "eval_steps": 2}),
    "bart, accumulated": Case(
        "seq2seq", {"gradient_accumulation_steps": 2, "save_steps": 1, "logging_steps": 2, "eval_steps": 1}
    ),
}


def prepare(folder: Path) -> Path:
    """Tiny models and data for both trees."""
    make_bart(folder / "bart")
    make_summaries(folder / "summaries", train=20)
    for split, count in (("train", 16), ("valid", 4), ("test", 4)):
        lines = (DEMO / "e2e_data" / f"src1_{split}.txt").read_text().splitlines(keepends=True)[:count]
        (folder / "e2e_data").mkdir(exist_ok=True)
        (folder / "e2e_data" / f"src1_{split}.txt").write_text("".join(lines))
    return folder


def train(folder: Path, case: Case, output: Path, resume: bool) -> None:
    """Train and decode, as the two entries do."""
    more = {**case.flags, "disable_tqdm": "yes", **({"resume": "yes"} if resume else {})}
    if case.tree == "gpt2":
        flags = {
            **{"mode": "data2text", "model_name_or_path": DEMO / "gpt2", "data_dir": folder, "output_dir": output},
            **{"preseqlen": 3, "mid_dim": 8, "bsz": 4, "learning_rate": 0.01, "keep_best": "yes", **more},
        }
        run_language_modeling.main([f"--{name}={value}" for name, value in flags.items()])
        return
    finetune.main(training_flags(folder / "bart", folder / "summaries", output, val_metric="loss", **more))
    decode = ("mode", "model_name_or_path", "data_dir", "max_length", "min_length", "disable_tqdm")
    words = training_flags(folder / "bart", folder / "summaries", output)
    words = [word for word in words if word[2:].split("=")[0] in decode]
    finetune.main([*words, "--do_train=no", f"--prefix_model_path={output}", f"--output_dir={output}"])


def watch(kill_at: int | None, places: list[str]) -> None:
    """Count the calls of PLACES in this process into `places`; kill it at the one of this number."""

    def passes(name: str, arguments: tuple) -> None:
        path = arguments[-1] if arguments and isinstance(arguments[-1], str | Path) else ""
        places.append(f"{name} {Path(path).name}".rstrip())
        if len(places) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(owner, name: str) -> Callable:
        work = getattr(owner, name)

        def call(*arguments, **named):
            passes(f"before {name}", arguments)
            result = work(*arguments, **named)
            passes(f"after {name}", arguments)
            return result

        return call

    for owner, name in PLACES:
        setattr(owner, name, wrap(owner, name))


def start(folder: Path, case: Case, output: Path, *, resume: bool = False, kill_at: int | None = None) -> int:
    """Run in a process of its own, its output going beside `output`; returns its exit code, -9 where it was killed."""

    def work():
        with open(output.with_name(f"{output.name}.log"), "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            torch.set_num_threads(1)
            places: list[str] = []
            watch(kill_at, places)
            train(folder, case, output, resume)
        output.with_name(f"{output.name}.places").write_text("\n".join(places))

    output.parent.mkdir(parents=True, exist_ok=True)
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    return process.exitcode


def left_by(output: Path) -> dict[str, object]:
    """What a run left, by name: bytes of its files, results without times, the curves of its loop."""
    left: dict[str, object] = {}
    for path in sorted(path for path in output.rglob("*") if path.is_file()):
        name = str(path.relative_to(output))
        if path.name == "results.json":
            results = json.loads(path.read_text())
            left |= {
                f"{name}: {part}": _without_times(results[part]) for part in ("training", "decoding") if part in results
            }
        elif path.name == "prefix_config.json":
            left[name] = {**json.loads(path.read_text()), "versions": None}  # a commit may come in between
        elif path.name == "trainer_state.json":
            rows = json.loads(path.read_text())["log_history"]
            left[name] = [{k: v for k, v in row.items() if "runtime" not in k and "second" not in k} for row in rows]
        elif "tfevents" not in name and path.suffix not in (".pt", ".pth", ".ckpt", ".png"):
            left[name] = path.read_bytes()
        elif "tfevents" not in name:
            left[name] = None  # that it is there: its bytes hold times
    return left


def _without_times(value: object) -> object:
    if isinstance(value, dict):
        return {name: _without_times(entry) for name, entry in value.items() if name not in FREE}
    return value


def differences(one: dict[str, object], other: dict[str, object]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name, "") != other.get(name, ""))


@dataclass(frozen=True)
class Whole:
    """An unbroken run: what it left, and the places that it passed."""

    folder: Path
    name: str
    left: dict[str, object]
    places: list[str]

    @classmethod
    def run(cls, folder: Path, name: str) -> "Whole":
        output = folder / name.replace(", ", "-") / "whole" / "run"  # of the same name: output files have it in theirs
        assert start(folder, CASES[name], output) == 0, output.with_name("run.log").read_text()
        return cls(folder, name, left_by(output), output.with_name("run.places").read_text().split("\n"))

    def killed_at(self, *numbers: int) -> tuple[int, str]:
        """Kill a run at the first place, each resumed one at the next; resume it to its end.

        Returns how often it was killed, and what differs in the end.
        """
        output = self.folder / self.name.replace(", ", "-") / "-".join(map(str, numbers)) / "run"
        codes = []
        for number in (*numbers, None):
            codes.append(start(self.folder, CASES[self.name], output, resume=bool(codes), kill_at=number))
        killed, found = codes.count(-signal.SIGKILL), differences(self.left, left_by(output))
        if codes[-1] == 0 and not found:
            return killed, ""
        return killed, f"killed at {numbers} ({self.places[numbers[0] - 1]}): exits {codes}, other {', '.join(found)}"

    def place(self, name: str, which: int = 0) -> int:
        """The number of a place by its name, the first one or that of index `which`."""
        return [number for number, found in enumerate(self.places, start=1) if found == name][which]


def campaign(folder: Path, name: str, kills: int, seed: int) -> tuple[int, list[str]]:
    """Kill `kills` runs of CASES[name] (0: one at every place); returns how often one was killed, and what differed.

    Every third run is killed a second time while it is resumed.
    """
    whole, generator = Whole.run(folder, name), random.Random(f"{seed} {name}")
    numbers = range(1, len(whole.places) + 1)
    found = []
    for number in generator.sample(numbers, kills) if kills else numbers:
        again = [generator.choice(numbers)] if number % 3 == 0 else []
        found.append(whole.killed_at(number, *again))
    return sum(killed for killed, _ in found), [problem for _, problem in found if problem]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="runs to kill of each kind (0: one at every place)")
    parser.add_argument("--seed", type=int, default=1, help="chooses the places")
    parser.add_argument("--folder", type=Path, required=True, help="where the runs go; must not exist")
    parser.add_argument("--only", choices=CASES, help="one kind of run")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True)
    prepare(args.folder)
    total, wrong = 0, 0
    for name in [args.only] if args.only else CASES:
        killed, problems = campaign(args.folder, name, args.kills, args.seed)
        total, wrong = total + killed, wrong + len(problems)
        print(f"{name}: killed {killed} times, {len(problems)} runs differ", *problems, sep="\n  ", flush=True)
    print(f"{total} kills, {wrong} runs that differ from the unbroken one")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
