"""The first seconds of a command, in which torch and transformers are imported (standard library only).

An entry point calls `begin` before its other imports, where it is the script that runs; `one_line_errors` calls `end`.
"""

import gc
import sys

from prefixlib.system import processes, streams


def begin() -> None:
    """Disable garbage collection during imports, and answer Ctrl-C with one line.

    Imported modules stay: scanning them again and again took a third of the time until the first line of a run, and a
    second at its end.
    """
    streams.prepare()
    gc.disable()
    sys.excepthook = _one_line


def end() -> None:
    """After `begin`: collect garbage again, but not among the imported objects. Without `begin`: do nothing."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def _one_line(kind: type[BaseException], error: BaseException, trace) -> None:
    if issubclass(kind, KeyboardInterrupt):
        processes.report("interrupted")
    else:
        sys.__excepthook__(kind, error, trace)
