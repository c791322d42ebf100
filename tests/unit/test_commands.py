"""Commands that start warm (tests/commands.py) are what they are when they start cold."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import commands
from tests.commands import run_command

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.environ.get("PREFIX_TUNING_COLD") == "1", reason="every command starts cold"
)
REPORT = """
import json, os, resource, signal, sys
print(json.dumps({
    "parent": os.getppid(), "session": os.getsid(0) == os.getpid(), "group": os.getpgrp() == os.getpid(),
    "argv": sys.argv, "path": sys.path[0], "folder": os.getcwd(), "name": __name__, "file": __file__,
    "words": sys.orig_argv[1:], "flags": str(sys.flags), "main": sys.modules["__main__"].__dict__ is globals(),
    "environment": dict(os.environ), "home": os.path.expanduser("~"), "stdin": sys.stdin.read(),
    "open": [n for n in range(64) if os.path.exists(f"/proc/self/fd/{n}")], "umask": os.umask(0o22),
    "files": resource.getrlimit(resource.RLIMIT_NOFILE), "own": [n for n in sys.modules if n.startswith("prefixlib")],
    "signals": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)],
    "lines": [s.line_buffering for s in (sys.stdout, sys.stderr)],
}))
"""
ENDS = {
    "in silence": "",
    "a code": "import sys; sys.exit(3)",
    "words": "import sys; sys.exit('said')",
    "an error": "def fail():\n    1 / 0\n\nprint('before')\nfail()",
    "a syntax error": "def",
    "Ctrl-C": "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)",
    "SIGTERM": "import os, signal, time; os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)",
    "at the exit": "import atexit; atexit.register(print, 'last'); print('first')",
    "a thread": "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.1), print('last'))).start()",
    "os._exit": "import os; print('lost'); os._exit(7)",
    "its own hook": "import sys; sys.excepthook = lambda *error: print('hook'); 1 / 0",
}


@pytest.fixture
def script(tmp_path):
    """A function from code to a script that holds it."""

    def write(code):
        (tmp_path / "script.py").write_text(code)
        return tmp_path / "script.py"

    return write


def both(*words, **how):
    """What a command does when it starts warm, and when it starts cold."""
    how = {"env": dict(os.environ), **how}  # without what C libraries of this process put into theirs
    warm = run_command(*words, **how)
    with commands.cold():
        return warm, run_command(*words, **how)


HOW = {
    "plainly": {},
    "in a session": {"start_new_session": True},
    "in a group": {"process_group": 0},
    "elsewhere": {"cwd": "/", "env": {"PATH": "/bin", "LIGHT": "ü\n", **commands.read_at_import(dict(os.environ))}},
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_a_process_is_given_the_same(script, how):
    path = script(REPORT)
    warm, cold = (json.loads(done.stdout) for done in both(path, "a b", "--c", input="typed\n", **how))
    assert warm == cold
    assert warm["parent"] == os.getpid()
    assert (warm["own"], warm["stdin"], warm["argv"]) == ([], "typed\n", [str(path), "a b", "--c"])


def test_a_module_and_unbuffered(tmp_path):
    (tmp_path / "module.py").write_text(REPORT)
    for words in (["-m", "module", "x"], ["-u", "module.py"]):
        warm, cold = (json.loads(done.stdout) for done in both(*words, cwd=tmp_path))
        for found in (warm, cold) if words[0] == "-u" else ():
            del found["lines"], found["flags"], found["words"]  # it flushes each line
        assert warm == cold


def test_descriptors_are_passed(script):
    heard, speak = os.pipe()
    path = script("import os, sys; os.write(int(sys.argv[1]), b'here')")
    child = subprocess.Popen([sys.executable, path, str(speak)], pass_fds=(speak,))
    os.close(speak)
    assert os.read(heard, 100) == b"here"
    os.close(heard)
    assert child.wait() == 0


@pytest.mark.parametrize("code", ENDS.values(), ids=ENDS)
def test_a_process_ends_the_same(script, code):
    warm, cold = both(script(code))
    assert (warm.returncode, warm.stdout, warm.stderr) == (cold.returncode, cold.stdout, cold.stderr)


HEAVY = "import sys; print('torch' in sys.modules, 'transformers' in sys.modules, flush=True)\n"


def test_what_starts_warm_and_what_starts_cold(script):
    path = script(HEAVY)
    warm, cold = both(path)
    assert (warm.stdout, cold.stdout) == ("True True\n", "False False\n")
    other = {**os.environ, "OMP_NUM_THREADS": "3"}
    for done in (run_command("-c", HEAVY), run_command("-O", path), run_command(path, env=other)):
        assert done.stdout == "False False\n"


@pytest.mark.cold
def test_the_marker(script):
    assert run_command(script(HEAVY)).stdout == "False False\n"


def test_a_command_that_starts_or_becomes_another(tmp_path, script):
    (tmp_path / "heavy.py").write_text(HEAVY + "import os; print(os.getpid(), os.getppid())\nsys.exit(4)")
    becomes = "import os, sys\nprint(os.getpid(), os.getppid(), flush=True)\nos.execv(sys.executable, {})"
    done = run_command(script(becomes.format("[sys.executable, 'heavy.py']")), cwd=tmp_path)
    before, warm, after = done.stdout.splitlines()
    assert (done.returncode, warm, after) == (4, "True True", before)
    starts = "import os, subprocess, sys\nprint(os.getpid(), flush=True)\nsys.exit(subprocess.call({}))"
    done = run_command(script(starts.format("[sys.executable, 'heavy.py']")), cwd=tmp_path)
    pid, warm, child = done.stdout.splitlines()
    assert (done.returncode, warm, child.split()[1]) == (4, "True True", pid)


def test_a_killed_process(script):
    child = subprocess.Popen(
        [sys.executable, script("import time; print('ready', flush=True); time.sleep(99)")], stdout=subprocess.PIPE
    )
    assert child.stdout.read(5) == b"ready"
    assert child.poll() is None
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL


def test_the_server_ends_with_the_process_that_started_it():
    code = (
        "import os, subprocess, sys\nfrom tests import commands\ncommands.install()\n"
        "subprocess.run([sys.executable, '-c', ''])\nassert commands._server is None\n"  # it was not needed
        "subprocess.run([sys.executable, 'gpt2/gen.py', '--help'], stdout=subprocess.DEVNULL)\n"
        "print(commands._server.process.pid, flush=True)\nos.kill(os.getpid(), 9)"
    )
    pid = int(run_command("-c", code).stdout)
    deadline = time.monotonic() + 20
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
