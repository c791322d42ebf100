"""Commands under test start warm: forked from a process that has imported torch, instead of from a new Python.

A start of Python with torch and transformers costs five seconds and more of a processor, and the tests run hundreds of
commands. After `install`, `subprocess` asks a server process (tests/warm.py) for a fork wherever a test starts this
Python with a script or with -m. Everything else is as it was: the process is a child of the caller, with its own pid,
arguments, folder, environment, descriptors, session, limits, signals and exit code.

Commands start cold, as a user's do, with `-c` or other options of Python, with an environment that differs in what
libraries read while they are imported, with `preexec_fn`, in tests marked `cold`, and always if PREFIX_TUNING_COLD=1.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
AT_IMPORT = (  # beginnings of the names of variables that Python or a library reads once, when it starts
    *("PYTHON", "LD_", "LANG", "LC_", "TZ", "HOME", "XDG_", "MALLOC_", "OMP_", "MKL_", "KMP_", "ATEN_", "ONEDNN_"),
    *("DNNL_", "CUDA_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "DATASETS_", "USE_", "PL_", "MPL"),
)
LIMITS = [number for name, number in vars(resource).items() if name.startswith("RLIMIT_")]
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER

cold_fork_exec = subprocess._fork_exec
Environment = dict[str, str]


def read_at_import(environment: Environment) -> Environment:
    return {name: value for name, value in environment.items() if name.startswith(AT_IMPORT)}


def is_warm(words: Sequence[str], folder: str, environment: Environment, served: Environment) -> bool:
    """Whether `words` start this Python with a script or -m, and what is read at import is as in `served`."""
    if words[0] != sys.executable or read_at_import(environment) != served:
        return False
    program = words[2:3] if words[1:2] == ["-u"] else words[1:2]
    return program == ["-m"] or any(
        not word.startswith("-") and os.path.isfile(os.path.join(folder, word)) for word in program
    )


def fork_exec_by(start: Callable[[dict, list[int]], int], serves: Callable[[], Environment | None]) -> Callable:
    """A stand-in for the function by which `subprocess` starts a process.

    start: (the order, stdin, stdout, stderr and the descriptors to keep) -> pid. serves: the variables of the process
    that will be forked, None where nothing may start warm now.
    """

    def fork_exec(*given):
        (words, _, close_fds, keep, folder, environment, stdin, _, _, stdout, _, stderr, _, report) = given[:14]
        _, new_session, group, *identity = given[14:21]
        words = [os.fsdecode(word) for word in words]
        pairs = os.environb.items() if environment is None else (pair.split(b"=", 1) for pair in environment)
        environment = {os.fsdecode(name): os.fsdecode(value) for name, value in pairs}
        folder = os.path.join(os.getcwd(), os.fsdecode(folder or ""))
        simple = close_fds and set(identity) <= {None, -1} and given[21] is None and os.path.isdir(folder)
        served = serves()
        if served is None or not simple or not is_warm(words, folder, environment, served):
            return cold_fork_exec(*given)
        streams = [own if pipe == -1 else pipe for own, pipe in enumerate((stdin, stdout, stderr))]
        kept = [number for number in keep if number != report]
        umask = os.umask(0o077)
        os.umask(umask)
        order = {
            "words": words[1:],
            "folder": folder,
            "environment": environment,
            "kept": kept,
            "new_session": new_session,
            "group": group,
            "umask": umask,
            "limits": [(number, resource.getrlimit(number)) for number in LIMITS],
            "interruptible": signal.getsignal(signal.SIGINT) != signal.SIG_IGN,
        }
        return start(order, [*streams, *kept])

    return fork_exec


class Server:
    """The process that commands are forked from; it ends when this process does."""

    def __init__(self, environment: Environment) -> None:
        self.socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            words = [sys.executable, "-m", "tests.warm", str(other.fileno())]
            with cold():
                self.process = subprocess.Popen(
                    words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, pass_fds=(other.fileno(),)
                )

    def start(self, order: dict, descriptors: list[int]) -> int:
        """The pid of a new process, a child of this one: its parent has ended, and orphans come to a subreaper."""
        prctl = ctypes.CDLL(None).prctl
        prctl(SUBREAPER, 1, 0, 0, 0)
        try:
            socket.send_fds(self.socket, [json.dumps(order).encode()], descriptors)
            answer = self.socket.recv(100)
        finally:
            prctl(SUBREAPER, 0, 0, 0, 0)
        if not answer:
            raise RuntimeError("the server of warm commands has ended")
        return int(answer)

    def end(self) -> None:
        self.socket.close()
        self.process.wait()


_server: Server | None = None
_environment: Environment = {}  # before a test changes it
_cold = 0


def _serves() -> Environment | None:
    return None if _cold else read_at_import(_environment)


def _start(order: dict, descriptors: list[int]) -> int:
    global _server
    if _server is None:  # the first warm command of this process
        _server = Server(_environment)
    return _server.start(order, descriptors)


def install() -> None:
    """From now on `subprocess` starts commands warm, on Linux."""
    _environment.update(os.environ)
    if sys.platform == "linux" and os.environ.get("PREFIX_TUNING_COLD") != "1":
        subprocess._fork_exec = fork_exec_by(_start, _serves)


def uninstall() -> None:
    """End the server and start commands as Python does."""
    global _server
    subprocess._fork_exec = cold_fork_exec
    if _server is not None:
        _server.end()
        _server = None


@contextlib.contextmanager
def cold() -> Iterator[None]:
    """Commands that are started inside start as a user's do."""
    global _cold
    _cold += 1
    try:
        yield
    finally:
        _cold -= 1


def run_command(*arguments, cwd: Path = ROOT, timeout: float = 240, **kwargs) -> subprocess.CompletedProcess:
    """Run this Python with `arguments` and return its exit code, stdout and stderr."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=timeout, **kwargs
    )
