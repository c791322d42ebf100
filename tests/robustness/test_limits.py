"""Too little memory, a disk that takes no more, too few open files: one line, and nothing already written is lost."""

import json
import os
import resource
import sys
import traceback

import pytest

from prefixlib.system.errors import one_line_errors
from tests.robustness.places import PACKAGES, settings_of
from tests.robustness.test_bad_inputs import contents
from tests.robustness.test_files_are_kept import decode

MEMORY, DISK, FILES = resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE


def memory_in_use():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def under(limit, value, work):
    """Exit code and stderr of `work`, as the command line runs it, in a process of its own with less of something."""
    heard, speak = os.pipe()  # no file: that would be limited, too
    child = os.fork()
    if child == 0:
        code = 99
        os.dup2(speak, 2)
        os.close(speak)
        os.close(heard)
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        try:
            resource.setrlimit(limit, (value, value))
            with one_line_errors():
                work()
            code = 0
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(speak)
    with open(heard, encoding="utf-8") as file:
        said = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def new_inputs(place):
    """Tables without texts: decoded, not scored."""
    entries = json.loads(place.table("test").read_text())["entries"][:4]
    for numbered in entries:
        del next(iter(numbered.values()))["lexicalisations"]
    path = place.data / "new.json"
    path.write_text(json.dumps({"entries": entries}))
    return path


def train(place, **changes):
    quiet = {"skip_decode": True} if place.tree == "gpt2" else {}
    return PACKAGES[place.tree].train(settings_of(place, **{**quiet, **changes}))


WORKS = {
    "train": lambda place: train(place),
    "fine-tune": lambda place: train(place, tuning_mode="finetune", preseqlen=10, mid_dim=512),
    "resume": lambda place: train(place, output_dir=str(place.run), resume=True),
    "decode": lambda place: decode(place, new_inputs(place), output=place.checkpoint),
}


def said_of(place, limit, value, work):
    before = contents(place.base.parent)
    code, said = under(limit, value, lambda: WORKS[work](place))
    after = contents(place.base.parent)
    assert code == 1, said
    assert said.startswith("error: "), said
    assert said.count("\n") == 1, said
    lost = [path for path in before if after.get(path) != before[path] and "tfevents" not in path.name]
    assert not lost
    return said


@pytest.mark.parametrize("work", WORKS)
def test_a_disk_that_takes_no_more(place, work):
    size = {"train": 300, "fine-tune": 100_000, "resume": 300, "decode": 20}[work]
    assert "too large" in said_of(place, DISK, size, work)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the address space")
@pytest.mark.parametrize("work", ["fine-tune"])
def test_too_little_memory(place, work):
    assert "not enough memory" in said_of(place, MEMORY, memory_in_use() + 1_000_000, work)


@pytest.mark.parametrize(("work", "more"), [("train", 0), ("train", 1), ("decode", -100)])
def test_too_few_open_files(place, work, more):
    """Where it is noticed depends on how many are left. With two, only curves may be missing: a warning."""
    free = os.dup(0)
    os.close(free)
    assert "Too many open files" in said_of(place, FILES, max(free + more, 3), work)
