"""The folder of a run: the run's own files, the files of an earlier run, and replacing a checkpoint as a whole."""

import contextlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefixlib.checkpoints import card
from prefixlib.checkpoints.checkpoint import CONFIG, FLAT, NETWORK
from prefixlib.methods.table import OWN_MODEL, TASK
from prefixlib.system import files, schema

RESULTS = "results.json"
# The files of a finished run, as patterns: --overwrite_output_dir yes removes them before the new run writes its own,
# and no run replaces them without it. Logs are appended to.
RUN_FILES = (
    CONFIG, NETWORK, FLAT, TASK, "model", "best", RESULTS, "loss.png",
    "config.json", "generation_config.json", "model*.safetensors*",
    "tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "spiece.model", "sentencepiece*.model", "source.spm", "target.spm",
)  # fmt: skip
# The files in a checkpoint-N for resuming: those of transformers' Trainer, and those that this code adds.
LOOP_FILES = (
    "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "training_args.bin", "trainer_state.json",
    "loss_sums.json",
)  # fmt: skip


def clear_run(directory: Path, patterns: Sequence[str]) -> None:
    """Remove an earlier run's files from `directory`: RUN_FILES, its model cards, and its own `patterns`.

    Other files stay, also those in its checkpoints' folders.
    """
    for path in files.matching(directory, (*RUN_FILES, *patterns)):
        if path.is_dir() and not path.is_symlink():
            clear_checkpoint(path)
        else:
            path.unlink(missing_ok=True)
    card.remove(directory)


def clear_checkpoint(directory: Path) -> None:
    """Remove a checkpoint's own files, and its folder if it is then empty."""
    files.clear_run(directory, (*RUN_FILES, *LOOP_FILES))
    for folder in (directory, directory / OWN_MODEL):
        card.remove(folder)
        with contextlib.suppress(OSError):  # it is not empty, or does not exist
            folder.rmdir()


def replace_folder(directory: Path, write: Callable[[Path], None]) -> None:
    """Let `write` replace the checkpoint in `directory`, whose other files stay.

    If the process is killed at any moment, one of the two checkpoints is whole.
    """

    def fill(folder: Path) -> None:
        folder.mkdir(parents=True)
        if card.path_in(directory) != directory / card.CARD:  # the user's own: the new card gets another name
            shutil.copy2(directory / card.CARD, folder / card.CARD)
        write(folder)

    files.replace_directory(directory, fill)


def earlier_run(directory: Path, patterns: Sequence[str]) -> list[str]:
    """Names in `directory` that a run which starts there would replace: RUN_FILES, and its own `patterns` first.

    A results.json counts if it records a run; other content is merged. The model card gets a free name.
    """
    found = [path.name for path in files.matching(directory, (*patterns, *RUN_FILES))]
    if RESULTS in found:
        held = schema.read(directory / RESULTS, dict[str, Any], "move it away")
        if not held.keys() & {"training", "decoding", "train", "test"}:
            found.remove(RESULTS)
    return found
