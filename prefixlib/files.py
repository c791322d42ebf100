"""Writing files so that a killed run or a full disk leaves the old content; reading results of earlier versions."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixlib.errors import UserError


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries to disk (a rename is only durable after this)."""
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_file(path: Path) -> None:
    """Flush one file's content to disk."""
    with open(path, "rb+") as handle:
        os.fsync(handle.fileno())


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text under a temporary name, sync it, then rename it to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_directory(path.parent)


def check_can_write(path: Path | str, flag: str) -> None:
    """Raise UserError, naming the flag, for a file that could not be written once the work is done."""
    path = Path(path).expanduser().absolute()
    parent = next(folder for folder in path.parents if folder.exists())
    if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        where = "is a folder" if path.is_dir() else f"{parent} is no folder that can be written to"
        raise UserError(f"{flag} {path}: {where}; name a file")


def matching(directory: Path, patterns: Sequence[str]) -> list[Path]:
    """The files and folders in `directory` whose names match one of the patterns, in the order of these."""
    return list(dict.fromkeys(path for pattern in patterns for path in sorted(directory.glob(pattern))))


def clear_run(directory: Path, patterns: Sequence[str]) -> None:
    """Remove what an earlier run left in `directory`: the files and folders whose names match, nothing else."""
    for path in matching(directory, patterns):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_json(path: Path | str, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def move_whole(source: Path, target: Path) -> None:
    """Sync every file of the directory `source`, then rename it to `target`, which is replaced if it exists."""
    for path in source.rglob("*"):
        if path.is_file():
            sync_file(path)
    if target.exists():
        shutil.rmtree(target)
    os.replace(source, target)
    sync_directory(target.parent)


def replace_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new directory beside `target`, then put it in `target`'s place."""
    side = target.with_name(f".{target.name}.partial")
    shutil.rmtree(side, ignore_errors=True)
    write(side)
    move_whole(side, target)


def todays_results(results: Mapping[str, Any]) -> dict[str, Any]:
    """What a results.json holds under today's names: in earlier versions seq2seq/ had a schema of its own."""
    renamed = dict(results)
    if "settings" in results:
        run = {**renamed.pop("settings"), **renamed.pop("versions", {}), "device": renamed.pop("device", None)}
        renamed["run"] = run
    if "train" in results:
        training = dict(renamed.pop("train"))
        curves = training.get("curves", {})
        training["curves"] = {"dev" if name == "validation" else name: points for name, points in curves.items()}
        renamed["training"] = training
    if "test" in results:
        renamed["decoding"] = {"test": renamed.pop("test")}
    return renamed
