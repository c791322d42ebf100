"""The commands that this package prints, as they work where it is installed (standard library only)."""

import shlex
from pathlib import Path

from prefixlib.system import places


def decode_command(
    family: str,
    mode: str,
    directory: Path | str,
    *,
    tuned: bool = False,
    data_dir: str | None = None,
    test_file: str | None = None,
) -> str:
    """The command, as a line for a shell, that decodes the task's test file, or `test_file`, with a checkpoint.

    tuned: a model without a prefix. data_dir: where the task's files are, if not in the default folder.
    """
    if family == "decoder-only":
        program, words, flag = "gpt2/gen.py", [mode, "yes", "test", str(directory), "no"], "data_file"
    else:
        model = "finetune_model_path" if tuned else "prefix_model_path"
        program, flag = "seq2seq/train_bart.py", "test_file"
        words = ["--mode", mode, "--do_train", "no", f"--{model}", str(directory)]
    if test_file:
        words += [f"--{flag}", test_file]
    elif data_dir:
        words += ["--data_dir", data_dir]
    return f"{places.program(program)} {shlex.join(words)}"
