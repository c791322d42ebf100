"""The one error a user can mend, and the wrapper that shows it as one line (standard library only)."""

import contextlib
import os
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
