"""The standard streams of a command: closed, without a reader, or unable to encode a letter (standard library)."""

import atexit
import io
import os
import signal
import sys


class Stream(io.TextIOWrapper):
    """A stdout or stderr that drops its text once its reader has gone, as after `| head`: the work is finished."""

    reader_gone = False

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        self.reader_gone = True
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)


def prepare() -> None:
    """Make stdout and stderr safe: closed ones become the null device, characters they cannot encode are escaped.

    Streams that replace them, such as a test's, stay.
    """
    for number in range(3):
        _open_if_closed(number)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__") or isinstance(stream, Stream):
            continue
        encoding, errors, lines = "utf-8", "strict", True
        if stream is not None:
            stream.flush()
            encoding, errors, lines = stream.encoding, stream.errors, number == 2 or stream.line_buffering
        errors = "backslashreplace" if errors == "strict" else errors
        raw = open(number, "wb", closefd=False)  # noqa: SIM115  it lasts as long as the process
        new = Stream(raw, encoding=encoding, errors=errors, line_buffering=lines)
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)


def _open_if_closed(number: int) -> None:
    """Open a closed descriptor on the null device: else the next file would get its number, and the messages."""
    try:
        os.fstat(number)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null != number:
            os.dup2(null, number)
            os.close(null)
        os.set_inheritable(number, True)


def end() -> None:
    """After successful work: if a reader has gone, end as Unix tools do, by SIGPIPE."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, Stream)]
    for stream in streams:
        stream.flush()
    if any(stream.reader_gone for stream in streams):
        atexit._run_exitfuncs()
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGPIPE)
