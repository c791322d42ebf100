"""Several processes: torchrun with one line instead of its tracebacks, and workers that end with it.

python -m prefixlib.system.processes --standalone --nproc_per_node 2 gpt2/run_language_modeling.py --mode webnlg ...
"""

import contextlib
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator

PARENT = "PREFIX_TUNING_LAUNCHER"  # the pid of the process below, in its workers' environment
RESUME = "--resume yes continues from the newest checkpoint, if one was written"


# ---- the processes of a run --------------------------------------------------------------------------------------

# Variables that torchrun and clusters set; they are read nowhere else.
VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = 3  # seconds of waiting for other processes until a line says so


def _number(name: str, default: int) -> int:
    from prefixlib.system.errors import UserError  # here: that module imports this one

    given = os.environ.get(name, "").strip() or str(default)
    if not given.isdecimal():
        raise UserError(f"{name}={given} in the environment: must be a whole number; unset it to train in one process")
    return int(given)


def world_size() -> int:
    """The processes of this run on all machines."""
    return max(_number("WORLD_SIZE", 1), 1)


def local_world_size() -> int:
    """The processes of this run on this machine."""
    return max(_number("LOCAL_WORLD_SIZE", 1), 1) if world_size() > 1 else 1


def rank() -> int:
    """The number of this process in its run, from 0."""
    return _number("RANK", 0) if world_size() > 1 else 0


def is_first() -> bool:
    """Whether this process writes the run's files."""
    return rank() == 0


def forget_others() -> None:
    """Before work in one process: forget the variables that a cluster or a shell left in the environment."""
    for name in (*VARIABLES, "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)


def connect() -> None:
    """Before a training: connect the processes of the run; a run of one forgets variables that others left.

    Raises UserError if the environment names several processes but not, or wrongly, the address where they meet.
    """
    from prefixlib.system.errors import UserError, first_line  # here: as above

    world = world_size()
    if world == 1:
        if not is_worker():
            forget_others()
        return
    absent = [name for name in VARIABLES if not os.environ.get(name)]
    if absent or rank() >= world:
        what = f"{', '.join(absent)} not" if absent else f"RANK={rank()} too"
        raise UserError(
            f"WORLD_SIZE={world} is set in the environment, {what}: unset WORLD_SIZE and RANK to train in one "
            "process, or start several with --num_processes or torchrun"
        )
    from torch import cuda, distributed  # here: the launchers, which import this file, do not need it

    if not distributed.is_available() or distributed.is_initialized():
        return
    started_here = os.environ.get(PARENT) == str(os.getppid())  # a worker of the process below: all start together
    shown = " ".join(f"{name}={os.environ[name]}" for name in VARIABLES)
    cause = f"{shown} are set in the environment; unset them to train in one process"
    others = "another process" if world == 2 else f"{world - 1} other processes"
    try:
        with _waiting("" if started_here else f"waiting for {others} of this run: {cause}"):
            distributed.init_process_group("nccl" if cuda.is_available() else "gloo")
    except (ValueError, distributed.DistError) as error:  # a wrong port, one in use, an unknown address
        if started_here:
            raise
        raise UserError(f"the processes of this run cannot meet ({first_line(error)}): {cause}") from error


@contextlib.contextmanager
def _waiting(line: str) -> Iterator[None]:
    """While torch's C++ waits for other processes: say so after PATIENCE seconds; let Ctrl-C and SIGTERM end it.

    Python calls its signal handlers between its own lines alone; a thread hears of signals at once. They are kept from
    this one, whose C++ would print how it was interrupted.
    """
    if os.name != "posix" or threading.current_thread() is not threading.main_thread():
        yield
        return
    over, (heard, speak) = threading.Event(), os.pipe()
    os.set_blocking(speak, False)
    earlier = signal.set_wakeup_fd(speak, warn_on_full_buffer=False)
    thread = threading.Thread(target=_hear, args=(heard, over, line), daemon=True)
    thread.start()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        over.set()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.set_wakeup_fd(earlier)
        os.write(speak, b"\0")
        thread.join()
        os.close(speak)
        os.close(heard)


def _hear(heard: int, over: threading.Event, line: str) -> None:
    if not select.select([heard], [], [], PATIENCE)[0] and line:
        print(line, file=sys.stderr, flush=True)
    while not over.is_set():
        number = os.read(heard, 1)[0]
        if number in (signal.SIGINT, signal.SIGTERM) and not over.wait(1):  # else the main thread ended the waiting
            report("interrupted" if number == signal.SIGINT else "terminated")
            os._exit(128 + number)


# ---- the workers -------------------------------------------------------------------------------------------------


def is_worker() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def end_with_parent() -> None:
    """In a worker: end when the process that started it ends, even by `kill -9`."""
    if not is_worker():
        return
    parent = int(os.environ.get(PARENT, os.getppid()))
    if sys.platform == "linux":
        import ctypes  # here: the launchers, which import this file, do not need it

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it was killed before this line
        os._exit(1)


def ignore_signals(worker: int = 0) -> None:
    """In a DataLoader's worker: leave Ctrl-C and SIGTERM, sent to the whole group, to the training process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def workers_that_fit(wanted: int) -> int:
    """The DataLoader workers that the limit of open files allows: `wanted`, or none, with a warning.

    A worker's batch needs an open file for each of its arrays; if none is left, worker and training wait for each
    other forever.
    """
    if not wanted or sys.platform == "win32":
        return wanted
    import logging
    import resource  # here: it is not on every system

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 128 + 64 * wanted
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    logging.getLogger(__name__).warning(
        "--num_workers %d: too few files may be open (ulimit -n is %d, %d are needed): the training process prepares "
        "the batches itself",
        *(wanted, soft, needed),
    )
    return 0


def leave() -> None:
    """In a worker, at its end: close the connections to the others. Left open, their threads can abort the process."""
    if is_worker():
        from torch import distributed  # here: as above

        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def report(line: str) -> None:
    """Print a last line on stderr; a worker hands it to the process below, which prints one for all workers."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if PARENT not in os.environ or not path:
        print(line, file=sys.stderr, flush=True)
        return
    with open(path, "w", encoding="utf-8") as file:  # in the form that torchrun reads
        json.dump({"message": {"message": line, "extraInfo": {"timestamp": int(time.time())}}}, file)


# ---- the process that starts them --------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Run torchrun; returns the exit code: 130 after Ctrl-C, 143 after SIGTERM, else the failed worker's."""
    import logging

    _on_signals(lambda number, frame: os._exit(_stopped(number, "nothing was started")))
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    received = []

    def stop(number, frame):
        received.append(number)
        raise SignalException("", signal.SIGTERM)  # forwarded; workers exit without output

    _on_signals(stop)
    os.environ[PARENT] = str(os.getpid())
    logging.disable()  # torchrun's log repeats the message below
    args = run.parse_args(["--signals-to-handle", "SIGHUP,SIGQUIT", *argv])
    try:
        run.run(args)
    except SignalException as end:
        ranks = f"ranks 0 to {int(args.nproc_per_node) - 1} were stopped; {RESUME}"
        return _stopped(received[0] if received else end.sigval, ranks)
    except ChildFailedError as error:
        line, code = _cause(error.failures)
        print(line, file=sys.stderr)
        return code
    return 0


def _on_signals(handler) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _stopped(number: int, what: str) -> int:
    """Print which signal came and what it stopped; returns the exit code."""
    print(f"{'interrupted' if number == signal.SIGINT else 'terminated'}: {what}", file=sys.stderr, flush=True)
    return 128 + number


def _cause(failures) -> tuple[str, int]:
    """The line and exit code of the worker whose failure ended the others; failures: rank -> ProcessFailure."""

    def order(rank: int) -> tuple:
        code = failures[rank].exitcode
        lost_another = "another process of this training" in str(failures[rank].message)
        return code == -signal.SIGTERM, lost_another, code > 0, rank

    rank = min(failures, key=order)
    failure = failures[rank]
    if failure.exitcode < 0:
        memory = " (out of memory?)" if failure.exitcode == -signal.SIGKILL else ""
        line = f"error: rank {rank} was ended by {failure.signal_name()}{memory}, the others were stopped; {RESUME}"
        return line, 1
    written = failure.error_file_data.get("message")
    if isinstance(written, dict):
        return written["message"], failure.exitcode
    return f"error: rank {rank} failed, its traceback is above; the others were stopped; {RESUME}", failure.exitcode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
