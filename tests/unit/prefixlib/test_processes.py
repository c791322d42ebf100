"""The processes of a run: what clusters leave in the environment, waiting for others, signals of a process group."""

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time

import pytest

from prefixlib.system import files, processes
from prefixlib.system.errors import UserError
from tests.conftest import ROOT
from tests.seq2seq_tiny import make_bart, make_summaries, training_flags


@pytest.fixture
def environment(monkeypatch):
    """Sets the variables of a cluster in an environment without any."""

    def set_all(**values):
        for name in (*processes.VARIABLES, "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_all


PLACE = {"LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


def test_one_process_forgets_what_others_left(environment, tmp_path):
    environment(RANK="3", LOCAL_RANK="3", WORLD_SIZE="1", LOCAL_WORLD_SIZE="4")
    assert (processes.rank(), processes.world_size(), processes.local_world_size()) == (0, 1, 1)
    with files.lock(tmp_path):
        assert (tmp_path / ".lock").is_file()
    processes.connect()
    assert not {*processes.VARIABLES, "LOCAL_WORLD_SIZE"} & os.environ.keys()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set in the environment, RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT not: unset WORLD_SIZE and RANK"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment: must be a whole number"),
        ({"WORLD_SIZE": "2", **PLACE, "RANK": "-1"}, "RANK=-1 in the environment: must be a whole number"),
        (
            {"WORLD_SIZE": "2", **PLACE, "RANK": "2"},
            "WORLD_SIZE=2 is set in the environment, RANK=2 too",
        ),
    ],
)
def test_an_environment_that_fits_no_run_is_refused(environment, values, message):
    environment(**values)
    with pytest.raises(UserError, match=message):
        processes.connect()


def test_processes_that_cannot_meet_are_one_line(environment):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        for port, said in (
            (str(taken.getsockname()[1]), "address already in use"),
            ("99999", "port must have value from 0"),
            ("first", "invalid literal"),
        ):
            environment(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            line = (
                f"cannot meet .*{said}.*: WORLD_SIZE=2 RANK=0 .*MASTER_PORT={port} are set in .*; unset them to train"
            )
            with pytest.raises(UserError, match=line):
                processes.connect()


def test_the_environment_of_other_processes_is_read_in_one_place():
    sources = [path for tree in ("gpt2", "seq2seq", "prefixlib") for path in (ROOT / tree).rglob("*.py")]
    reads = re.compile(r"environ.*\b(WORLD_SIZE|RANK|LOCAL_RANK|LOCAL_WORLD_SIZE)\b")
    found = {path.name for path in sources if reads.search(path.read_text())}
    assert found <= {"processes.py"}
    assert len(sources) > 50


CONNECT = """
from prefixlib.system import processes
from prefixlib.system.errors import one_line_errors
with one_line_errors():
    processes.connect()
"""


@pytest.mark.parametrize(
    ("rank", "number", "code", "line"), [(0, "SIGTERM", 143, "terminated"), (1, "SIGINT", 130, "interrupted")]
)
def test_waiting_for_others_is_said_and_signals_end_it(rank, number, code, line):
    variables = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    variables["MASTER_PORT"] = str(29000 + os.getpid() % 1000)
    words = {"env": {**os.environ, **variables}, "cwd": ROOT, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", CONNECT], **words)
    try:
        assert re.match(
            rf"waiting for another process of this run: WORLD_SIZE=2 RANK={rank} ", process.stderr.readline()
        )
        process.send_signal(getattr(signal, number))
        said = process.communicate(timeout=20)[1]
    finally:
        process.kill()
    assert (process.returncode, said) == (code, f"{line}\n")


def test_workers_of_a_loader_leave_signals_to_the_training():
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        processes.ignore_signals()
        os.write(writer, b"1")
        signal.sigtimedwait([], 0.3)
        os._exit(7)
    os.read(reader, 1)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(child, number)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.parametrize(("limits", "workers"), [((24, 24), 0), ((24, 4096), 2), ((4096, 4096), 2), ((-1, -1), 2)])
def test_workers_need_open_files(monkeypatch, caplog, limits, workers):
    given = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: given.append(pair))
    assert processes.workers_that_fit(2) == workers
    assert ("--num_workers 2: too few files may be open (ulimit -n is 24" in caplog.text) == (not workers)
    assert given == {(24, 24): [(24, 24)], (24, 4096): [(256, 4096)]}.get(limits, [])
    assert processes.workers_that_fit(0) == 0


SLOW_STEP = """
import sys
import torch
from seq2seq import finetune
from seq2seq.lightning_base import SummarizationModule
from prefixlib.system.errors import one_line_errors
step = SummarizationModule.training_step
def slow(*arguments):
    print("step", flush=True)
    torch.linalg.svd(torch.rand(900, 900))  # a second without a line of Python: signals are handled together after it
    return step(*arguments)
SummarizationModule.training_step = slow
with one_line_errors():
    finetune.main(sys.argv[1:])
"""


def test_a_signal_to_the_whole_group_ends_a_training_with_workers(tmp_path):
    """As clusters and Ctrl-C send it: to the training and to the workers that prepare its batches."""
    make_bart(tmp_path / "bart")
    make_summaries(tmp_path / "data", train=200)
    words = training_flags(tmp_path / "bart", tmp_path / "data", tmp_path / "run", num_workers=1, epoch=50)
    words = [*words, "--disable_tqdm=yes", "--report_to=none"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    process = subprocess.Popen([sys.executable, "-c", SLOW_STEP, *words], start_new_session=True, **pipes)
    try:
        assert process.stdout.readline() == "step\n"
        time.sleep(0.3)  # the step has begun
        os.killpg(process.pid, signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 143, said
    assert said.splitlines()[-1] == "terminated"
    assert "Traceback" not in said
