"""The one error a user can mend, and the wrapper that shows it as one line (standard library only)."""

import contextlib
import os
import re
import sys


class UserError(Exception):
    """Wrong input: the message names the flag or file:line, the value, and the fix, in one line."""


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
    number = re.search(r"\(os error (\d+)\)", str(error))  # safetensors and tokenizers, written in Rust
    if number:
        return os.strerror(int(number[1]))
    if isinstance(error, RuntimeError) and "Symlink loop" in str(error):
        return str(error)
    if isinstance(error, ValueError) and "embedded null byte" in str(error):
        return "a path with a NUL character in it cannot be opened"
    if "PytorchStreamWriter failed writing file" in str(error):  # torch.save keeps the reason to itself
        return "a file could not be written; is the disk full?"
    return None
