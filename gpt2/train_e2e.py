"""Launcher of table-to-text training: good defaults in, one command line out, then runs it.

python gpt2/train_e2e.py --mode webnlg --preseqlen 5 --epoch 5 --learning_rate 0.00005 --bsz 5 --seed 101
python gpt2/train_e2e.py --demo yes
"""

import re
import sys
from pathlib import Path

from gpt2.flags import DEFAULT_MODEL, Settings
from prefixlib.data.tasks import find_task
from prefixlib.runs import launch
from prefixlib.settings.flags import spelled
from prefixlib.system import places
from prefixlib.system.errors import one_line_errors

TREE = Path(__file__).resolve().parent


def parse_args(argv: list[str]) -> launch.Parsed:
    """The command line as checked settings. Raises UserError for contradictions."""
    parser = launch.make_parser(__doc__.split("\n")[0], Settings)
    parsed = launch.parse(parser, argv, Settings, "gpt2", demo_mode="webnlg")
    parsed.settings.check()
    launch.check_launch(parsed.settings, parsed.launch)
    return parsed


def long_name(settings: Settings, notes: str | None) -> str:
    """The folder name that the original made of the settings: a label, nothing is read out of it."""
    s = settings
    name = (
        f"{s.mode}{s.tuning_mode}_{spelled(s.optim_prefix)[0]}_{s.preseqlen}_{s.prefix_mode[:3]}_{s.format_mode[:3]}"
        f"_b={s.gradient_accumulation_steps * s.bsz}-e={s.epoch:g}_d={s.dropout}_u={spelled(s.use_dropout)}"
        f"_lr={s.learning_rate}_w={s.weight_decay}_s={s.seed}_r=n_m={s.mid_dim}"
    )
    parts = [name, notes, s.tuning_label()]
    if s.tuning_mode == "finetune":
        parts.append(f"uctd={spelled(s.use_custom_teacher_dropout)}")
    parts.append(f"o={s.objective_mode}")
    if s.distill:
        parts.append(f"distill_o={s.matching_objective}")
    return "_".join(filter(None, parts))


def output_dir(parsed: launch.Parsed) -> Path:
    """Where the run is written: in a checkout the same from whichever folder the launcher was started."""
    settings, own = parsed.settings, parsed.launch
    if settings.output_dir:
        return Path(settings.output_dir).expanduser().resolve()
    folder = "demo_models" if own.demo else find_task(settings.mode).gpt2.folder
    name = long_name if own.long_names else launch.short_name
    return places.runs_folder(TREE, folder) / (own.dir_name or name(settings, own.notes))


def build_command(parsed: launch.Parsed) -> list[str]:
    """The child's argument list: every setting."""
    values = parsed.settings.as_flags()
    if "model_name_or_path" not in values:
        large = re.search(r"(?<![A-Za-z0-9])large(?![A-Za-z0-9])", parsed.launch.notes or "")  # a word of its own
        values["model_name_or_path"] = "gpt2-large" if large else DEFAULT_MODEL
    arguments = launch.as_words({**values, "output_dir": output_dir(parsed)})
    return launch.child_command(TREE / "run_language_modeling.py", arguments, parsed.launch.num_processes)


def main(argv: list[str] | None = None) -> int:
    parsed = parse_args(sys.argv[1:] if argv is None else argv)
    command = build_command(parsed)
    if "gpt2-large" in command and not parsed.settings.model_name_or_path:
        print("--notes say large: the base model is gpt2-large", file=sys.stderr)
    return launch.run(command, dry_run=parsed.dry_run, save_to=output_dir(parsed) / "command.txt")


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
