"""The data of a run: recorded in its checkpoints and compared when it is resumed, in both trees, for every kind."""

import json
import logging
from pathlib import Path

import datasets
import pytest
import torch

import gpt2
import seq2seq
from gpt2.model import load_prefix as load_gpt2
from prefixlib.data import data_digests, formats
from prefixlib.system.errors import UserError
from seq2seq.model import load_prefix as load_seq2seq
from tests.conftest import ROOT
from tests.seq2seq_tiny import make_bart

BRIEF = {"preseqlen": 3, "mid_dim": 8, "bsz": 10, "learning_rate": 1e-2, "disable_tqdm": True, "decode": "none"}


def write(path: Path, count: int, word: str = "b") -> Path:
    rows = [{"source": f"a {n}", "target": f"{word} {n % 7}"} for n in range(count)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture(scope="module", params=["gpt2", "seq2seq"])
def tree(request, tmp_path_factory):
    """(train a run in a folder of data, read a prefix) of one tree."""
    if request.param == "gpt2":
        package, base, load, more = (
            gpt2,
            ROOT / "data" / "demo" / "gpt2",
            load_gpt2,
            {"skip_decode": True, "decode": None},
        )
    else:
        base = make_bart(tmp_path_factory.mktemp("models") / "bart", dropout=0.0)
        package, load, more = seq2seq, load_seq2seq, {"num_workers": 0, "num_beams": 1, "max_length": 5, "n_val": 2}

    def run(folder, **settings):
        files = {"train_file": str(folder / "train.jsonl"), "eval_file": str(folder / "dev.jsonl")}
        where = {"model_name_or_path": str(base), "output_dir": str(folder / "out")}
        return package.train(package.Settings(**{"mode": "text", **files, **where, **BRIEF, **more, **settings}))

    return run, load


def test_a_run_with_other_data_is_refused_or_continues_and_says_so(tree, tmp_path, caplog):
    """50 rows cut to 30 between a run and its prolongation; the steps and the record after --allow_other_data yes."""
    caplog.set_level(logging.WARNING)
    run, load = tree
    write(tmp_path / "train.jsonl", 50)
    write(tmp_path / "dev.jsonl", 3)
    first = data_digests.digests({"train": tmp_path / "train.jsonl", "valid": tmp_path / "dev.jsonl"})
    run(tmp_path, epoch=1)
    assert load(tmp_path / "out").task["data"] == first
    size = (tmp_path / "train.jsonl").stat().st_size
    write(tmp_path / "train.jsonl", 30)
    with pytest.raises(UserError, match="--allow_other_data yes continues") as caught:
        run(tmp_path, epoch=2, resume=True)
    assert f"{tmp_path / 'train.jsonl'} is train.jsonl of" in str(caught.value)
    assert f"trained on train.jsonl of {size:,} bytes (SHA-256 {first['train'][0]['sha256'][:12]}" in str(caught.value)
    assert "\n" not in str(caught.value)
    run(tmp_path, epoch=2, resume=True, allow_other_data=True)
    assert "training continues with the present data" in caplog.text
    task = load(tmp_path / "out").task
    assert task["data"]["train"][0]["bytes"] == (tmp_path / "train.jsonl").stat().st_size
    assert task["earlier_data"] == [{"last_step": 5, "data": first}]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["training"]["steps"] == 6  # 2 epochs of 3 steps, 5 of which were made
    assert results["run"]["earlier_data"] == task["earlier_data"]
    run(tmp_path, epoch=3, resume=True)  # the data of the newest checkpoint
    write(tmp_path / "dev.jsonl", 3, word="c")
    with pytest.raises(UserError, match=r"dev\.jsonl is dev\.jsonl of .* and the run was trained on dev\.jsonl of"):
        run(tmp_path, epoch=4, resume=True)


def test_data_that_leave_no_step_are_refused(tree, tmp_path):
    run, _ = tree
    write(tmp_path / "train.jsonl", 50)
    write(tmp_path / "dev.jsonl", 3)
    run(tmp_path, epoch=1)
    write(tmp_path / "train.jsonl", 20)
    with pytest.raises(UserError, match=r"is at step 5, and with these data the run has 4 steps in all, so nothing"):
        run(tmp_path, epoch=2, resume=True, allow_other_data=True)


def test_a_checkpoint_of_an_earlier_version_has_no_digests_and_is_resumed(tree, tmp_path):
    run, load = tree
    write(tmp_path / "train.jsonl", 20)
    write(tmp_path / "dev.jsonl", 3)
    run(tmp_path, epoch=1)
    for path in (tmp_path / "out").rglob("prefix_config.json"):
        config = json.loads(path.read_text())
        del config["task"]["data"]
        path.write_text(json.dumps(config))
    for path in (tmp_path / "out").glob("resume.ckpt"):
        state = torch.load(path, weights_only=True)
        del state["data"]
        torch.save(state, path)
    write(tmp_path / "train.jsonl", 30)
    run(tmp_path, epoch=2, resume=True)
    assert set(load(tmp_path / "out").task["data"]) == {"train", "valid"}


def test_the_digest_of_every_kind_of_data(tmp_path, monkeypatch):
    """Summaries have two files; a saved data set counts by its rows' files; the hub's by its fingerprint."""
    (tmp_path / "train.source").write_text("one\n")
    (tmp_path / "train.target").write_text("1\n")
    before = data_digests.digests({"train": tmp_path / "train.source"})
    assert [(part["file"], part["bytes"]) for part in before["train"]] == [("train.source", 4), ("train.target", 2)]
    (tmp_path / "train.target").write_text("2\n")
    after = data_digests.digests({"train": tmp_path / "train.source"})
    assert "train.target is train.target of 2 bytes" in data_digests.difference(
        before, after, {"train": tmp_path / "train.source"}
    )
    found = {}
    for name, texts in (("one", ["a", "b"]), ("again", ["a", "b"]), ("other", ["a", "c"])):
        datasets.Dataset.from_dict({"source": texts, "target": texts}).save_to_disk(tmp_path / name)
        (found[name],) = data_digests.digests({"train": tmp_path / name})["train"]
    assert found["one"]["sha256"] == found["again"]["sha256"] != found["other"]["sha256"]
    rows = datasets.Dataset.from_dict({"source": ["a"], "target": ["b"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    (hub,) = data_digests.digests({"train": formats.place("owner/name", "train")})["train"]
    assert hub == {"file": "owner/name:train", "bytes": None, "sha256": rows._fingerprint}


def test_the_flag_needs_a_run_to_resume():
    for package in (gpt2, seq2seq):
        with pytest.raises(UserError, match="--resume no and --allow_other_data do not go together"):
            package.Settings(mode="webnlg", allow_other_data=True).check()
