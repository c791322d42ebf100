"""Links are not followed, files of others stay, a folder is replaced whole, names that are too long are refused."""

import contextlib
import errno
import os
import shutil
import types

import pytest
import torch

from prefixlib.checkpoints import card, folder
from prefixlib.system import files
from prefixlib.system.errors import UserError


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "user's file", "folder", "pipe"])
def test_a_lock_that_no_run_made_is_refused_and_stays(tmp_path, kind):
    folder, other = tmp_path / "checkpoint", tmp_path / "other"
    folder.mkdir()
    path = folder / ".lock"
    if kind != "dangling link":
        other.write_text("precious")
    make = {
        "hard link": lambda: os.link(other, path),
        "user's file": lambda: path.write_text("mine"),
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
    }
    make.get(kind, lambda: path.symlink_to(other))()
    with pytest.raises(UserError, match=r"\.lock is not a lock but a link or another file: move it away"):
        files.lock(folder).__enter__()
    assert os.path.lexists(path)
    assert other.exists() == (kind != "dangling link")
    assert kind == "dangling link" or other.read_text() == "precious"
    assert kind != "user's file" or path.read_text() == "mine"


@pytest.mark.parametrize(
    "name",
    [".mywork.partial/a", ".mywork.old.partial/a", ".notes.txt.partial", ".report.12.partial", ".partial/mine"],
)
def test_partial_names_of_others_stay(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    files.remove_partials(tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_what_is_written_replaces_a_link_and_leaves_its_target(tmp_path):
    target = tmp_path / "target"
    target.write_text("precious")
    for name in ("results.json", f".results.json.{os.getpid()}.partial", "command.txt"):
        (tmp_path / name).symlink_to(target)
    files.write_text(tmp_path / "results.json", "new")
    assert (tmp_path / "results.json").read_text() == "new"
    with pytest.raises(OSError, match="symbolic links") as error:
        files.add_line(tmp_path / "command.txt", "python")
    assert error.value.errno == errno.ELOOP
    assert target.read_text() == "precious"


class Killed(BaseException):
    """Stands for SIGKILL."""


def fill(folder, text):
    folder.mkdir()
    for name in ("config", "weights"):
        (folder / name).write_text(text)


def state(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("step", range(1, 12))
def test_a_folder_is_replaced_whole_and_what_a_user_put_there_stays(tmp_path, monkeypatch, step):
    """Killed before any of its steps, the old or the new one is there, and the user's files with it."""
    best = tmp_path / "best"
    files.replace_directory(best, lambda folder: fill(folder, "old"))
    users = {"best_test_beam": "decoded", "results.json": "scores"}
    for name, text in users.items():
        (best / name).write_text(text)
    (best / "notes").mkdir()
    calls = []

    def counted(work):
        def call(*arguments, **named):
            calls.append(work)
            if len(calls) == step:
                raise Killed
            return work(*arguments, **named)

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "unlink", "rmdir", "fsync"):
            patch.setattr(os, name, counted(getattr(os, name)))
        with contextlib.suppress(Killed):
            files.replace_directory(best, lambda folder: fill(folder, "new"))
    files.remove_partials(tmp_path)
    text = state(best)["config"]
    assert text in ("old", "new")
    assert state(best) == {**users, "config": text, "weights": text}
    assert (best / "notes").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert len(calls) == step or text == "new"


def test_a_folder_that_is_a_link_is_replaced_and_its_target_stays(tmp_path):
    fill(tmp_path / "elsewhere", "precious")
    (tmp_path / "best").symlink_to(tmp_path / "elsewhere")
    files.replace_directory(tmp_path / "best", lambda folder: fill(folder, "new"))
    assert not (tmp_path / "best").is_symlink()
    assert state(tmp_path / "elsewhere") == {"config": "precious", "weights": "precious"}


def test_a_users_folder_with_the_name_of_a_partial_one_stays(tmp_path):
    fill(tmp_path / ".mywork.partial", "mine")
    with pytest.raises(FileExistsError):
        files.replace_directory(tmp_path / "mywork", lambda folder: fill(folder, "new"))
    assert state(tmp_path / ".mywork.partial")["config"] == "mine"


def test_a_users_readme_in_best_stays(tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "README.md").write_text("mine")

    def write(folder):
        assert card.path_in(folder).name == "MODEL_CARD.md"
        (folder / "MODEL_CARD.md").write_text(card.CARD_MARK)

    for _ in range(2):
        folder.replace_folder(tmp_path / "best", write)
    assert (tmp_path / "best" / "README.md").read_text() == "mine"


def test_removing_a_run_leaves_what_others_put_into_its_folders(tmp_path):
    for name in ("best/model.safetensors", "best/mine", "checkpoint-3/optimizer.pt", "checkpoint-3/tokenizer.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    shutil.copytree(tmp_path / "best", tmp_path / "linked")
    (tmp_path / "model").symlink_to(tmp_path / "linked")
    folder.clear_run(tmp_path, ("checkpoint-[0-9]*",))
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["best/mine", "linked/mine", "linked/model.safetensors"]
    assert not (tmp_path / "checkpoint-3").exists()
    assert not os.path.lexists(tmp_path / "model")


@pytest.mark.parametrize("length", [200, 240, 300])
def test_names_that_are_too_long_are_found_before_the_work(tmp_path, length):
    output = tmp_path / ("n" * length)
    if length == 200:
        files.check_name(output, "--output_dir", f"{output.name}_valid_nucleus.jsonl")
        files.check_can_write(output, "--output")
        return
    with pytest.raises(UserError, match=r"--output_dir .*: its name is too long by \d+ bytes.*choose a shorter one"):
        files.check_name(output, "--output_dir", f"{output.name}_valid_nucleus.jsonl")
    with pytest.raises(UserError, match="--output .*: its name is too long"):
        files.check_can_write(output / "x" / ("n" * 250), "--output")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is full")
@pytest.mark.parametrize("size", [10, 100_000])
def test_a_full_disk_is_named_whoever_writes(tmp_path, monkeypatch, size):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=0))
    full = os.open("/dev/full", os.O_WRONLY)
    for write in (lambda: torch.save(torch.zeros(size), "/dev/full"), lambda: os.write(full, b"x")):
        with pytest.raises(OSError, match="No space left") as error, files.writing(tmp_path / "checkpoint-3"):
            write()
        assert error.value.filename == str(tmp_path / "checkpoint-3")
    os.close(full)
