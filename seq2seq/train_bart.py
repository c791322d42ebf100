"""Launcher of summarisation with an encoder-decoder: good defaults in, one command line out, then runs it.

python seq2seq/train_bart.py --mode xsum --preseqlen 200 --mid_dim 800 --bsz 16 --epoch 30 --fp16 yes
python seq2seq/train_bart.py --mode xsum --do_train no --prefix_model_path seq2seq/xsum_models/NAME
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from prefixlib.errors import UserError, one_line_errors
from prefixlib.launch import (
    DEMO_DATA,
    Parser,
    add_yes_no,
    as_flags,
    check_launch,
    child_command,
    explicit_flags,
    refuse_together,
    run,
    tuning_label,
)
from seq2seq import flags

TREE = Path(__file__).resolve().parent
# What --demo yes sets unless the command line does, by tuning mode; decoding a checkpoint needs none of it.
DEMO = {
    "prefixtune": {"preseqlen": 10, "mid_dim": 256, "bsz": 16, "epoch": 5, "learning_rate": 2e-3},
    "finetune": {"bsz": 16, "epoch": 5, "learning_rate": 5e-4},
    "finetune-top": {"top_layers": 2, "bsz": 16, "epoch": 5, "learning_rate": 1e-3},
    "adaptertune": {"adapter_bottleneck": 32, "bsz": 16, "epoch": 5, "learning_rate": 3e-3},
    "bothtune": {"preseqlen": 10, "mid_dim": 256, "bsz": 16, "epoch": 5, "learning_rate": 5e-4},
}
OWN = (
    "notes",
    "dir_name",
    "output_dir",
    "num_processes",
    "demo",
    "demo_mode",
    "dry_run",
)  # flags that the child does not get


def make_parser(description: str, modes: Sequence[str]) -> Parser:
    """The launcher's flags: the child's, and those that choose names, the demo and the number of processes."""
    parser = Parser(description=description)
    flags.add_all(parser, tuple(modes))
    group = parser.add_argument_group("launching")
    group.add_argument("--notes", help="free text at the end of the output folder's name")
    group.add_argument("--dir_name", help="the output folder's name, instead of one made of the settings")
    group.add_argument("--output_dir", help="the output folder itself (default: seq2seq/TASK_models/NAME)")
    group.add_argument("--num_processes", type=int, default=1, help="processes on this machine, one per GPU")
    add_yes_no(group, "--demo", "no", "the bundled model and data, with settings that suit them")
    parser.set_defaults(demo_mode="xsum" if "xsum" in modes else "webnlg")
    group.add_argument("--dry_run", action="store_true", help="print the command line and stop")
    return parser


def parse_args(argv: list[str], parser: Parser) -> tuple[argparse.Namespace, set[str]]:
    """Parse, fill in the demo's settings, and check; also returns what argv or the demo set.

    Raises UserError for contradictions.
    """
    if {"--demo=yes"} & set(argv) or ("--demo", "yes") in itertools.pairwise(argv):
        argv = ["--mode", parser.get_default("demo_mode"), *argv]  # a --mode of its own comes later and wins
    args, given = parser.parse_args(argv), explicit_flags(parser, argv)
    if args.demo == "yes":
        for name in ("model_name_or_path", "data_dir", "train_file"):
            if name in given:
                refuse_together("--demo yes", f"--{name}", "the demo brings its own model and data")
        for name, value in (DEMO[args.tuning_mode] if args.do_train == "yes" else {}).items():
            if name not in given:
                setattr(args, name, value)
        args.data_dir = str(DEMO_DATA if flags.MODES[args.mode].is_table else DEMO_DATA / "xsum")
        given.add("data_dir")
        brings_own = args.prefix_model_path and (Path(args.prefix_model_path).expanduser() / "model").is_dir()
        if not args.finetune_model_path and not (args.do_train == "no" and brings_own):
            args.model_name_or_path = str(DEMO_DATA / "bart")
            given.add("model_name_or_path")
    flags.check(args, given)
    if args.num_processes > 1 and args.do_train == "no":
        refuse_together("--do_train no", f"--num_processes {args.num_processes}", "decoding runs in one process")
    check_launch(args)
    return args, given


def run_name(args: argparse.Namespace) -> str:
    """The folder name that the original made of the settings: a label, nothing is read out of it."""
    name = (
        f"{args.mode}{args.tuning_mode}_{args.optim_prefix[0]}_{args.preseqlen}_{args.prefix_mode[:3]}"
        f"_{args.format_mode[:3]}_b={args.gradient_accumulation_steps * args.bsz}-e={args.epoch}_d={args.dropout}"
        f"_l={args.label_smoothing}_lr={args.learning_rate}_w={args.weight_decay}_s={args.seed}"
        f"_d={args.use_deep[0]}_m={args.mid_dim}"
    )
    return "_".join(filter(None, (name, args.notes, tuning_label(args))))


def output_dir(args: argparse.Namespace) -> Path:
    """Where the run is written, the same from whichever folder the launcher was started."""
    if args.output_dir:
        return Path(args.output_dir).expanduser().resolve()
    if args.do_train == "no":
        return Path(args.prefix_model_path or args.finetune_model_path).expanduser().resolve()
    folder = "demo_models" if args.demo == "yes" else flags.MODES[args.mode].folder
    return TREE / folder / (args.dir_name or run_name(args))


def build_command(args: argparse.Namespace, given: set[str]) -> list[str]:
    """The child's argument list: every setting for training; for decoding only what was given.

    The rest stands in the checkpoint then, and a flag that was given is checked against it.
    """
    values = {name: value for name, value in vars(args).items() if name not in OWN}
    if args.do_train == "no":
        values = {name: value for name, value in values.items() if name in given}
    else:
        values["model_name_or_path"] = args.model_name_or_path or "bart-large"
        # a default that means nothing in this run would be refused by the child
        idle = flags.unheeded(args).keys() - given
        values = {name: value for name, value in values.items() if name not in idle}
    arguments = as_flags({**values, "output_dir": output_dir(args)})
    return child_command(TREE / "finetune.py", arguments, args.num_processes)


def main(
    argv: list[str] | None = None, description: str = __doc__.split("\n")[0], modes: Sequence[str] = tuple(flags.MODES)
) -> int:
    parser = make_parser(description, modes)
    args, given = parse_args(sys.argv[1:] if argv is None else argv, parser)
    command = build_command(args, given)
    checkpoint = args.prefix_model_path or args.finetune_model_path
    if args.do_train == "no" and not args.dry_run and not Path(checkpoint).expanduser().is_dir():
        raise UserError(f"checkpoint {checkpoint}: no such folder")  # before one is made for the command line
    name = "command.txt" if args.do_train == "yes" else "decode_command.txt"
    return run(command, dry_run=args.dry_run, save_to=output_dir(args) / name)


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
