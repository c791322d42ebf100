"""Launcher of table-to-text training: good defaults in, one command line out, then runs it.

python gpt2/train_e2e.py --mode webnlg --preseqlen 5 --epoch 5 --learning_rate 0.00005 --bsz 5 --seed 101
python gpt2/train_e2e.py --demo yes
"""

import argparse
import sys
from pathlib import Path

from gpt2 import flags
from prefixlib.errors import one_line_errors
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

TREE = Path(__file__).resolve().parent
FOLDERS = {  # the original's, one per task
    "data2text": "save_e2e_models_convcheck",
    "webnlg": "webnlg_models",
    "triples": "triples_models",
    "writingPrompts": "wp_models",
    "xsum": "xsum_models",
    "cnndm": "cnndm_models",
    "sentiment": "sentiment_models",
    "topic": "topic_models",
    "classify-sentiment": "classification_models",
    "classify-topic": "classification_models",
}
# What --demo yes sets unless the command line does, by tuning mode: a few settings tried by hand, no search.
DEMO = {
    "prefixtune": {"mode": "webnlg", "preseqlen": 10, "mid_dim": 256, "bsz": 16, "epoch": 8, "learning_rate": 3e-3},
    "finetune": {"mode": "webnlg", "bsz": 16, "epoch": 5, "learning_rate": 5e-4},
    "finetune-top": {"mode": "webnlg", "top_layers": 2, "bsz": 16, "epoch": 8, "learning_rate": 1e-3},
    "adaptertune": {"mode": "webnlg", "adapter_bottleneck": 32, "bsz": 16, "epoch": 8, "learning_rate": 3e-3},
    "bothtune": {"mode": "webnlg", "preseqlen": 10, "mid_dim": 256, "bsz": 16, "epoch": 5, "learning_rate": 5e-4},
}
DEMO_TASKS = {  # what differs for one task, whatever is tuned: small sets are read more often
    "sentiment": {"epoch": 20},
    "topic": {"epoch": 20},
    "classify-sentiment": {"epoch": 30},
    "classify-topic": {"epoch": 8},
    "writingPrompts": {"epoch": 30},
    "cnndm": {"epoch": 40},
}


def make_parser() -> Parser:
    """The launcher's flags: the child's, and those that choose names, the demo and the number of processes."""
    parser = Parser(description=__doc__.split("\n")[0])
    flags.add_all(parser)
    group = parser.add_argument_group("launching")
    group.add_argument("--notes", help="free text at the end of the output folder's name; `large` selects gpt2-large")
    group.add_argument("--dir_name", help="the output folder's name, instead of one made of the settings")
    group.add_argument("--output_dir", help="the output folder itself (default: gpt2/TASK_models/NAME)")
    group.add_argument("--num_processes", type=int, default=1, help="processes on this machine, one per GPU")
    add_yes_no(group, "--demo", "no", "the bundled model and data, with settings that suit them")
    group.add_argument("--dry_run", action="store_true", help="print the command line and stop")
    return parser


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Parse, fill in the demo's settings, and check. Raises UserError for contradictions."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.demo == "yes":
        given = explicit_flags(parser, argv)
        for name in ("model_name_or_path", "data_dir", "train_file"):
            if name in given:
                refuse_together("--demo yes", f"--{name}", "the demo brings its own model and data")
        settings = DEMO.get(args.tuning_mode, {})
        mode = args.mode if "mode" in given else settings.get("mode", args.mode)
        settings = {**settings, **DEMO_TASKS.get(mode, {})}
        if args.init_shallow == "yes" or args.parametrize_emb == "Emb":
            settings.pop("mid_dim", None)  # there is no MLP
        for name, value in settings.items():
            if name not in given:
                setattr(args, name, value)
        args.model_name_or_path, args.data_dir = str(DEMO_DATA / "gpt2"), str(DEMO_DATA)
    flags.check(args)
    check_launch(args)
    return args


def run_name(args: argparse.Namespace) -> str:
    """The folder name that the original made of the settings: a label, nothing is read out of it."""
    name = (
        f"{args.mode}{args.tuning_mode}_{args.optim_prefix[0]}_{args.preseqlen}_{args.prefix_mode[:3]}"
        f"_{args.format_mode[:3]}_b={args.gradient_accumulation_steps * args.bsz}-e={args.epoch:g}_d={args.dropout}"
        f"_u={args.use_dropout}_lr={args.learning_rate}_w={args.weight_decay}_s={args.seed}_r=n_m={args.mid_dim}"
    )
    notes = [args.notes, tuning_label(args)]
    if args.tuning_mode == "finetune":
        notes.append(f"uctd={args.use_custom_teacher_dropout}")
    notes.append(f"o={args.objective_mode}")
    if args.distill == "yes":
        notes.append(f"distill_o={args.matching_objective}")
    return "_".join([name, *filter(None, notes)])


def output_dir(args: argparse.Namespace) -> Path:
    """Where the run is written, the same from whichever folder the launcher was started."""
    if args.output_dir:
        return Path(args.output_dir).expanduser().resolve()
    folder = "demo_models" if args.demo == "yes" else FOLDERS[args.mode]
    return TREE / folder / (args.dir_name or run_name(args))


def build_command(args: argparse.Namespace) -> list[str]:
    """The child's argument list; every flag of flags.py is passed on."""
    shared = Parser(add_help=False)
    flags.add_all(shared)
    values = {action.dest: getattr(args, action.dest) for action in shared._actions}
    if not values["model_name_or_path"]:
        values["model_name_or_path"] = "gpt2-large" if "large" in (args.notes or "") else "gpt2-medium"
    arguments = as_flags({**values, "output_dir": output_dir(args)})
    return child_command(TREE / "run_language_modeling.py", arguments, args.num_processes)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    command = build_command(args)
    return run(command, dry_run=args.dry_run, save_to=output_dir(args) / "command.txt")


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
