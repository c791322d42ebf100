"""The process that commands under test are forked from (tests/commands.py), and what a forked one does first.

python -m tests.warm DESCRIPTOR     the end of a socket, over which orders come and pids go back

It never computes: a process must have a single thread when it forks. A forked process forgets what was imported of
this repository, so that a command imports its own code as always.
"""

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import logging
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
import types
import weakref
from pathlib import Path

from tests.commands import ROOT, Environment, fork_exec_by, is_warm, read_at_import

ENTRIES = ("gpt2.run_language_modeling", "gpt2.run_generation", "seq2seq.finetune", "prefixlib.system.processes")
LATE = (  # imported by the libraries when they are first used
    *("transformers.models.gpt2.modeling_gpt2", "transformers.models.bart.modeling_bart"),
    *("transformers.models.auto.modeling_auto", "transformers.generation.utils"),
    *("torch.distributed.run", "torch.utils.tensorboard", "matplotlib.pyplot", "matplotlib.backends.backend_agg"),
    *("rouge_score.rouge_scorer", "sacrebleu.metrics"),
)
MEMORY_THREAD = "jemalloc_bg_thd"  # pyarrow's memory manager; it knows how to fork
FIRST_FREE = 200  # descriptors are moved here before they get their numbers
VARIABLES = read_at_import(dict(os.environ))
cold_execv = os.execv


def serve(orders: socket.socket) -> None:
    """Fork for each order, until the other end is closed."""
    while True:
        text, descriptors, _, _ = socket.recv_fds(orders, 1 << 20, 100)
        if not text:
            return
        heard, speak = os.pipe()
        between = os.fork()
        if between == 0:  # it ends at once, so that the command becomes a child of the process that asked
            pid = os.fork()
            if pid == 0:
                become(json.loads(text), descriptors)
            os.write(speak, str(pid).encode())
            os._exit(0)
        for descriptor in (speak, *descriptors):
            os.close(descriptor)
        os.waitpid(between, 0)
        orders.send(os.read(heard, 100))
        os.close(heard)


# ---- a forked process --------------------------------------------------------------------------------------------


def fork_here(order: dict, descriptors: list[int]) -> int:
    """Fork what a warm command itself starts with this Python."""
    pid = os.fork()
    if pid == 0:
        weakref.finalize._registry.clear()  # its temporary folders are not the new process's
        become(order, descriptors)
    return pid


def exec_here(path: str, words: list[str]) -> None:
    """Do what os.execv does, without a start of Python where a warm command becomes another one."""
    if path != words[0] or not is_warm(words, os.getcwd(), dict(os.environ), VARIABLES):
        cold_execv(path, words)
    run(list(words[1:]))


def become(order: dict, descriptors: list[int]) -> None:
    """Take over everything that a new process is given, and run its command. Never returns."""
    try:
        if order["new_session"]:
            os.setsid()
        if order["group"] >= 0:
            os.setpgid(0, order["group"])
        moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, FIRST_FREE) for descriptor in descriptors]
        os.closerange(0, FIRST_FREE)
        for source, number in zip(moved, (0, 1, 2, *order["kept"]), strict=True):
            os.dup2(source, number)
        os.closerange(FIRST_FREE, max(moved) + 1)
        os.chdir(order["folder"])
        os.umask(order["umask"])
        replace_environment(order["environment"])
        for number, limit in order["limits"]:
            if resource.getrlimit(number) != tuple(limit):
                resource.setrlimit(number, limit)
        signal.signal(signal.SIGINT, signal.default_int_handler if order["interruptible"] else signal.SIG_IGN)
        for stream in (sys.stdin, sys.stdout):
            stream.reconfigure(line_buffering=stream.isatty())
        run(order["words"])
    finally:
        os._exit(255)


def replace_environment(environment: Environment) -> None:
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


def run(words: list[str]) -> None:
    """Run a script, or a module with -m, as a Python that has just started does, and end as it does."""
    reset()
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.orig_argv = [sys.executable, *words]
    code = 0
    if words[0] == "-u":
        sys.stdout.reconfigure(line_buffering=True, write_through=True)
        words = words[1:]
    try:
        if words[0] == "-m":
            sys.argv, sys.path[0] = [words[0], *words[2:]], os.getcwd()
            runpy._run_module_as_main(words[1])
        else:
            path = os.path.abspath(words[0])
            sys.argv, sys.path[0] = list(words), os.path.dirname(os.path.realpath(path))
            main.__file__ = path
            exec(compile(Path(path).read_bytes(), path, "exec"), main.__dict__)
    except BaseException as error:
        code = code_of(error)
    end(code)


def reset() -> None:
    """Undo what the command before this one may have changed, and forget this repository's modules."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""  # .venv may be inside the repository; what is installed stays
        if file.startswith(f"{ROOT}{os.sep}") and not file.startswith(f"{sys.prefix}{os.sep}"):
            del sys.modules[name]
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.excepthook = sys.__excepthook__
    logging.disable(logging.NOTSET)
    logging.root.handlers.clear()
    gc.enable()


def code_of(error: BaseException) -> int:
    """The exit code after `error`, which is shown as Python shows it."""
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 0xFF
        print(error.code, file=sys.stderr)
        return 1
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename in (__file__, "<frozen runpy>"):
        trace = trace.tb_next
    sys.excepthook(type(error), error.with_traceback(trace), trace)
    return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1


def end(code: int) -> None:
    """Wait for threads, run what is to run at the exit, flush, and end."""
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError as error:
        print(f"Exception ignored in: {sys.stdout}\n{type(error).__name__}: {error}", file=sys.stderr)
        code = 120
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


# ---- the server --------------------------------------------------------------------------------------------------


def main(descriptor: int) -> None:
    """Import what commands import, and serve."""
    gc.disable()
    for name in (*ENTRIES, *LATE):
        importlib.import_module(name)
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the commands; this process ends with the tests
    os.execv = exec_here
    subprocess._fork_exec = fork_exec_by(fork_here, lambda: VARIABLES)
    threads = [Path(f"/proc/self/task/{thread}/comm").read_text().strip() for thread in os.listdir("/proc/self/task")]
    assert len(set(threads) - {MEMORY_THREAD}) == 1, f"{threads}: what is imported must start no threads"
    with socket.socket(fileno=descriptor) as orders:
        serve(orders)
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
