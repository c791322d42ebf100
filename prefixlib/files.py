"""Writing files so that a killed run or a full disk leaves the old content; one run at a time in a folder."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixlib.errors import UserError

LOCK = ".lock"


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
    old = _old(target)
    if target.exists():
        os.replace(target, old)
    os.replace(source, target)
    sync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _old(target: Path) -> Path:
    """Where a folder is while another one takes its place."""
    return target.with_name(f".{target.name}.old.partial")


def remove_partials(directory: Path) -> None:
    """Remove what a killed run had half written into `directory`; a folder that it was about to replace comes back."""
    for old in directory.glob(".*.old.partial"):
        target = old.with_name(old.name.removeprefix(".").removesuffix(".old.partial"))
        if not target.exists():
            os.replace(old, target)
    clear_run(directory, (".partial", ".*.partial"))


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Hold `directory`, made if absent, for this process alone; leftovers of a killed run are removed first.

    The system gives the lock up when its holder ends, however that comes, so none is ever stale. In a run of several
    processes the first one holds it. Raises UserError where another process does.
    """
    if os.name != "posix" or os.environ.get("RANK", "0") != "0":
        yield
        return
    made = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK
    with contextlib.closing(_locked_file(path)):
        try:
            remove_partials(directory)
            yield
        finally:
            path.unlink(missing_ok=True)
            if made:
                with contextlib.suppress(OSError):  # it is not empty
                    directory.rmdir()


def _locked_file(path: Path) -> Any:
    """The lock file, open and locked, with this process's id and machine in it."""
    import fcntl  # here: it is not on every system

    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  the lock is held while the file is open
        try:
            # of the process, not of the open file: a worker process that outlives this one does not keep it
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise UserError(
                f"{path.parent} is in use by {holder}: wait until it has ended, or take another --output_dir"
            ) from None
        except OSError:  # a file system without locks
            return file
        with contextlib.suppress(FileNotFoundError):  # its holder removed it between opening and locking
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
                file.flush()
                return file
        file.close()


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
