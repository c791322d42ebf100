"""Launcher of decoding: gen.py MODE yes SPLIT CHECKPOINT no.

python gpt2/gen.py webnlg yes test gpt2/webnlg_models/NAME no
"""

import argparse
import sys
from pathlib import Path

from prefixlib.data.tasks import GPT2_MODES
from prefixlib.runs.launch import DEMO_DATA, as_words, child_command, run
from prefixlib.settings.flags import Parser, add_yes_no, refuse_together
from prefixlib.system import places
from prefixlib.system.errors import UserError, one_line_errors

TREE = Path(__file__).resolve().parent


def make_parser() -> Parser:
    """The original's five positional arguments, then what run_generation.py takes, handed on as it is."""
    parser = Parser(
        description=__doc__.split("\n")[0],
        epilog="Any further flag goes to run_generation.py: --batch_size, --num_beams, --strategy, ...",
    )
    parser.add_argument("mode", choices=GPT2_MODES, help="the task the checkpoint was trained for")
    parser.add_argument("control", choices=("yes",), help="always yes, as in the original")
    parser.add_argument("split", choices=("valid", "test"), help="which file of the data set to decode")
    parser.add_argument("checkpoint", help="prefix checkpoint or fine-tuned model folder")
    parser.add_argument("submit", choices=("no",), nargs="?", default="no", help="always no: runs here")
    add_yes_no(parser, "--demo", "no", "decode the bundled data")
    parser.add_argument("--dry_run", action="store_true", help="print the command line and stop")
    return parser


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's own arguments, and the rest for the child. Raises UserError for invalid ones."""
    args, rest = make_parser().parse_known_args(argv)
    if rest and not rest[0].startswith("-"):
        raise UserError(f"{rest[0]!r}: too many arguments; expected MODE yes SPLIT CHECKPOINT no")
    if not Path(args.checkpoint).expanduser().is_dir():
        raise UserError(f"checkpoint {args.checkpoint}: no such folder")
    if args.demo == "yes" and any(word.split("=")[0] == "--data_dir" for word in rest):
        refuse_together("--demo yes", "--data_dir", "the demo brings its own data")
    if args.demo == "yes" and places.missing_demo():
        raise UserError(f"--demo yes: {places.missing_demo()}")
    return args, rest


def build_command(args: argparse.Namespace, rest: list[str]) -> list[str]:
    """The child's argument list."""
    flags = {"mode": args.mode, "split": args.split, "checkpoint": args.checkpoint}
    if args.demo == "yes":
        flags["data_dir"] = DEMO_DATA
    return child_command(TREE / "run_generation.py", as_words(flags) + rest)


def main(argv: list[str] | None = None) -> int:
    args, rest = parse_args(sys.argv[1:] if argv is None else argv)
    return run(build_command(args, rest), dry_run=args.dry_run)


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
