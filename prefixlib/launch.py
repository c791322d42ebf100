"""What the launchers share: yes/no flags, contradicting flags, running the child (standard library only)."""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

from prefixlib.errors import UserError

# Flags that one tuning mode alone heeds: its checkpoints say them, and a resumed run must repeat them.
TUNING_SETTINGS = {
    "finetune-top": ("top_layers", "top_embeddings"),
    "adaptertune": ("adapter_design", "adapter_bottleneck"),
}
REPOSITORY = Path(__file__).resolve().parent.parent
DEMO_DATA = REPOSITORY / "data" / "demo"


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose mistakes are one line with exit code 2, and which accepts no shortened flags."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message: str):
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def add_yes_no(group, flag: str, default: str, help: str) -> None:
    """Add a flag that takes `yes` or `no` (the original's spelling of a switch)."""
    group.add_argument(flag, choices=("yes", "no"), default=default, help=help)


def add_tuning_flags(group) -> None:
    """Add the flags of finetune-top and adaptertune, which both trees take."""
    group.add_argument(
        "--top_layers", type=int, default=1, help="finetune-top: how many of the (decoder's) last layers are trained"
    )
    add_yes_no(group, "--top_embeddings", "yes", "finetune-top: train the word embeddings (tied to the head) too")
    group.add_argument(
        "--adapter_design",
        type=int,
        default=1,
        choices=(1, 2),
        help="adaptertune: 1 one adapter per layer, with a LayerNorm; 2 one after each attention and after the MLP",
    )
    group.add_argument("--adapter_bottleneck", type=int, default=100, help="adaptertune: width inside an adapter")


def tuning_settings(args: argparse.Namespace) -> dict[str, object]:
    """The settings that this run's tuning mode alone heeds."""
    return {name: getattr(args, name) for name in TUNING_SETTINGS.get(args.tuning_mode, ())}


def tuning_label(args: argparse.Namespace) -> str | None:
    """What the original appended to a run's notes for these two modes; None for the others."""
    if args.tuning_mode == "adaptertune":
        return f"a={args.adapter_design}_b={args.adapter_bottleneck}"
    if args.tuning_mode == "finetune-top":
        return f"l={args.top_layers}" + ("_e=no" if args.top_embeddings == "no" else "")
    return None


def explicit_flags(parser: argparse.ArgumentParser, argv: list[str]) -> set[str]:
    """The destinations that argv sets itself, as opposed to those left at their defaults."""
    blank = argparse.Namespace(**{action.dest: None for action in parser._actions})
    unset = object()
    for dest in vars(blank):
        setattr(blank, dest, unset)
    parsed = parser.parse_args(argv, namespace=blank)
    return {dest for dest, value in vars(parsed).items() if value is not unset}


def refuse_together(first: str, second: str, why: str) -> None:
    """Raise UserError for two flags that contradict each other."""
    raise UserError(f"{first} and {second} do not go together: {why}")


def check_launch(args: argparse.Namespace) -> None:
    """Raise UserError for a batch that the processes cannot share, or a name that would be several folders."""
    if args.num_processes > 0 and args.bsz % args.num_processes:
        raise UserError(f"--bsz {args.bsz} cannot be shared by --num_processes {args.num_processes}: not a multiple")
    for name in ("notes", "dir_name"):
        if "/" in (getattr(args, name) or ""):
            raise UserError(f"--{name} {getattr(args, name)!r}: becomes part of a folder's name, so it takes no '/'")


def as_flags(values: dict[str, object]) -> list[str]:
    """{"preseqlen": 5, "cache_dir": None} -> ["--preseqlen", "5"]: None is left out, "-" may start a value."""
    words = []
    for name, value in values.items():
        if value is not None:
            text = str(value)
            words += [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]
    return words


def child_command(script: Path, arguments: list[str], num_processes: int = 1) -> list[str]:
    """The argument list that runs `script` with this Python: directly, or under torchrun with several processes."""
    if num_processes < 1:
        raise UserError(f"--num_processes {num_processes}: at least 1 process is needed")
    if num_processes == 1:
        return [sys.executable, str(script), *arguments]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
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
        save_to.parent.mkdir(parents=True, exist_ok=True)
        save_to.write_text(line + "\n", encoding="utf-8")
    sys.stderr.flush()
    if os.name == "posix":
        os.execv(command[0], command)
    return subprocess.run(command).returncode
