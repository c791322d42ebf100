"""What both trees write and record of a decoded split, and which categories count as seen."""

import json

import pytest

import gpt2
import seq2seq
from gpt2 import run_generation
from prefixlib.data.readers import Group
from prefixlib.data.tasks import categories_of
from prefixlib.decoding import outputs
from prefixlib.decoding.outputs import Outputs, score, seen_categories
from prefixlib.runs import record
from seq2seq import finetune
from seq2seq.utils import Example
from tests.conftest import ROOT
from tests.seq2seq_tiny import make_bart

DEMO = ROOT / "data" / "demo"
PARTS = {"train": ("Airport", "Book"), "dev": ("Airport",), "test": ("Airport", "Ship", "Book")}
SEEN = ["Airport", "Book"]  # of them WebNLG 2017 has Airport alone


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two entries of some categories of the demo's WebNLG, and a tiny BART."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "webnlg_challenge_2017").mkdir()
    for split, names in PARTS.items():
        path = DEMO / "webnlg_challenge_2017" / f"{split}.json"
        entries = json.loads(path.read_text())["entries"]
        of_name = {name: [e for e in entries if next(iter(e.values()))["category"] == name] for name in names}
        kept = [entry for name in names for entry in of_name[name][:2]]
        (folder / "webnlg_challenge_2017" / path.name).write_text(json.dumps({"entries": kept}))
    make_bart(folder / "bart")
    return folder


@pytest.fixture
def scored(monkeypatch):
    """The calls of the scorer, which gives one number."""
    calls = []

    def score_task(task, texts, references, **how):
        calls.append((len(texts), how["categories"], how["seen_categories"]))
        return {"BLEU all": 1.0}

    monkeypatch.setattr(outputs, "score_task", score_task)
    return calls


SHORT = {"max_steps": 1, "preseqlen": 2, "mid_dim": 4, "bsz": 4, "disable_tqdm": True, "decode": "test"}


def train_gpt2(place, output):
    where = {"model_name_or_path": str(DEMO / "gpt2"), "data_dir": str(place), "output_dir": str(output)}
    gpt2.train(gpt2.Settings(mode="webnlg", max_new_tokens=5, **where, **SHORT))


def train_seq2seq(place, output):
    where = {"model_name_or_path": str(place / "bart"), "data_dir": str(place), "output_dir": str(output)}
    seq2seq.train(seq2seq.Settings(mode="webnlg", max_length=6, num_beams=2, num_workers=0, **where, **SHORT))


def decode_gpt2(place, checkpoint, output):
    words = ["--mode=webnlg", "--split=test", f"--checkpoint={checkpoint}", f"--data_dir={place}", "--length=5"]
    run_generation.main([*words, f"--output_dir={output}", "--disable_tqdm=yes"])


def decode_seq2seq(place, checkpoint, output):
    kind = "prefix" if (checkpoint / "prefix_config.json").exists() else "finetune"
    words = ["--mode=webnlg", "--do_train=no", f"--{kind}_model_path={checkpoint}", f"--data_dir={place}"]
    finetune.main([*words, f"--output_dir={output}", "--max_length=6", "--num_beams=2", "--disable_tqdm=yes"])


FAMILIES = {"gpt2": (train_gpt2, decode_gpt2, DEMO / "gpt2"), "seq2seq": (train_seq2seq, decode_seq2seq, None)}
OWN_KEYS = {"gpt2": {"samples"}, "seq2seq": {"rule"}}  # of a split in results.json
KEYS = {"data_file", "strategy", "sentences", "sources_cut", "seconds", "step", "scores"}


@pytest.mark.parametrize("family", FAMILIES)
def test_seen_are_the_categories_of_the_training(place, tmp_path, scored, family):
    """After the training, from its checkpoint where its data are not, and of a bare model beside the task's data."""
    train, decode, bare = FAMILIES[family]
    train(place, tmp_path / "run")
    entry = json.loads((tmp_path / "run" / "results.json").read_text())["decoding"]["test"]
    assert entry.keys() == KEYS | OWN_KEYS[family]
    assert (entry["sentences"], entry["step"], entry["scores"]) == (6, 1, {"BLEU all": 1.0})
    config = json.loads((tmp_path / "run" / "prefix_config.json").read_text())
    assert config["task"]["categories"] == SEEN

    alone = tmp_path / "alone" / "webnlg_challenge_2017"
    alone.mkdir(parents=True)
    (alone / "test.json").write_bytes((place / "webnlg_challenge_2017" / "test.json").read_bytes())
    decode(alone.parent, tmp_path / "run", tmp_path / "again")
    decode(place, bare or place / "bart", tmp_path / "bare")
    assert [seen for _, _, seen in scored] == [SEEN, SEEN, SEEN]
    decode(alone.parent, bare or place / "bart", tmp_path / "bare")
    assert scored[-1] == (6, [name for name in PARTS["test"] for _ in range(2)], None)  # then WebNLG 2017's


@pytest.mark.parametrize("kind", [lambda *row: Group(*row, ()), Example])
def test_files_scores_and_entry(tmp_path, kind):
    inputs = [kind("a", ("one\ntwo", "three"), ""), kind("b", ("x",), ""), kind("c", (), "")]
    found = Outputs("text", inputs, [["one\ntwo"], ["y"], ["z"]], [[-1.0], [-2.0], [-3.0]], 1.234)
    found.write(tmp_path / "test_beam", tmp_path / "rows.jsonl")
    assert (tmp_path / "test_beam").read_text() == "one two\ny\nz\n"
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows[0] == {"source": "a", "output": "one\ntwo", "references": ["one\ntwo", "three"], "score": -1.0}
    assert [row["references"] for row in rows[1:]] == [["x"], []]
    assert found.scores(None)["exact match"] == 50  # of the two that have references
    entry = found.entry(tmp_path / "t", {"BLEU": 2.0}, cut=1, strategy="beam", step=7, samples=1)
    assert entry == {
        **{"data_file": str(tmp_path / "t"), "strategy": "beam", "samples": 1, "sentences": 3, "sources_cut": 1},
        **{"seconds": 1.23, "step": 7, "scores": {"BLEU": 2.0}},
    }
    record.record_split(tmp_path, "valid", {"scores": {}})
    record.record_split(tmp_path, "test", entry)
    assert json.loads((tmp_path / "results.json").read_text())["decoding"] == {"valid": {"scores": {}}, "test": entry}


def test_samples_of_an_input_follow_each_other_and_only_the_first_is_scored(tmp_path, scored):
    inputs = [Group("a", ("x",), "", ()), Group("b", ("y",), "", ())]
    found = Outputs("data2text", inputs, [["1", "2"], ["3", "4"]], [[0.0] * 2] * 2, 1.0)
    found.write(tmp_path / "out", tmp_path / "none.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").read_text() == "1\n2\n3\n4\n"
    assert found.scores(None) == {"BLEU all": 1.0}
    assert scored == [(2, None, None)]


def test_inputs_without_references_are_not_scored(caplog):
    assert score("webnlg", ["x"], [Group("a", (), "Airport", ())], SEEN) == {}
    assert "1 of 1 inputs have no reference: they are not scored" in caplog.messages


def test_categories_that_a_checkpoint_names_win_over_the_file(place):
    inputs = [Group("a", ("x",), "Ship", ())]
    assert seen_categories({"categories": ["Ship"]}, inputs, "webnlg", place) == ["Ship"]
    assert seen_categories({"categories": []}, inputs, "webnlg", place) == SEEN
    assert seen_categories({}, [Group("a", ("x",), "", ())], "webnlg", place) is None
    assert categories_of([Example("a", ("b",), name) for name in ("Ship", "", "Book", "Ship")]) == ["Book", "Ship"]
