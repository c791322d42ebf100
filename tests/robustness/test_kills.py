"""Killed runs, stopped processes, two runs in one folder: nothing lost, nothing differs, one line says what to do."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from gpt2 import run_generation, run_language_modeling
from prefixlib.system import files
from prefixlib.system.errors import UserError
from seq2seq import finetune, train_bart
from seq2seq.lightning_base import SummarizationModule
from tests.conftest import ROOT
from tests.robustness import kill_campaign
from tests.robustness.kill_campaign import CASES, Whole

slow = pytest.mark.skipif(os.environ.get("PREFIX_TUNING_SLOW") != "1", reason="PREFIX_TUNING_SLOW=1 runs it")


# ---- kill -9 -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return kill_campaign.prepare(tmp_path_factory.mktemp("kills"))


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("bart, steps", ("before decode_batch", 4)),  # in a validation: its step has a checkpoint as well
        ("bart, steps", ("before replace results.json", 0)),  # trained, but nothing says so yet
        ("gpt2, epochs", ("before prediction_step", 0)),
        ("gpt2, epochs", ("before replace results.json", 0)),
    ],
)
def test_a_killed_run_leaves_what_the_unbroken_one_leaves(place, wholes, name, where):
    whole = wholes(name)
    killed, problem = whole.killed_at(whole.place(*where))
    assert (killed, problem) == (1, "")


@pytest.fixture(scope="module")
def wholes(place):
    known = {}

    def find(name):
        known[name] = known.get(name) or Whole.run(place, name)
        return known[name]

    return find


@slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", CASES)
def test_campaign(place, name, tmp_path):
    killed, problems = kill_campaign.campaign(kill_campaign.prepare(tmp_path), name, kills=20, seed=1)
    assert problems == []
    assert killed >= 20


# ---- several processes -------------------------------------------------------------------------------------------

WORKER = """
import os, sys, time
from prefixlib.system import processes
from prefixlib.system.errors import UserError, one_line_errors
with one_line_errors():
    processes.end_with_parent()
    open(os.path.join(sys.argv[1], os.environ["RANK"]), "w").write(str(os.getpid()))
    while not os.path.exists(os.path.join(sys.argv[1], "fail")):
        time.sleep(0.01)
    raise UserError("the same in both")
"""
RESUME = "--resume yes continues from the newest checkpoint, if one was written"


@pytest.mark.parametrize(
    ("what", "code", "line"),
    [
        ("SIGINT", 130, f"interrupted: ranks 0 to 1 were stopped; {RESUME}"),
        ("SIGTERM", 143, f"terminated: ranks 0 to 1 were stopped; {RESUME}"),
        (
            "worker",
            1,
            f"error: rank 1 was ended by SIGKILL (out of memory?), the others were stopped; {RESUME}",
        ),
        ("fail", 2, "error: the same in both"),
        ("SIGKILL", -9, ""),
    ],
)
def test_several_processes_end_together_with_one_line(tmp_path, what, code, line):
    (tmp_path / "worker.py").write_text(WORKER)
    command = [
        "-m",
        "prefixlib.system.processes",
        "--standalone",
        "--nproc_per_node",
        "2",
        tmp_path / "worker.py",
        tmp_path,
    ]
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    pids = [int(_content(tmp_path / rank)) for rank in ("0", "1")]
    if what == "worker":
        os.kill(pids[1], signal.SIGKILL)
    elif what == "fail":
        (tmp_path / "fail").touch()
    else:
        process.send_signal(getattr(signal, what))
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert stderr.splitlines() == ([line] if line else [])
    deadline = time.time() + 10
    while any(map(_is_alive, pids)) and time.time() < deadline:
        time.sleep(0.05)
    alive = [pid for pid in pids if _is_alive(pid)]
    (tmp_path / "fail").touch()  # whatever is left ends now
    assert not alive


def _content(path):
    deadline = time.time() + 60
    while time.time() < deadline:
        if path.is_file() and path.read_text():
            return path.read_text()
        time.sleep(0.02)
    raise AssertionError(f"{path} was not written")


def _is_alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("tree", ["gpt2/train_e2e.py", "seq2seq/train_bart.py"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_training_whose_worker_is_killed_goes_on_from_its_checkpoint(tmp_path, tree, victim):
    output = tmp_path / "run"
    flags = ["--demo", "yes", "--epoch", "500", "--save_steps", "5", "--bsz", "4", "--disable_tqdm", "yes"]
    flags += ["--output_dir", str(output), "--num_processes", "2"]
    process = subprocess.Popen([sys.executable, tree, *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 200
    while not list(output.glob("checkpoint-*")) + list(output.glob("resume.ckpt")) and time.time() < deadline:
        time.sleep(0.1)
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    os.kill(int(listed.stdout.split()[victim]), signal.SIGKILL)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert f"error: rank {victim} was ended by SIGKILL" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert len([line for line in stderr.splitlines() if " INFO " not in line]) < 10


# ---- two runs in one folder --------------------------------------------------------------------------------------

HOLD = """
import sys, time
from prefixlib.system import files
with files.lock({!r}):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder tmp_path / "run"."""
    code = HOLD.format(str(tmp_path / "run")).replace("files.lock(", "files.lock(__import__('pathlib').Path(")
    code = code.replace("'):", "')):")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_into_the_same_folder_is_refused(place, holder, tmp_path):
    output = tmp_path / "run"
    (output / "command.txt").write_text("of the first")
    where = ["--model_name_or_path", "x", "--data_dir", str(place), "--output_dir", str(output)]
    decode = ["--do_train", "no", "--prefix_model_path", str(output), "--output_dir", str(output)]
    tries = [
        lambda: run_language_modeling.main(["--mode", "data2text", *where]),
        lambda: finetune.main(["--mode", "xsum", *where]),
        lambda: finetune.main(["--mode", "xsum", *decode]),
        lambda: run_generation.main(
            ["--mode", "data2text", "--split", "test", "--data_dir", str(place), "--checkpoint", str(output)]
        ),
        lambda: train_bart.main(["--mode", "xsum", *where]),
        lambda: run_language_modeling.main(["--mode", "data2text", *where, "--resume", "yes"]),
    ]
    for run in tries:
        with pytest.raises(UserError, match=rf"{output} is in use by process {holder.pid} on \S+: wait until it has"):
            run()
    assert (output / "command.txt").read_text() == "of the first"


def test_the_lock_of_a_killed_run_is_none_and_a_finished_run_leaves_none(holder, tmp_path):
    holder.kill()
    holder.wait()
    output = tmp_path / "run"
    assert (output / ".lock").is_file()
    with files.lock(output):
        assert str(os.getpid()) in (output / ".lock").read_text()
        (output / "result").touch()
    assert [path.name for path in output.iterdir()] == ["result"]
    with files.lock(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()  # nothing came of it


def test_what_a_killed_run_had_half_written_goes_and_what_it_was_replacing_comes_back(tmp_path):
    for name in (".partial/checkpoint-3/weights", ".best.old.partial/weights", ".model.old.partial/old", "model/new"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for name in (".results.json.17.partial", ".resume.ckpt.partial", ".hidden", "a.partial"):
        (tmp_path / name).write_text(name)
    with files.lock(tmp_path):
        found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"best/weights", "model/new", ".hidden", "a.partial", ".lock"}


# ---- longer than planned -----------------------------------------------------------------------------------------


def test_a_finished_gpt2_run_is_prolonged_under_a_new_schedule(place, tmp_path, caplog):
    caplog.set_level("INFO", logger="prefixlib")
    output, case = tmp_path / "run", CASES["gpt2, epochs"]
    flags = {**{"mode": "data2text", "model_name_or_path": kill_campaign.DEMO / "gpt2", "data_dir": place}}
    flags |= {"preseqlen": 3, "mid_dim": 8, "bsz": 4, "learning_rate": 0.01, "skip_decode": "yes"}
    flags |= {**case.flags, "output_dir": output, "logging_steps": 1, "resume": "yes", "disable_tqdm": "yes"}

    def run(**more):
        run_language_modeling.main([f"--{name}={value}" for name, value in {**flags, **more}.items()])
        return json.loads((output / "results.json").read_text())

    first = run(epoch=1)
    assert first["training"]["steps"] == 4
    with pytest.raises(UserError, match=r"--epoch 0.5 contradicts .*, which was trained with epoch 1.0"):
        run(epoch=0.5)
    second = run(epoch=2)
    assert "(--epoch 1.0 --max_steps -1); it is prolonged (--epoch 2.0 --max_steps -1): from here the" in caplog.text
    assert second["training"]["steps"] == 8
    assert second["training"]["curves"]["train"][:4] == first["training"]["curves"]["train"]
    rows = json.loads((output / "trainer_state.json").read_text())["log_history"]
    rates = [row["learning_rate"] for row in rows if "learning_rate" in row]
    wanted = [0.01, 0.0075, 0.005, 0.0025, *(0.01 * (8 - step) / 8 for step in range(4, 8))]
    assert rates == pytest.approx(wanted)
    for step, third in enumerate((run(max_steps=9), run(max_steps=9))):
        assert third["training"]["steps"] == 9, step
        assert third["run"]["earlier_schedules"] == [
            {"last_step": 4, "epoch": 1.0, "max_steps": -1},
            {"last_step": 8, "epoch": 2.0, "max_steps": -1},
        ]
        assert (third["run"]["epoch"], third["run"]["max_steps"]) == (2.0, 9)
    config = json.loads((output / "prefix_config.json").read_text())
    assert config["task"]["earlier_schedules"] == third["run"]["earlier_schedules"]


@pytest.mark.parametrize(("short", "long"), [({"epoch": 1}, {"epoch": 2}), ({"max_steps": 3}, {"max_steps": 8})])
def test_a_finished_bart_run_is_prolonged(place, tmp_path, caplog, short, long):
    """At a constant rate, where a new schedule changes nothing, it equals the run that was long from the start."""
    caplog.set_level("INFO", logger="prefixlib")

    def run(name, **changes):
        settings = {"lr_scheduler": "constant", "dropout": 0.2, "logging_steps": 2, "disable_tqdm": "yes", **changes}
        words = kill_campaign.training_flags(place / "bart", place / "summaries", tmp_path / name, **settings)
        finetune.main(words)
        return json.loads((tmp_path / name / "results.json").read_text())

    first = run("a", **short)
    second = run("a", **long, resume="yes")
    whole = run("b", **long)
    assert "it is prolonged" in caplog.text
    weights = [(tmp_path / name / "prefix_model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    assert second["training"]["last"] == whole["training"]["last"]
    assert dict(whole["training"]["curves"]["dev"]).items() <= dict(second["training"]["curves"]["dev"]).items()
    (name, value), steps = next(iter(short.items())), first["training"]["steps"]
    expected = [{"last_step": steps, "epoch": 2, "max_steps": -1, name: value}]
    assert second["run"]["earlier_schedules"] == expected
    assert torch.load(tmp_path / "a" / "resume.ckpt", weights_only=True)["earlier_schedules"] == expected
    assert run("a", **long, resume="yes") == second  # nothing is left
    with pytest.raises(UserError, match=f"--{name} {value} contradicts .*resume.ckpt, which was made with"):
        run("a", **short, resume="yes")
    (tmp_path / "a" / "resume.ckpt").unlink()
    with pytest.raises(UserError, match="holds prefix_config.json but no resume.ckpt, so its run cannot go on"):
        run("a", **{name: 50}, resume="yes")


def test_a_prolonged_run_takes_the_rate_of_its_new_schedule_at_once(place, tmp_path, monkeypatch):
    rates, step = [], SummarizationModule.training_step

    def look(module, *arguments):
        rates.append(module.trainer.optimizers[0].param_groups[0]["lr"])
        return step(module, *arguments)

    monkeypatch.setattr(SummarizationModule, "training_step", look)
    for epoch in (1, 2):
        words = {"epoch": epoch, "resume": "yes"}
        finetune.main(kill_campaign.training_flags(place / "bart", place / "summaries", tmp_path / "a", **words))
    planned = [0.01 * (5 - step) / 5 for step in range(5)]
    assert rates == pytest.approx([*planned, *(0.01 * (10 - step) / 10 for step in range(5, 10))])
