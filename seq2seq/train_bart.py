"""Launcher of summarisation with an encoder-decoder: good defaults in, one command line out, then runs it.

python seq2seq/train_bart.py --mode xsum --preseqlen 200 --mid_dim 800 --bsz 16 --epoch 30 --fp16 yes
python seq2seq/train_bart.py --mode xsum --do_train no --prefix_model_path seq2seq/xsum_models/NAME
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from prefixlib.runs.launch import (
    Parsed,
    as_words,
    check_launch,
    child_command,
    make_parser,
    parse,
    run,
)
from prefixlib.settings.flags import refuse_together
from prefixlib.system import places
from prefixlib.system.errors import UserError, one_line_errors
from seq2seq.flags import DEFAULT_MODEL, Settings

TREE = Path(__file__).resolve().parent


def parse_args(
    argv: Sequence[str], description: str = "", kind: type[Settings] = Settings, demo_mode: str = "xsum"
) -> Parsed:
    """Parse, fill in the settings of the demo or of the paper, and check. Raises UserError for contradictions."""
    parsed = parse(make_parser(description, kind), argv, kind, "seq2seq", demo_mode)
    settings, given = parsed.settings, parsed.given
    if parsed.launch.demo and settings.brings_its_model:
        settings, given = dataclasses.replace(settings, model_name_or_path=None), given - {"model_name_or_path"}
    settings.check()
    if not settings.do_train and parsed.launch.num_processes > 1:
        number = parsed.launch.num_processes
        refuse_together("--do_train no", f"--num_processes {number}", "decoding runs in one process")
    check_launch(parsed.launch, settings.bsz)
    if settings.do_train:
        settings.check_processes(parsed.launch.num_processes)
    if settings.do_train and settings.model_name_or_path is None:
        settings = dataclasses.replace(settings, model_name_or_path=DEFAULT_MODEL)
    parsed = dataclasses.replace(parsed, settings=settings, given=given)
    output = str(output_dir(parsed))
    return dataclasses.replace(
        parsed, settings=dataclasses.replace(settings, output_dir=output), given=given | {"output_dir"}
    )


def output_dir(parsed: Parsed) -> Path:
    """Where the run is written: in a checkout the same from whichever folder the launcher was started."""
    settings, launch = parsed.settings, parsed.launch
    if settings.output_dir:
        return Path(settings.output_dir).expanduser().resolve()
    if not settings.do_train:
        return settings.checkpoint.resolve()
    folder = "demo_models" if launch.demo else settings.task.folder
    name = settings.long_name if launch.long_names else settings.short_name
    return places.runs_folder(TREE, folder) / (launch.dir_name or name(launch.notes))


def build_command(parsed: Parsed) -> list[str]:
    """The child's argument list: every setting for training; for decoding only what was given.

    The checkpoint holds the rest then, and a flag that was given is checked against it.
    """
    values = parsed.settings.as_flags()
    if not parsed.settings.do_train:
        values = {name: value for name, value in values.items() if name in parsed.given}
    return child_command(TREE / "finetune.py", as_words(values), parsed.launch.num_processes)


def main(
    argv: Sequence[str] | None = None,
    description: str = __doc__.split("\n")[0],
    kind: type[Settings] = Settings,
    demo_mode: str = "xsum",
) -> int:
    """Build the command and run it. `kind` is the class of the settings, whose modes the launcher offers."""
    parsed = parse_args(sys.argv[1:] if argv is None else argv, description, kind, demo_mode)
    settings, command = parsed.settings, build_command(parsed)
    if not settings.do_train and not parsed.dry_run and not settings.checkpoint.is_dir():
        raise UserError(f"checkpoint {settings.checkpoint}: no such folder")  # before one is made for the command line
    name = "command.txt" if settings.do_train else "decode_command.txt"
    return run(command, dry_run=parsed.dry_run, save_to=Path(settings.output_dir) / name)


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
