"""What the launchers share: the demo's and the paper's settings, folder names, running the child (standard library)."""

import dataclasses
import itertools
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixlib.data.tasks import DEMO, find_task
from prefixlib.settings.config_file import expand
from prefixlib.settings.flags import RARE, USAGE, Flags, Parser, explicit_flags, flag, refuse_together
from prefixlib.settings.training import Training
from prefixlib.system import files, places
from prefixlib.system.errors import UserError
from prefixlib.system.places import DEMO_DATA

LAUNCHING = "launching"


@dataclass(frozen=True)
class Launch(Flags):
    """The launchers' own flags, which the child does not get."""

    notes: str | None = flag(None, "free text at the end of the output folder's name", LAUNCHING)
    dir_name: str | None = flag(None, "the output folder's name, instead of one made of the settings", RARE)
    long_names: bool = flag(
        False, "name the output folder as the original did: all of the settings one after the other", RARE
    )
    num_processes: int = flag(1, "processes on this machine, one per GPU", LAUNCHING)
    demo: bool = flag(False, "the bundled model and data, with settings that suit them", LAUNCHING)
    recipe: str | None = flag(
        None,
        "paper: the learning rate, epochs, batch and P of the paper for this task and tuning mode; other flags win",
        LAUNCHING,
        choices=("paper",),
    )


@dataclass(frozen=True)
class Parsed:
    """A launcher's command line."""

    settings: Any  # the tree's Settings
    launch: Launch
    given: frozenset[str]  # the settings that the command line, the demo or the recipe sets
    dry_run: bool


def make_parser(description: str, settings: type[Training]) -> Parser:
    """The launcher's flags: the child's and its own."""
    parser = Parser(description=description, usage=USAGE)
    settings.add_to(parser)
    Launch.add_to(parser)
    parser.add_argument("--dry_run", action="store_true", help="print the command line and stop")
    return parser


def parse(parser: Parser, argv: Sequence[str], settings: type[Training], tree: str, demo_mode: str) -> Parsed:
    """Parse, and fill in what --demo yes or --recipe paper sets; the command line wins over both.

    Raises UserError where they contradict other flags. The settings are not checked yet.
    """
    argv = expand(argv, parser)
    if "--demo=yes" in argv or ("--demo", "yes") in itertools.pairwise(argv):
        argv = ["--mode", demo_mode, *argv]  # a --mode of its own comes later and wins
    args, given = parser.parse_args(argv), explicit_flags(parser, argv)
    found, launch = settings.from_args(args), Launch.from_args(args)
    launch.check_values()
    filled: dict[str, Any] = {}
    if launch.demo:
        if launch.recipe:
            refuse_together("--demo yes", "--recipe", "the demo has settings of its own")
        for name in ("model_name_or_path", "data_dir", "train_file"):
            if name in given:
                refuse_together("--demo yes", f"--{name}", "the demo brings its own model and data")
        if places.missing_demo():
            raise UserError(f"--demo yes: {places.missing_demo()}")
        trains = getattr(found, "do_train", True)
        filled = demo_settings(tree, found.mode, found.tuning_mode if trains else None)
    elif launch.recipe:
        recipes = find_task(found.mode).paper.get(tree, {})
        if found.tuning_mode not in recipes:
            known = ", ".join(name for name in recipes if " " not in name) or "none for this task"
            raise UserError(
                f"--recipe paper: the paper has no settings for --mode {found.mode} with --tuning_mode "
                f"{found.tuning_mode} (it has: {known})"
            )
        filled = dict(recipes[found.tuning_mode])
    if found.init_shallow or getattr(found, "parametrize_emb", "MLP") == "Emb":
        filled.pop("mid_dim", None)  # there is no MLP
    filled = {name: value for name, value in filled.items() if name not in given}
    return Parsed(dataclasses.replace(found, **filled), launch, frozenset(given | filled.keys()), args.dry_run)


def demo_settings(tree: str, mode: str, tuning_mode: str | None) -> dict[str, Any]:
    """Settings for the bundled model and data, and for training there; None: a checkpoint is decoded."""
    folders = {
        "data_dir": str(DEMO_DATA),
        "model_name_or_path": str(DEMO_DATA / ("gpt2" if tree == "gpt2" else "bart")),
    }
    if tuning_mode is None:
        return folders
    epoch = find_task(mode).demo_epoch if tree == "gpt2" else None
    return {**DEMO[tree][tuning_mode], **({"epoch": epoch} if epoch else {}), **folders}


def check_launch(launch: Launch, bsz: int) -> None:
    """Raise UserError for a batch that the processes cannot share, or a name that would be several folders."""
    if launch.num_processes > 0 and bsz % launch.num_processes:
        raise UserError(f"--bsz {bsz} cannot be shared by --num_processes {launch.num_processes}: not a multiple")
    for name in ("notes", "dir_name"):
        value = getattr(launch, name)
        if value and ("/" in value or "\0" in value):
            raise UserError(f"--{name} {value!r}: becomes part of a folder's name, so it takes no '/'")
    if launch.dir_name in ("", ".", ".."):
        raise UserError(f"--dir_name {launch.dir_name!r}: names no new folder; choose a name")


def as_words(values: Mapping[str, object]) -> list[str]:
    """{"preseqlen": 5, "cache_dir": None} -> ["--preseqlen", "5"]: None is left out, "-" may start a value.

    The flag of a tuple is repeated for each of its parts.
    """
    words = []
    for name, value in values.items():
        for text in map(str, value if isinstance(value, tuple) else [] if value is None else [value]):
            words += [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]
    return words


def child_command(script: Path, arguments: list[str], num_processes: int = 1) -> list[str]:
    """The argument list that runs `script` with this Python: directly, or through torchrun with several processes."""
    if num_processes < 1:
        raise UserError(f"--num_processes {num_processes}: at least 1 process is needed")
    if num_processes == 1:
        return [sys.executable, str(script), *arguments]
    torchrun = ["-m", "prefixlib.system.processes", "--standalone", "--nproc_per_node", str(num_processes)]
    return [sys.executable, *torchrun, str(script), *arguments]


def run(command: list[str], *, dry_run: bool, save_to: Path | None = None) -> int:
    """Print `command` as a line that a shell would read back, keep it in `save_to`, and run it without a shell.

    On POSIX the child takes this process's place, so signals, Ctrl-C and the exit code are the child's own.
    """
    line = shlex.join(command)
    print(line, flush=True)
    if dry_run:
        return 0
    if save_to is not None:
        with files.lock(save_to.parent):  # a second run at the same time is refused here
            files.add_line(save_to, line)  # a refused command must not take an earlier one's place
    sys.stderr.flush()
    if os.name == "posix":
        os.execv(command[0], command)
    return subprocess.run(command).returncode
