"""The model card of a prefix checkpoint: README.md, unless that is the user's own."""

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefixlib.data import data_digests
from prefixlib.metrics import shown
from prefixlib.settings.commands import decode_command
from prefixlib.system import files

logger = logging.getLogger(__name__)

FLAT = "prefix_flat.safetensors"  # the file that the card describes
CARD, OTHER_CARD = "README.md", "MODEL_CARD.md"  # the second where README.md is the user's own
SCORES = "| score | value |\n|---|---|\n"  # heads the last part of a card
# First words of a card's text: they tell it from a README.md that a user wrote.
CARD_MARK = "A trained prefix (Li & Liang 2021, arXiv 2101.00190) for "


def path_in(directory: Path) -> Path | None:
    """The model card's path: README.md, or MODEL_CARD.md if that is the user's own; None if both are."""
    for name in (CARD, OTHER_CARD):
        path = directory / name
        if not path.exists() or (path.is_file() and CARD_MARK in path.read_text(encoding="utf-8", errors="replace")):
            return path
    return None


def write(directory: Path, config: Mapping[str, Any], scores: Mapping[str, Any]) -> None:
    """Write the model card; a README.md that is the user's own is not replaced."""
    card = path_in(directory)
    if card is None:
        logger.warning("%s: %s and %s are not model cards: no card is written", directory, CARD, OTHER_CARD)
        return
    if card.name != CARD and not card.exists():
        logger.warning("%s: %s is not a model card and stays: the card is %s", directory, CARD, OTHER_CARD)
    files.write_text(card, _text(directory, config, scores))


def refresh(directory: Path, config: Mapping[str, Any], scores: Mapping[str, Any]) -> None:
    """Add these scores to the card; scores of other names stay."""
    card = path_in(directory)
    text = card.read_text(encoding="utf-8") if card and card.is_file() else ""
    earlier = dict(re.findall(r"^\| (.+?) \| (.+) \|$", text.partition(SCORES)[2], re.MULTILINE))
    write(directory, config, {**earlier, **scores})


def remove(directory: Path) -> None:
    """Remove the card; a README.md of the user stays."""
    card = path_in(directory)
    if card is not None:
        card.unlink(missing_ok=True)


def _text(directory: Path, config: Mapping[str, Any], scores: Mapping[str, Any]) -> str:
    """A README for someone who has the directory alone: its paths are relative to the directory."""

    def relative(value: Any) -> Any:
        return os.path.relpath(value, directory) if isinstance(value, str) and os.path.isabs(value) else value

    mode = config["task"].get("mode", "MODE")
    decode = decode_command(config["family"], mode, "THIS_DIRECTORY")
    settings = {**config["prefix"], **config["task"]}
    for name in (data_digests.DATA, data_digests.EARLIER):
        settings.pop(name, None)
    rows = "\n".join(f"| {name} | {relative(value)} |" for name, value in settings.items())
    scored = "\n".join(f"| {name} | {shown(value)} |" for name, value in scores.items()) or "| not scored | |"
    base, kind = config["base_model"].get("name"), "a frozen"
    if "tuned_from" in config["task"]:
        base, kind = config["task"]["tuned_from"], "the tuned model in `model/`, a"
    base = relative(base)
    return (
        f"# Prefix for {base}\n\n"
        f"{CARD_MARK}{kind} {config['family']} model, "
        f"task `{mode}`.\n\n"
        f"Decode with it:\n\n    {decode}\n\n"
        f"`{FLAT}` holds the keys and values alone: per site (P, 2*L*H*D), "
        "columns ordered layer0.K, layer0.V, layer1.K ...\n\n"
        "Paths are relative to this directory; scores are on the scale of the paper's tables for the task.\n\n"
        f"| setting | value |\n|---|---|\n{rows}\n\n{SCORES}{scored}\n"
    )
