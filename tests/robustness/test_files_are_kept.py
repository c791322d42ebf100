"""What lies in a folder already is kept: results that cannot be merged, the user's own README, an earlier command."""

import json

import pytest

from gpt2 import run_generation
from prefixlib.checkpoints import card, checkpoint
from prefixlib.runs import launch, record
from prefixlib.system.errors import UserError
from seq2seq import finetune
from tests.robustness.bad_inputs import SPOILT_JSON
from tests.robustness.places import PACKAGES, settings_of

UNMERGEABLE = {
    **SPOILT_JSON,
    "a training that is a list": b'{"training": [1]}',
    "a decoding of texts": b'{"decoding": {"test": "x"}}',
    "an earlier version's, odd": b'{"train": {"curves": 1}}',
}


def train(place, **changes):
    quiet = {"skip_decode": True} if place.tree == "gpt2" else {}
    return PACKAGES[place.tree].train(settings_of(place, **{**quiet, **changes}))


def decode(place, file, *words, mode="webnlg", output=None):
    """Decode a file with the checkpoint as the command line does; returns the outputs' text."""
    output = output or place.output
    where = [f"--mode={mode}", f"--output_dir={output}", "--disable_tqdm=yes", "--num_beams=1", *words]
    if place.tree == "gpt2":
        more = ["--split=test", f"--checkpoint={place.checkpoint}", f"--data_file={file}", "--length=3"]
        run_generation.main([*where, *more])
        return (output / "checkpoint_test_beam").read_text()
    more = [f"--prefix_model_path={place.checkpoint}", f"--test_file={file}", "--max_length=12", "--min_length=2"]
    finetune.main([*where, "--do_train=no", *more])
    return next(output.glob("test_beam_*")).read_text()


@pytest.mark.parametrize("kind", UNMERGEABLE)
def test_results_that_cannot_be_merged_are_set_aside(kind, tmp_path, caplog):
    (tmp_path / "results.json").write_bytes(UNMERGEABLE[kind])
    (tmp_path / "results.damaged-1.json").write_text("an earlier one")
    record.set_aside_damaged(tmp_path)
    assert (tmp_path / "results.damaged-2.json").read_bytes() == UNMERGEABLE[kind]
    assert (tmp_path / "results.damaged-1.json").read_text() == "an earlier one"
    assert "it is kept as results.damaged-2.json" in caplog.text
    record.update_results(tmp_path, {"training": {"steps": 1}})
    assert record.read_results(tmp_path) == {"training": {"steps": 1}}


def test_results_of_no_run_are_merged_into(tmp_path, caplog):
    (tmp_path / "results.json").write_text('{"mine": 1}')
    record.set_aside_damaged(tmp_path)
    record.update_results(tmp_path, {"training": {"steps": 1}})
    assert record.read_results(tmp_path) == {"mine": 1, "training": {"steps": 1}}
    assert not caplog.text


def test_damaged_results_are_set_aside_before_the_work(place, monkeypatch):
    """Training and decoding end well, and the file was moved before the model was loaded."""
    place.output.mkdir()
    (place.output / "results.json").write_text("[")
    monkeypatch.setattr(record, "update_results", lambda *_: pytest.fail("it was to be moved by now"))
    with pytest.raises(pytest.fail.Exception):
        train(place)
    assert (place.output / "results.damaged-1.json").read_text() == "["
    monkeypatch.undo()
    (place.checkpoint / "results.json").write_text('{"decoding": 1}')
    assert decode(place, place.table("test"), "--limit=2", output=place.checkpoint).count("\n") == 2
    assert json.loads((place.checkpoint / "results.json").read_text())["decoding"]["test"]["sentences"] == 2
    assert (place.checkpoint / "results.damaged-1.json").read_text() == '{"decoding": 1}'


def test_a_users_readme_stays(place, caplog):
    place.output.mkdir()
    (place.output / "README.md").write_text("# Mine\n")
    train(place)
    assert (place.output / "README.md").read_text() == "# Mine\n"
    assert card.CARD_MARK in (place.output / "MODEL_CARD.md").read_text()
    assert "README.md is not a model card and stays: the card is MODEL_CARD.md" in caplog.text
    checkpoint.refresh_card(place.output, {"test BLEU": 12.5})
    assert "| test BLEU | 12.5" in (place.output / "MODEL_CARD.md").read_text()
    (place.output / "loss.png").write_bytes(b"")
    train(place, overwrite_output_dir=True)
    assert (place.output / "README.md").read_text() == "# Mine\n"
    assert (place.output / "loss.png").read_bytes()
    (place.output / "MODEL_CARD.md").write_text("also mine")
    checkpoint.refresh_card(place.output, {"test BLEU": 13.5})
    assert (place.output / "MODEL_CARD.md").read_text() == "also mine"
    assert "no card is written" in caplog.text


def test_our_own_card_is_replaced(place):
    assert card.path_in(place.checkpoint).name == "README.md"
    train(place, output_dir=str(place.checkpoint), overwrite_output_dir=True)
    assert not (place.checkpoint / "MODEL_CARD.md").exists()


def test_a_refused_command_does_not_take_the_place_of_an_earlier_one(tmp_path, monkeypatch):
    monkeypatch.setattr(launch.os, "execv", lambda *_: None)
    for word in ("first", "second"):
        launch.run(["python", word], dry_run=False, save_to=tmp_path / "command.txt")
    assert (tmp_path / "command.txt").read_text() == "python first\npython second\n"


# ---- inputs without references -----------------------------------------------------------------------------------


def test_inputs_alone_are_decoded_and_not_scored(place, caplog):
    """A line of output for each line of input, equal ones too, and a word that nothing was scored."""
    e2e = {"gpt2": "data2text", "seq2seq": "e2e"}[place.tree]
    for mode, split in ((e2e, "x.txt"), ("xsum", "x.source"), ("xsum", "documents.txt")):
        config = json.loads((place.checkpoint / checkpoint.CONFIG).read_text())
        config["task"]["mode"] = mode
        (place.checkpoint / checkpoint.CONFIG).write_text(json.dumps(config))
        path = place.data / split
        path.write_text("name : A | area : b\nname : C | area : d\nname : A | area : b\n")
        caplog.clear()
        outputs = decode(place, path, mode=mode).splitlines()
        assert len(outputs) == 3
        assert outputs[0] == outputs[2]
        assert "3 of 3 inputs have no reference: they are not scored" in caplog.text
        assert record.read_results(place.output)["decoding"]["test"]["scores"] == {}
        assert len(decode(place, path, "--limit=2", mode=mode).splitlines()) == 2


def test_blank_targets_are_not_scored(place, caplog):
    config = json.loads((place.checkpoint / checkpoint.CONFIG).read_text())
    config["task"]["mode"] = "xsum"
    (place.checkpoint / checkpoint.CONFIG).write_text(json.dumps(config))
    (place.data / "x.source").write_text("one thing\nand another\nand a third\n")
    (place.data / "x.target").write_text("a summary\n\na third\n")
    assert len(decode(place, place.data / "x.source", mode="xsum").splitlines()) == 3
    assert "1 of 3 inputs have no reference: they are not scored" in caplog.text
    assert "ROUGE-1" in record.read_results(place.output)["decoding"]["test"]["scores"]


def test_a_blank_line_among_inputs_would_shift_the_outputs(place):
    config = json.loads((place.checkpoint / checkpoint.CONFIG).read_text())
    config["task"]["mode"] = "xsum"
    (place.checkpoint / checkpoint.CONFIG).write_text(json.dumps(config))
    (place.data / "x.txt").write_text("one thing\n\nand a third\n")
    with pytest.raises(UserError, match=r"x.txt:2: expected one (input|document) a line, found an? (blank|empty) line"):
        decode(place, place.data / "x.txt", mode="xsum")
