"""The start of a command: Ctrl-C while libraries are imported, and the garbage collector."""

import signal

import pytest

from tests.conftest import run_command

pytestmark = pytest.mark.cold
SCRIPTS = ("gpt2/run_language_modeling.py", "gpt2/run_generation.py", "seq2seq/finetune.py", "scripts/export.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_while_torch_is_imported_is_one_line(script, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = run_command(script)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "interrupted\n")


def test_other_errors_keep_their_traceback():
    done = run_command("-c", "from prefixlib.system import startup\nstartup.begin()\n1 / 0")
    assert done.returncode == 1
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_garbage_is_looked_for_again_and_not_among_what_was_imported():
    done = run_command(
        "-c",
        "import gc\n"
        "from prefixlib.system import startup\n"
        "from prefixlib.system.errors import one_line_errors\n"
        "with one_line_errors():\n"
        "    print(gc.isenabled(), gc.get_freeze_count())\n"
        "startup.begin()\n"
        "print(gc.isenabled())\n"
        "with one_line_errors():\n"
        "    print(gc.isenabled(), gc.get_freeze_count() > 1000)\n",
    )
    assert done.stdout.splitlines() == ["True 0", "False", "True True"], done.stderr
