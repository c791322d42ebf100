"""The folder of a run: which files in it are the run's own, which an earlier run left, how one is replaced whole."""

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
# A finished run's folder, as patterns: what --overwrite_output_dir yes removes before the new run writes its own, and
# what no run replaces without it. Logs are not replaced but added to.
RUN_FILES = (
    *(CONFIG, NETWORK, FLAT, TASK, "model", "best", RESULTS, "loss.png"),
    *("config.json", "generation_config.json", "model*.safetensors*"),
    *("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("spiece.model", "sentencepiece*.model", "source.spm", "target.spm"),
)
# What transformers' Trainer keeps in a checkpoint-N for resuming, and what this code adds to it.
LOOP_FILES = (
    *("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "training_args.bin", "trainer_state.json"),
    "loss_sums.json",
)


def clear_run(directory: Path, patterns: Sequence[str]) -> None:
    """Remove what an earlier run left in `directory`: RUN_FILES, its model cards, and its own `patterns`.

    What others put there stays, in its checkpoints' folders too.
    """
    for path in files.matching(directory, (*RUN_FILES, *patterns)):
        if path.is_dir() and not path.is_symlink():
            clear_checkpoint(path)
        else:
            path.unlink(missing_ok=True)
    card.remove(directory)


def clear_checkpoint(directory: Path) -> None:
    """Remove a checkpoint's own files, and its folder where nothing else is in it."""
    files.clear_run(directory, (*RUN_FILES, *LOOP_FILES))
    for folder in (directory, directory / OWN_MODEL):
        card.remove(folder)
        with contextlib.suppress(OSError):  # it is not empty, or not there
            folder.rmdir()


def replace_folder(directory: Path, write: Callable[[Path], None]) -> None:
    """Let `write` put a new checkpoint in the place of the one in `directory`, whose other files stay.

    Killed at any moment, one of the two is there.
    """

    def fill(folder: Path) -> None:
        folder.mkdir(parents=True)
        if card.path_in(directory) != directory / card.CARD:  # the user's own: the new card finds another name
            shutil.copy2(directory / card.CARD, folder / card.CARD)
        write(folder)

    files.replace_directory(directory, fill)


def earlier_run(directory: Path, patterns: Sequence[str]) -> list[str]:
    """Names in `directory` that a run which starts there would replace: RUN_FILES, and its own `patterns` first.

    A results.json counts where it holds a run; other content is merged with. The model card finds a place of its own.
    """
    found = [path.name for path in files.matching(directory, (*patterns, *RUN_FILES))]
    if RESULTS in found:
        held = schema.read(directory / RESULTS, dict[str, Any], "move it away")
        if not held.keys() & {"training", "decoding", "train", "test"}:
            found.remove(RESULTS)
    return found
