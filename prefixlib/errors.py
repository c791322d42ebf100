"""An error the user can fix, and the wrapper that shows it as one line (standard library only)."""

import contextlib
import os
import re
import signal
import sys
import threading

from prefixlib import processes, startup

# Library messages that mean out of memory, on the processor or a GPU; none comes as a MemoryError.
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc", "can't start new thread", "unable to mmap")


class UserError(Exception):
    """Wrong input: the message names the flag or file:line, the value, and the fix, in one line."""


def first_line(error: BaseException) -> str:
    """What a library's error says, as one line; its kind where it says nothing."""
    said = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().split("\n")[0]  # torch prints in bold
    return (said if len(said) <= 200 else f"{said[:199]}…") or type(error).__name__


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C: the loops say where a run can be resumed, locks are given back."""


def _terminate(*_):
    raise Terminated


@contextlib.contextmanager
def one_line_errors():
    """Turn errors the user can fix into one line on stderr and a non-zero exit; anything else keeps its traceback.

    Exit code: 2 wrong input, 1 operating-system error (disk full, no permission, broken pipe), 130 Ctrl-C, 143 SIGTERM.
    """
    startup.end()
    # a worker ends at once: the process that started it reports the signal
    if threading.current_thread() is threading.main_thread() and not processes.is_worker():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except UserError as error:
        processes.report(f"error: {error}")
        sys.exit(2)
    except OSError as error:
        if error.errno is None:  # raised by a library with its own text, not by the operating system
            raise
        where = f": {error.filename}" if error.filename else ""
        processes.report(f"error: {os.strerror(error.errno)}{where}")
        sys.exit(1)
    except KeyboardInterrupt as stop:
        terminated = isinstance(stop, Terminated)
        processes.report("terminated" if terminated else "interrupted")
        sys.exit(143 if terminated else 130)
    except Exception as error:
        said_no = refused_by_system(error)
        if said_no is None:
            raise
        processes.report(f"error: {said_no}")
        sys.exit(1)


def refused_by_system(error: Exception) -> str | None:
    """The operating system's words where a library wraps them in an error of its own, else None."""
    said = str(error)
    if isinstance(error, MemoryError) or any(words in said for words in OUT_OF_MEMORY):
        return f"there is not enough memory ({first_line(error)}): a smaller --bsz or --batch_size takes less"
    # safetensors and tokenizers, written in Rust; torch, whose file names may stand between
    number = re.search(r"\(os error (\d+)\)", said) or re.search(r"unable to open file <.*> .*\((\d+)\)", said)
    if number:
        return os.strerror(int(number[1]))
    if isinstance(error, RuntimeError) and "Symlink loop" in str(error):
        return str(error)
    if isinstance(error, ValueError) and "embedded null byte" in str(error):
        return "a path with a NUL character in it cannot be opened"
    if isinstance(error, RuntimeError) and re.search(r"Connection (closed|reset) by peer", str(error)):  # gloo, NCCL
        return "another process of this training has ended"
    if "PytorchStreamWriter failed writing file" in str(error):  # torch.save does not report the reason
        return "a file could not be written; is the disk full?"
    return None
