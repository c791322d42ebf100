"""The standard streams: a reader that goes, closed ones, a terminal without the letters of a name."""

import os
import signal
import subprocess
import sys

import pytest

from tests.conftest import ROOT

WORK = """
import sys
from prefixlib.system.errors import one_line_errors
with one_line_errors():
    for number in range(20000):
        print("line", number)
    print("an error of", number, file=sys.stderr)
    open(sys.argv[1], "w").write("finished")
    {end}
"""


def shell(line, code, *words, **environment):
    """Run `line` in a shell, $0 being this Python, $1 the code."""
    command = ["bash", "-c", line, sys.executable, code, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, env={**os.environ, **environment}, timeout=60)


@pytest.mark.parametrize(("end", "code"), [("", 128 + signal.SIGPIPE), ("sys.exit(0)", 141), ("sys.exit(3)", 3)])
@pytest.mark.parametrize("redirection", ["", "2>&1"])
def test_work_is_finished_when_the_reader_has_gone(tmp_path, end, code, redirection):
    line = f'"$0" -c "$1" "$2" {redirection} | head -1; exit ${{PIPESTATUS[0]}}'
    done = shell(line, WORK.format(end=end), tmp_path / "result")
    assert (tmp_path / "result").read_text() == "finished"
    assert done.stdout == b"line 0\n"
    assert done.stderr == (b"" if redirection else b"an error of 19999\n")
    assert done.returncode == code


def test_closed_streams_do_not_end_the_work(tmp_path):
    """The first file that is opened does not get stderr's number, and with it the messages."""
    done = shell('"$0" -c "$1" "$2" <&- >&- 2>&-', WORK.format(end=""), tmp_path / "result")
    assert (done.returncode, (tmp_path / "result").read_text()) == (0, "finished")


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONIOENCODING": "utf-8"}])
@pytest.mark.parametrize("name", ["'/tmp/m\\u00fc'", "'/tmp/m\\udcfc'"])
def test_a_name_is_said_on_every_terminal(environment, name):
    code = f"from prefixlib.system.errors import UserError, one_line_errors\nwith one_line_errors():\n print({name})\n"
    done = shell('"$0" -c "$1"', f"{code} raise UserError({name})", **environment)
    assert done.returncode == 2
    assert done.stdout.startswith(b"/tmp/m")
    assert done.stderr.startswith(b"error: /tmp/m")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("code", "line"),
    [
        (
            "open('x', 'w', encoding='utf-8').write('a /tmp/m\\udcfc b')",
            "error: '/tmp/m\\udcfc' is not UTF-8 here: rename",
        ),
        (
            "import os, pathlib\n os.path.expanduser = str\n pathlib.Path('~/x').expanduser()",
            "error: no home folder is known (HOME is not set): write paths without ~",
        ),
    ],
)
def test_names_that_cannot_be_written_are_one_line(tmp_path, code, line):
    done = shell(
        'cd "$2"; "$0" -c "$1"',
        f"from prefixlib.system.errors import one_line_errors\nwith one_line_errors():\n {code}\n",
        tmp_path,
        PYTHONPATH=str(ROOT),
    )
    assert done.returncode == 1
    assert done.stderr.decode().startswith(line)
    assert done.stderr.count(b"\n") == 1
