"""--report_to: services that are absent or do not answer are said before the work begins; `none` writes no curves."""

import importlib.util
import json
import os
import sys
import types

import pytest

from prefixlib import record
from prefixlib.errors import UserError
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
