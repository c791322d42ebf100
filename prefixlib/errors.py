"""The one error a user can mend, and the wrapper that shows it as one line (standard library only)."""

import contextlib
import os
import re
import sys

# How libraries put it that there is no memory left, on the processor or a GPU, none of them as a MemoryError.
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc", "can't start new thread", "unable to mmap")


class UserError(Exception):
    """Wrong input: the message names the flag or file:line, the value, and the fix, in one line."""


def first_line(error: BaseException) -> str:
    """What a library's error says, as one line; its kind where it says nothing."""
    said = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().split("\n")[0]  # torch prints in bold
    return (said if len(said) <= 200 else f"{said[:199]}…") or type(error).__name__


@contextlib.contextmanager
def one_line_errors():
    """Turn what a user can mend into one line on stderr and a non-zero exit; anything else keeps its traceback.

    Exit codes: 2 wrong input, 1 the machine said no (disk full, no permission, broken pipe), 130 Ctrl-C.
    """
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno is None:  # raised by a library with its own text, not by the operating system
            raise
        where = f": {error.filename}" if error.filename else ""
        print(f"error: {os.strerror(error.errno)}{where}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        said_no = refused_by_system(error)
        if said_no is None:
            raise
        print(f"error: {said_no}", file=sys.stderr)
        sys.exit(1)


def refused_by_system(error: Exception) -> str | None:
    """The operating system's words where a library wraps them in an error of its own, else None."""
    said = str(error)
    if isinstance(error, MemoryError) or any(words in said for words in OUT_OF_MEMORY):
        return f"there is not enough memory ({first_line(error)}): a smaller --bsz or --batch_size takes less"
    number = re.search(r"\(os error (\d+)\)", said)  # safetensors and tokenizers, written in Rust
    if number:
        return os.strerror(int(number[1]))
    if isinstance(error, RuntimeError) and "Symlink loop" in str(error):
        return str(error)
    if isinstance(error, ValueError) and "embedded null byte" in str(error):
        return "a path with a NUL character in it cannot be opened"
    if "PytorchStreamWriter failed writing file" in str(error):  # torch.save keeps the reason to itself
        return "a file could not be written; is the disk full?"
    return None
