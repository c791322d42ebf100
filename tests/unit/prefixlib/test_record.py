"""--report_to: services that are absent or do not answer are said before the work begins; `none` writes no curves."""

import importlib.util
import json
import os
import shutil
import sys
import types

import pytest
from torch.optim import AdamW

from prefixlib.runs import record
from prefixlib.system.errors import UserError
from prefixlib.system.places import DEMO_DATA
from tests.conftest import run_command


def test_a_service_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--report_to mlflow needs a package: pip install mlflow"):
        record.set_up_reporting("mlflow")


@pytest.mark.parametrize(("name", "call"), [("wandb", "login"), ("mlflow", "search_experiments")])
def test_a_service_that_does_not_answer(monkeypatch, name, call):
    def refuse(**_):
        raise RuntimeError("no key\nhow to get one")

    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**{call: refuse}, __spec__=object()))
    with pytest.raises(UserError, match=f"^--report_to {name}: no key$"):
        record.set_up_reporting(name)


@pytest.mark.parametrize("tree", ["gpt2/train_e2e.py", "seq2seq/train_bart.py"])
@pytest.mark.parametrize("service", ["none", "wandb", "mlflow"])
def test_runs_report_where_they_are_told(tree, service, tmp_path):
    if service != "none":
        pytest.importorskip(service)
    environment = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "MLFLOW_ALLOW_FILE_STORE": "true"}
    environment |= {"MLFLOW_TRACKING_URI": f"file:{tmp_path}/mlflow"}
    output = tmp_path / "run"
    flags = ["--demo", "yes", "--max_steps", 2, "--logging_steps", 1, "--decode", "none", "--report_to", service]
    done = run_command(tree, *flags, "--output_dir", output, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    assert json.loads((output / "results.json").read_text())["training"]["steps"] == 2
    assert not {"runs", "tensorboard"} & {path.name for path in output.iterdir()}
    written = [*tmp_path.rglob("metrics/loss"), *tmp_path.rglob("offline-run-*/run-*.wandb")]
    assert len(written) == (service != "none")


@pytest.mark.parametrize(("bf16", "fast", "warns"), [(True, False, True), (True, True, False), (False, False, False)])
def test_slow_bfloat16_is_said(monkeypatch, caplog, bf16, fast, warns):
    monkeypatch.setattr(record, "has_fast_bfloat16", lambda: fast)
    record.check_machine(bf16=bf16)
    assert ("--bf16 yes: this processor has no instructions for bfloat16" in caplog.text) == warns


class Recorder:
    def __init__(self):
        self.calls = 0

    def log(self, value):
        self.calls += 1
        missing = FileNotFoundError(2, "No such file or directory", "runs/events")
        if value == "bad":
            raise missing
        if value == "wrapped":  # as Lightning does it
            raise ValueError("you tried to log a value which is not supported") from missing
        return value


@pytest.mark.parametrize("bad", ["bad", "wrapped"])
def test_a_recorder_that_fails_ends_with_one_warning(caplog, bad):
    recorder = record.guarded(Recorder, ("log",))()
    assert recorder.log("good") == "good"
    assert [recorder.log(bad) for _ in range(3)] == [None] * 3
    assert recorder.calls == 2
    assert caplog.text.count("the curves (--report_to) end here ([Errno 2] No such file or directory") == 1


def test_what_only_records_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    for name in ("file/loss.png", "file/x/loss.png"):
        record.plot_curves(tmp_path / name, {"dev": [(1, 2.0)]}, xlabel="", ylabel="", title="")
    assert caplog.text.count("loss.png could not be written") == 2


FOLDERS = {"gpt2": "runs", "seq2seq": "tensorboard"}


@pytest.mark.parametrize("broken", ["removed", "a file", "another file"])
@pytest.mark.parametrize("tree", FOLDERS)
def test_a_run_outlives_its_records(tree, broken, tmp_path, monkeypatch, caplog, capfd):
    """The folder of the curves is removed, or cannot be made; nor can other records be written."""
    output = tmp_path / "run"
    folder = output / FOLDERS[tree]
    output.mkdir()
    if broken == "a file":
        folder.write_text("")
    elif broken == "another file":
        (output / "settings.json" / "x").mkdir(parents=True)
    else:
        monkeypatch.setattr(AdamW, "step", and_remove(AdamW.step, folder))
    demo = {
        "data_dir": str(DEMO_DATA),
        "model_name_or_path": str(DEMO_DATA / {"gpt2": "gpt2", "seq2seq": "bart"}[tree]),
    }
    demo |= {"max_steps": 3, "logging_steps": 1, "preseqlen": 2, "mid_dim": 4, "bsz": 2, "disable_tqdm": True}
    demo |= {"seq2seq": {"n_val": 2, "num_workers": 0}, "gpt2": {"eval_steps": 3, "max_steps": 2}}[tree]
    package = importlib.import_module(tree)
    package.train(package.Settings(mode="webnlg", output_dir=str(output), decode="none", **demo))
    assert (output / "prefix_model.safetensors").is_file()
    assert record.read_results(output)["training"]["steps"] == demo["max_steps"]
    wanted = {"another file": ["settings.json could"]}.get(broken, ["the curves (--report_to)"])
    said = [row.getMessage() for row in caplog.records if row.levelname == "WARNING"]
    if broken == "a file" and tree == "seq2seq":
        wanted = ["TensorBoard's curves could"]
    assert [line[: len(start)] for line, start in zip(said, wanted, strict=True)] == wanted
    assert "Traceback" not in capfd.readouterr().err


def and_remove(work, folder):
    def call(*arguments, **named):
        shutil.rmtree(folder, ignore_errors=True)
        return work(*arguments, **named)

    return call
