"""Several processes: torchrun with one line where it prints tracebacks, and workers that end with it.

python -m prefixlib.processes --standalone --nproc_per_node 2 gpt2/run_language_modeling.py --mode webnlg ...
"""

import json
import os
import signal
import sys
import threading
import time

PARENT = "PREFIX_TUNING_LAUNCHER"  # the pid of the process below, in its workers' environment
RESUME = "--resume yes goes on from the newest checkpoint, if one was written"


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
        import ctypes  # here: the launchers, which import this file, do without

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it was killed before this line
        os._exit(1)


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
        print(line, file=sys.stderr)
        return
    with open(path, "w", encoding="utf-8") as file:  # in the form that torchrun reads
        json.dump({"message": {"message": line, "extraInfo": {"timestamp": int(time.time())}}}, file)


# ---- the process that starts them --------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Run torchrun; returns the exit code: 130 after Ctrl-C, 143 after SIGTERM, else that of the worker that failed."""
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
    """Say which signal came and what it stopped; returns the exit code."""
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
