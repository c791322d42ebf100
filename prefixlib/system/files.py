"""Writing files so that a killed run or a full disk leaves the old content, and locking a folder for one run.

Links are replaced, never followed, and what this code did not make is neither changed nor removed.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixlib.system import processes
from prefixlib.system.errors import UserError, is_failed_save, system_number

LOCK = ".lock"
HOLDER = re.compile(r"(process \d+ on .*\n)?")  # the content of a lock
# The names of this code's own partial files and folders; a user's `.mywork.partial` is none of them.
FOLDERS = r"best|model|peft|kv|cache|checkpoint-\d+"
NAMES = (
    r"results\.json|settings\.json|prefix_config\.json|task_config\.json|prefix_\w+\.safetensors|README\.md|"
    r"MODEL_CARD\.md|loss\.png|resume\.ckpt|(.+_)?(valid|test)_(beam|greedy|nucleus|gold|src).*"
)
PARTIAL_FILE = re.compile(rf"\.resume\.ckpt\.partial|\.({NAMES})\.\d+\.partial")
PARTIAL_FOLDER = re.compile(rf"\.({FOLDERS})\.partial")
OLD_FOLDER = re.compile(rf"\.({FOLDERS})\.old\.partial")
CHECKPOINTS = ".partial"  # where transformers' Trainer writes a checkpoint-N


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


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Let a writer's error name `path` if it names no file, or a temporary one."""
    try:
        yield
    except Exception as error:
        number = system_number(error)
        if is_failed_save(error) and _is_full(Path(path)):
            number = errno.ENOSPC
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _is_full(path: Path) -> bool:
    """Whether the disk of `path` has no room for a megabyte."""
    return shutil.disk_usage(next(folder for folder in path.parents if folder.exists())).free < 2**20


@contextlib.contextmanager
def replacing(path: Path | str, partial_name: str | None = None) -> Iterator[Path]:
    """Yield a temporary name to write to; at the end of the block the file is synced and renamed to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(partial_name or _partial_name(path.name))
    partial.unlink(missing_ok=True)  # somebody's link, or the file of a killed process with this id
    try:
        with writing(path):
            yield partial
            sync_file(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_directory(path.parent)


def _partial_name(name: str) -> str:
    return f".{name}.{os.getpid()}.partial"


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text under a temporary name, sync it, then rename it to `path`."""
    with replacing(path) as partial, open(partial, "x", encoding="utf-8", newline="\n") as handle:
        handle.write(text)


def add_line(path: Path, line: str) -> None:
    """Append a line to a text file, which is made if absent. Raises OSError for a link."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    with writing(path), open(handle, "a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def check_name(directory: Path, flag: str, *names: str) -> None:
    """Raise UserError if the system does not accept the folder's name, or that of a file in it with one of `names`."""
    parent = next(folder for folder in directory.parents if _exists(folder))
    most = os.pathconf(parent, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    longest = max((directory.name, *map(_partial_name, names)), key=lambda name: len(os.fsencode(name)))
    length = len(os.fsencode(longest))
    if length > most:
        raise UserError(
            f"{flag} {directory}: its name is too long by {length - most} bytes, as file names contain it: choose "
            "a shorter one (--output_dir, --dir_name or --notes)"
        )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long
        return False


def check_can_write(path: Path | str, flag: str) -> None:
    """Raise UserError, naming the flag, for a file that could not be written after the work."""
    path = Path(path).expanduser().absolute()
    check_name(path, flag, path.name)
    parent = next(folder for folder in path.parents if folder.exists())
    if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        where = "is a folder" if path.is_dir() else f"{parent} is not a writable folder"
        raise UserError(f"{flag} {path}: {where}; name a file")


def matching(directory: Path, patterns: Sequence[str]) -> list[Path]:
    """The files and folders in `directory` whose names match one of the patterns, in the patterns' order."""
    return list(dict.fromkeys(path for pattern in patterns for path in sorted(directory.glob(pattern))))


def clear_run(directory: Path, patterns: Sequence[str]) -> None:
    """Remove an earlier run's files from `directory`: those whose names match, also in folders that match.

    Other files in these folders stay, and the folders with them.
    """
    for path in matching(directory, patterns):
        if path.is_dir() and not path.is_symlink():
            clear_run(path, patterns)
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()
        else:
            path.unlink(missing_ok=True)


def write_json(path: Path | str, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def move_whole(source: Path, target: Path) -> None:
    """Sync every file of the directory `source`, then let it replace `target`.

    Files of `target` with other names are kept. If killed at any moment, `remove_partials` completes the move.
    """
    for path in source.rglob("*"):
        if path.is_file():
            sync_file(path)
    old = target.with_name(f".{target.name}.old.partial")
    if target.is_symlink():
        target.unlink()
    if target.exists():
        os.replace(target, old)
    _end_move(source, target, old)


def _end_move(source: Path, target: Path, old: Path) -> None:
    """Move the files that only `old` holds to the new `source`, and this to `target`, which does not exist."""
    if old.is_dir():
        new = {path.name for path in source.iterdir()}
        for path in old.iterdir():
            if path.name not in new:
                os.replace(path, source / path.name)
    os.replace(source, target)
    sync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_partials(directory: Path) -> None:
    """Remove a killed run's half-written files in `directory`; a folder that it was about to replace is restored.

    Only files with this code's own names are touched.
    """
    names = sorted(path.name for path in directory.glob(".*.partial") if not path.is_symlink())
    for name in names:
        if (found := OLD_FOLDER.fullmatch(name)) and (directory / name).is_dir():
            old, target, side = directory / name, directory / found[1], directory / f".{found[1]}.partial"
            if (directory / CHECKPOINTS / found[1]).is_dir():
                side = directory / CHECKPOINTS / found[1]
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)
            elif side.is_dir():  # it was whole before the other one was moved
                _end_move(side, target, old)
            else:
                os.replace(old, target)
    for name in names:
        path = directory / name
        if PARTIAL_FOLDER.fullmatch(name) and path.is_dir():
            shutil.rmtree(path)
        elif PARTIAL_FILE.fullmatch(name) and path.is_file():
            path.unlink()
    clear_checkpoints(directory / CHECKPOINTS)


def clear_checkpoints(side: Path) -> None:
    """Remove half-written checkpoint-N from the folder where Trainer writes them, and the folder if it is empty."""
    if not side.is_dir() or side.is_symlink():
        return
    for path in side.iterdir():
        if re.fullmatch(r"checkpoint-\d+", path.name):
            shutil.rmtree(path)
    with contextlib.suppress(OSError):  # it is not empty
        side.rmdir()


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Lock `directory`, made if absent, for this process alone; leftovers of a killed run are removed first.

    The system releases the lock whenever its holder ends, so no lock is ever stale. In a run of several processes
    the first one holds it. Raises UserError if another process holds it.
    """
    if os.name != "posix" or not processes.is_first():
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
    """The lock file, open and locked, with this process's id and machine in it. Raises UserError for another file."""
    import fcntl  # here: it is not on every system

    while True:
        file = _open_lock(path)
        try:
            # a lock of the process, not of the open file: a worker that outlives this process does not keep it
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise UserError(
                f"{path.parent} is in use by {holder}: wait until it has ended, or choose another --output_dir"
            ) from None
        except OSError:  # a file system without locks
            return file
        with contextlib.suppress(FileNotFoundError):  # its holder removed it between opening and locking
            if os.path.samestat(os.fstat(file.fileno()), path.lstat()):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
                file.flush()
                return file
        file.close()


def _open_lock(path: Path) -> Any:
    """Open the lock file, made if absent. A link, a folder or a file with other content of that name is refused."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        handle = None
    if handle is not None:
        about = os.fstat(handle)
        if stat.S_ISREG(about.st_mode) and about.st_nlink <= 1:  # 0: its holder has just removed it
            file = open(handle, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115
            file.seek(0)
            if HOLDER.fullmatch(file.read(1000)):
                return file
            file.close()
        else:
            os.close(handle)
    raise UserError(f"{path} is not a lock but a link or another file: move it away, or choose another --output_dir")


def replace_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new directory beside `target`, then let it replace `target`: see `move_whole`."""
    side = target.with_name(f".{target.name}.partial")
    if PARTIAL_FOLDER.fullmatch(side.name) and not side.is_symlink():
        shutil.rmtree(side, ignore_errors=True)
    elif os.path.lexists(side):
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), str(side))
    try:
        with writing(target):
            write(side)
    except BaseException:
        shutil.rmtree(side, ignore_errors=True)
        raise
    move_whole(side, target)


def todays_results(results: Mapping[str, Any]) -> dict[str, Any]:
    """A results.json with today's names: in earlier versions seq2seq/ had its own schema."""
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
