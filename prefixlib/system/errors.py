"""An error the user can fix, and the wrapper that shows it as one line (standard library only)."""

import contextlib
import os
import re
import signal
import sys
import threading

from prefixlib.system import processes, startup, streams

# Library messages that mean out of memory, on the processor or a GPU; none comes as a MemoryError.
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc", "can't start new thread", "unable to mmap")


class UserError(Exception):
    """Wrong input: the message names the flag or file:line, the value, and the fix, in one line."""


def first_line(error: BaseException) -> str:
    """The message of a library's error as one line, or its type if it has none."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().split("\n")  # torch prints in bold
    said = lines[0] if not lines[0].endswith(":") else " ".join(line.strip() for line in lines)
    return (said if len(said) <= 200 else f"{said[:199]}…") or type(error).__name__


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C: the loops say where a run can be resumed, locks are released."""


def _terminate(*_):
    raise Terminated


@contextlib.contextmanager
def one_line_errors():
    """Turn errors the user can fix into one line on stderr and a non-zero exit; anything else keeps its traceback.

    Exit code: 2 wrong input, 1 operating-system error (disk full, no permission), 130 Ctrl-C, 143 SIGTERM. If the
    reader of stdout or stderr has gone, the work is finished, and the process then ends by SIGPIPE.
    """
    streams.prepare()
    startup.end()
    # a worker ends at once: the process that started it reports the signal
    if threading.current_thread() is threading.main_thread() and not processes.is_worker():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
        streams.end()
    except SystemExit as ended:
        if not ended.code:
            streams.end()
        raise
    except UserError as error:
        processes.report(f"error: {error}")
        sys.exit(2)
    except OSError as error:
        if error.errno is None:  # raised by a library with its own text, not by the operating system
            raise
        processes.report(f"error: {_words_of(error)}")
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


def _words_of(error: OSError) -> str:
    return os.strerror(error.errno) + (f": {error.filename}" if error.filename else "")


def refused_by_system(error: Exception) -> str | None:
    """The operating system's message if a library wraps it in its own error, else None."""
    said = str(error)
    if isinstance(error, MemoryError) or any(words in said for words in OUT_OF_MEMORY):
        return f"there is not enough memory ({first_line(error)}): use a smaller --bsz or --batch_size"
    number = system_number(error)
    if number:
        return os.strerror(number)
    if isinstance(error, RuntimeError) and "Symlink loop" in str(error):
        return str(error)
    if isinstance(error, ValueError) and "embedded null byte" in str(error):
        return "a path that contains a NUL character cannot be opened"
    if isinstance(error, RuntimeError) and re.search(r"Connection (closed|reset) by peer", str(error)):  # gloo, NCCL
        return "another process of this training has ended"
    if is_failed_save(error):
        return "a file could not be written; is the disk full?"
    if isinstance(error, RuntimeError) and "Could not determine home directory" in said:
        return "no home folder is known (HOME is not set): write paths without ~"
    if isinstance(error, UnicodeEncodeError) and "surrogates not allowed" in said:
        word = re.search(r"\S*[\ud800-\udfff]\S*", error.object)[0]
        return f"{word!r} is not UTF-8 here: rename the file or folder, or set PYTHONUTF8=1"
    return None


def is_failed_save(error: BaseException) -> bool:
    """Whether torch.save could not write a file: it does not report the reason."""
    words = ("PytorchStreamWriter failed writing file", "inline_container.cc", "iostream error")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def system_number(error: BaseException) -> int | None:
    """The operating system's error number, also if a library written in Rust or C++ wraps the error, else None."""
    if isinstance(error, OSError):
        return error.errno
    if is_failed_save(error) and error.__context__ is not None:  # Python opened the file: its error came first
        return system_number(error.__context__)
    said = str(error)
    # first safetensors and tokenizers, written in Rust; then torch, whose messages contain file names
    found = re.search(r"\(os error (\d+)\)", said) or re.search(r"unable to open file <.*> .*\((\d+)\)", said)
    return int(found[1]) if found else None
