"""Folders that are made once and kept in the user's cache: written elsewhere, synced, checked before use.

    if damage(folder):
        keep(folder, fill)

A power cut can leave pages of zeros in files that were renamed before their content reached the disk. A digest takes
about 0.15 s per GB, as it is the hash of the sums of a file's blocks, not of its content.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prefixlib.system import files, schema
from prefixlib.system.errors import UserError

DIGESTS = "digests.json"  # in a kept folder: file -> digest
BLOCK = 4096  # bytes: the unit of disks and memory
SCRATCH, HELD = ".scratch", "in_use.lock"  # ending of a folder that is being filled; in it, locked by its process


def keep(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a new folder, then put it in the place of `folder`, with the digests of its files.

    If another process was faster, its folder stays. Raises OSError if the files cannot be written.
    """
    with _scratch(folder) as side:
        made = side / folder.name
        made.mkdir()
        fill(made)
        files.write_json(made / DIGESTS, {path.name: digest(path) for path in sorted(made.iterdir())})
        if damage(folder):
            files.move_whole(made, folder)


def damage(folder: Path) -> str | None:
    """The fault of a kept folder, in words; None if its files are as they were written."""
    if not folder.is_dir():
        return "it does not exist"
    try:
        digests = schema.read(folder / DIGESTS, dict[str, str], "it is made again")
    except FileNotFoundError:
        return f"{DIGESTS} is missing"
    except UserError:
        return f"{DIGESTS} is damaged"
    for name, wanted in digests.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if digest(folder / name) != wanted:
            return f"{name} has changed since it was written"
    return None


def digest(path: Path) -> str:
    """The SHA-256 of a file's size, of the sum of each of its whole blocks as 64-bit words, and of the rest."""
    import numpy as np  # here: launchers do not need it

    size = path.stat().st_size
    blocks, found = size // BLOCK, hashlib.sha256(str(size).encode())
    if blocks:
        words = np.memmap(path, dtype="<u8", mode="r", shape=(blocks, BLOCK // 8))
        found.update(words.sum(axis=1).tobytes())
    with open(path, "rb") as file:
        file.seek(blocks * BLOCK)
        found.update(file.read())
    return found.hexdigest()


@contextlib.contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """Make a new folder beside `target`, removed at the end; those of killed processes are removed first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".*{SCRATCH}"):
        if (left / HELD).is_file() and not _is_held(left / HELD):
            shutil.rmtree(left, ignore_errors=True)
    side = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=SCRATCH, dir=target.parent))
    side.chmod(0o755)  # mkdtemp's folder is readable by its owner alone
    with open(side / HELD, "w", encoding="utf-8") as held:
        _lock(held)
        try:
            yield side
        finally:
            shutil.rmtree(side, ignore_errors=True)


def _is_held(path: Path) -> bool:
    """Whether the process that locked the file still runs; unknown counts as yes."""
    with open(path, "r+", encoding="utf-8") as file:
        return not _lock(file)


def _lock(file: Any) -> bool:
    """Lock an open file for this process's lifetime; False if another one holds it, or locks are not possible."""
    if os.name != "posix":
        return False
    import fcntl  # here: it is not on every system

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
