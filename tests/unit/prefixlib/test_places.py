"""An installed package: its runs, commands, data and demo are not looked for beside it."""

import shutil
import sys

import pytest

from gpt2 import train_e2e
from prefixlib.data import tasks
from prefixlib.settings.commands import decode_command
from prefixlib.system import places
from prefixlib.system.errors import UserError
from seq2seq import train_bart
from tests.conftest import ROOT, run_command

LAUNCHERS = [train_e2e, train_bart]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A current folder beside an installed package."""
    monkeypatch.setattr(places, "CHECKOUT", False)
    monkeypatch.setattr(places, "DEMO_DATA", tmp_path / "site-packages" / "data" / "demo")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_runs_go_to_the_current_folder(installed, launcher):
    parsed = launcher.parse_args(["--mode", "webnlg", "--dir_name", "mine"])
    tree = launcher.__name__.partition(".")[0]
    assert launcher.output_dir(parsed) == installed / "runs" / tree / "mine"


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_demo_says_where_it_is(installed, launcher):
    with pytest.raises(UserError, match=r"--demo yes: .*they are in the folder data/demo of the repository"):
        launcher.parse_args(["--demo", "yes"])


def test_data_and_commands(installed):
    assert tasks.data_file("webnlg", "test").is_relative_to(installed / "data")
    assert "prepare_data.py webnlg` in a clone of the repository" in tasks.where_to_get("webnlg")
    assert decode_command("decoder-only", "webnlg", "x").startswith("python -m gpt2.gen webnlg yes test x no")
    assert decode_command("encoder-decoder", "xsum", "x").startswith("python -m seq2seq.train_bart --mode xsum ")


def test_printed_commands_are_quoted():
    where = {"data_dir": "my data", "test_file": None}
    assert decode_command("decoder-only", "text", "my run/ü", **where) == (
        "python gpt2/gen.py text yes test 'my run/ü' no --data_dir 'my data'"
    )
    assert decode_command("encoder-decoder", "text", "a b", tuned=True, test_file="it's.jsonl").endswith(
        "--finetune_model_path 'a b' --test_file 'it'\"'\"'s.jsonl'"
    )


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("name", ["..", ".", ""])
def test_a_folder_name_that_is_no_new_folder_is_refused(launcher, name):
    with pytest.raises(UserError, match=r"--dir_name '\.*': names no new folder"):
        launcher.parse_args(["--mode", "webnlg", f"--dir_name={name}"])


def test_modules_run_from_an_installed_copy(tmp_path, monkeypatch):
    """The packages alone, as a wheel holds them, from an empty folder."""
    site, here = tmp_path / "site-packages", tmp_path / "here"
    here.mkdir()
    for package in ("gpt2", "seq2seq", "prefixlib"):
        shutil.copytree(ROOT / package, site / package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("PYTHONPATH", str(site))
    for module in ("gpt2.train_e2e", "seq2seq.train_bart"):
        tree = module.partition(".")[0]
        done = run_command("-m", module, "--mode", "webnlg", "--dir_name", "mine", "--dry_run", cwd=here)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{sys.executable} {site / tree}/")
        assert f"--output_dir {here}/runs/{tree}/mine" in done.stdout
    done = run_command("-m", "gpt2.gen", "webnlg", "yes", "test", ".", "no", "--demo", "yes", cwd=here)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "data/demo of the repository" in done.stderr
    assert not list(here.iterdir())
