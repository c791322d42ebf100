"""Kept folders: damage of any kind is seen, what killed processes left is removed, what others made is not."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from prefixlib.system import cache


@pytest.fixture
def folder(tmp_path):
    """A kept folder of a large file and a small one."""
    cache.keep(tmp_path / "kept", fill)
    return tmp_path / "kept"


def fill(made):
    words = np.random.default_rng(0).integers(1, 2**63, size=5000, dtype=np.uint64)
    (made / "large").write_bytes(words.tobytes() + b"end")
    (made / "small").write_text("x")


def zeros(content):
    return content[:4096] + bytes(4096) + content[8192:]


CHANGES = {
    "a block of zeros": zeros,
    "all zeros": lambda content: bytes(len(content)),
    "one bit": lambda content: content[:9000] + bytes([content[9000] ^ 1]) + content[9001:],
    "the rest": lambda content: content[:-1] + b"!",
    "two blocks changed places": lambda content: content[4096:8192] + content[:4096] + content[8192:],
    "truncated": lambda content: content[:8192],
    "longer": lambda content: content + bytes(4096),
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("change", CHANGES)
def test_damage_is_seen(folder, change):
    assert cache.damage(folder) is None
    content = (folder / "large").read_bytes()
    (folder / "large").write_bytes(CHANGES[change](content))
    assert cache.damage(folder) == "large has changed since it was written"
    cache.keep(folder, fill)
    assert cache.damage(folder) is None
    assert (folder / "large").read_bytes() == content


def test_what_is_missing_is_named(folder, tmp_path):
    (folder / "small").unlink()
    assert cache.damage(folder) == "small is missing"
    for text in ("{", '{"large": 5}'):
        (folder / cache.DIGESTS).write_text(text)
        assert cache.damage(folder) == "digests.json is damaged"
    (folder / cache.DIGESTS).unlink()
    assert cache.damage(folder) == "digests.json is missing"
    assert cache.damage(tmp_path / "other") == "it does not exist"


def test_everything_is_synced_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(cache.files, "sync_file", lambda path: synced.append((path.name, (tmp_path / "kept").exists())))
    cache.keep(tmp_path / "kept", fill)
    assert {("large", False), ("small", False), (cache.DIGESTS, False)} <= set(synced)
    assert not any(too_late for _, too_late in synced)


def test_scratch_folders_of_killed_processes_are_removed_and_others_are_not(tmp_path):
    """A process killed while it fills a folder; one that still fills another; a folder that was not made here."""
    code = (
        "import sys, time; from pathlib import Path; from prefixlib.system import cache\n"
        "cache.keep(Path(sys.argv[1]), lambda made: (print('filling', flush=True), time.sleep(60)))"
    )
    workers = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path / name], stdout=subprocess.PIPE, text=True)
        for name in ("killed", "alive")
    ]
    try:
        for worker in workers:
            assert worker.stdout.readline() == "filling\n"
        os.kill(workers[0].pid, signal.SIGKILL)
        workers[0].wait()
        (tmp_path / ".mine.scratch").mkdir()
        assert len(list(tmp_path.glob(".killed.*"))) == 1
        cache.keep(tmp_path / "kept", fill)
        assert list(tmp_path.glob(".killed.*")) == []
        assert len(list(tmp_path.glob(".alive.*"))) == 1
        assert (tmp_path / ".mine.scratch").is_dir()
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
            worker.stdout.close()
