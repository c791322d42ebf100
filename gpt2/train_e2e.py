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
from prefixlib.system import places
from prefixlib.system.errors import one_line_errors

TREE = Path(__file__).resolve().parent


def parse_args(argv: list[str]) -> launch.Parsed:
    """The command line as checked settings. Raises UserError for contradictions."""
    parser = launch.make_parser(__doc__.split("\n")[0], Settings)
    parsed = launch.parse(parser, argv, Settings, "gpt2", demo_mode="webnlg")
    parsed.settings.check()
    launch.check_launch(parsed.launch, parsed.settings.bsz)
    parsed.settings.check_processes(parsed.launch.num_processes)
    return parsed


def output_dir(parsed: launch.Parsed) -> Path:
    """Where the run is written: in a checkout the same from whichever folder the launcher was started."""
    settings, own = parsed.settings, parsed.launch
    if settings.output_dir:
        return Path(settings.output_dir).expanduser().resolve()
    folder = "demo_models" if own.demo else find_task(settings.mode).gpt2.folder
    name = settings.long_name if own.long_names else settings.short_name
    return places.runs_folder(TREE, folder) / (own.dir_name or name(own.notes))


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
