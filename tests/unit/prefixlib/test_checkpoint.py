"""The prefix checkpoint: what comes back, what is refused, and in which words."""

import json

import pytest
import torch
from safetensors.torch import load_file

from gpt2.model import load_prefix, save_prefix
from prefixlib.checkpoints import checkpoint, original
from prefixlib.system import files
from prefixlib.system.errors import UserError

BASE, TASK = (
    {"name": "openai-community/gpt2", "revision": None},
    {"mode": "webnlg", "seed": 101, "categories": ["Airport"]},
)


@pytest.fixture
def saved(tiny_lm, tmp_path):
    save_prefix(tmp_path / "run", tiny_lm.prefix, BASE, TASK, scores={"valid BLEU": 12.5})
    return tmp_path / "run", tiny_lm.prefix


def test_everything_comes_back(saved):
    directory, prefix = saved
    loaded = load_prefix(directory)
    assert loaded.config == prefix.config
    assert (loaded.base, loaded.task) == (BASE, TASK)
    assert loaded.network.keys() == prefix.state_dict().keys()
    assert all(torch.equal(loaded.network[name], tensor) for name, tensor in prefix.state_dict().items())
    assert torch.equal(loaded.flat, prefix.flat())
    assert {path.name for path in directory.iterdir()} == {
        "prefix_config.json",
        "prefix_model.safetensors",
        "prefix_flat.safetensors",
        "README.md",
    }
    card = (directory / "README.md").read_text()
    assert "| valid BLEU | 12.5 |" in card
    assert "gen.py webnlg yes test" in card


def test_scores_join_those_that_the_card_has(saved):
    directory, _ = saved
    checkpoint.refresh_card(directory, {"test BLEU": 45.129381, "test METEOR": None})
    checkpoint.refresh_card(directory, {"test BLEU": 50.0, "test TER": 1.00756})
    lines = (directory / "README.md").read_text().splitlines()
    assert lines[-4:] == [
        "| valid BLEU | 12.5 |",
        "| test BLEU | 50 |",
        "| test METEOR | n/a |",
        "| test TER | 1.008 |",
    ]
    assert sum("| mode | webnlg |" in line for line in lines) == 1
    assert load_prefix(directory).base == BASE


def test_a_card_without_scores_takes_some(tiny_lm, tmp_path):
    save_prefix(tmp_path, tiny_lm.prefix, BASE, TASK)
    assert (tmp_path / "README.md").read_text().endswith("| not scored | |\n")
    checkpoint.refresh_card(tmp_path, {"test BLEU": 1.5})
    assert (tmp_path / "README.md").read_text().endswith("|---|---|\n| test BLEU | 1.5 |\n")
    (tmp_path / "README.md").unlink()
    checkpoint.refresh_card(tmp_path, {"test BLEU": 2.5})
    assert (tmp_path / "README.md").read_text().endswith("|---|---|\n| test BLEU | 2.5 |\n")


def test_a_cards_paths_are_relative_to_it(tiny_lm, tmp_path):
    directory = tmp_path / "runs" / "one"
    task = {**TASK, "finetuned_model_path": str(tmp_path / "teacher")}
    save_prefix(directory, tiny_lm.prefix, {"name": str(tmp_path / "models" / "base"), "revision": None}, task)
    card = (directory / "README.md").read_text()
    assert card.startswith("# Prefix for ../../models/base\n")
    assert "| finetuned_model_path | ../../teacher |" in card
    assert str(tmp_path) not in card
    assert load_prefix(directory).base["name"] == str(tmp_path / "models" / "base")  # to be found from anywhere


def test_the_flat_file_alone_is_the_prefix(saved):
    """Rows are positions, columns layer0.K, layer0.V, layer1.K ...: what decoding and other tools read."""
    directory, prefix = saved
    flat = load_file(directory / "prefix_flat.safetensors")["prefix"]
    assert flat.shape == (3, 2 * 2 * 16)
    keys = prefix(1)[1][0]  # layer 1, (1, H, P, D)
    assert torch.equal(flat[:, 32:48].view(3, 2, 8).permute(1, 0, 2), keys[0])


@pytest.mark.parametrize("name", ["prefix_model.safetensors", "prefix_flat.safetensors"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_file_is_named(saved, name, damage):
    path = saved[0] / name
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    with pytest.raises(UserError, match=f"{name} is (damaged|missing)"):
        load_prefix(saved[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format": 99, "family": "decoder-only"}', "has format 99; this version reads up to 1"),
        ('{"format": 1, "family": "decoder-only"}', "no base_model, files, prefix, task"),
    ],
)
def test_a_bad_config_is_one_line(saved, content, message):
    (saved[0] / "prefix_config.json").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load_prefix(saved[0])
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_the_other_tree_is_refused(saved):
    path = saved[0] / "prefix_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "family": "encoder-decoder"}))
    with pytest.raises(UserError, match="a prefix of the kind encoder-decoder; the kind decoder-only is needed here"):
        load_prefix(saved[0])


def test_settings_of_a_later_version_are_refused(saved):
    path = saved[0] / "prefix_config.json"
    config = json.loads(path.read_text())
    config["prefix"]["colour"] = "blue"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"settings are not known here .*colour"):
        load_prefix(saved[0])


def test_no_folder_and_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_prefix(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"neither prefix_config.json nor config.json \+ pytorch_model.bin"):
        load_prefix(tmp_path)


def test_flags_that_contradict_name_both_values():
    checkpoint.check_agrees({"preseqlen": 5, "mode": None}, {"preseqlen": 5, "mode": "webnlg"}, "DIR")
    with pytest.raises(UserError, match="--preseqlen 10 contradicts DIR, which was trained with preseqlen 5"):
        checkpoint.check_agrees({"preseqlen": 10}, {"preseqlen": 5}, "DIR")


def write_original(directory, prefix, **changes):
    """A checkpoint as the original code wrote it."""
    config = {"n_layer": 2, "n_head": 2, "n_embd": 16, "preseqlen": 3, "mid_dim": 8, "format_mode": "cat"}
    config |= {"optim_prefix": True, "_my_arg_task_mode": "webnlg", "_my_arg_tune_mode": "prefixtune"}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    torch.save({**prefix.state_dict(), **changes}, directory / "pytorch_model.bin")
    return directory


def test_a_checkpoint_of_the_original_loads(tiny_lm, tmp_path):
    loaded = load_prefix(write_original(tmp_path / "original", tiny_lm.prefix))
    assert loaded.config == tiny_lm.prefix.config
    assert torch.equal(loaded.flat, tiny_lm.prefix.flat())
    assert loaded.task["mode"] == "webnlg"
    assert original.is_prefix(tmp_path / "original")


def test_a_checkpoint_with_another_array_is_refused(tiny_lm, tmp_path):
    directory = write_original(tmp_path / "odd", tiny_lm.prefix, **{"wte3.weight": torch.zeros(3, 16)})
    with pytest.raises(UserError, match=r"not a GPT-2 prefix of the original .names or shapes differ in wte3.weight"):
        load_prefix(directory)


def test_pickled_code_is_never_run(tiny_lm, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    directory = write_original(tmp_path / "evil", tiny_lm.prefix, evil=Evil())
    with pytest.raises(UserError, match="cannot be read as a checkpoint of the original"):
        load_prefix(directory)
    assert not (tmp_path / "ran").exists()


def test_a_failing_write_leaves_the_old_checkpoint(saved, monkeypatch):
    directory, prefix = saved
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.files, "sync_file", full_disk)
    prefix.wte.weight.data += 1
    with pytest.raises(OSError, match="No space left"):
        save_prefix(directory, prefix, BASE, TASK)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_results_of_earlier_versions_have_todays_names():
    """seq2seq/ once wrote settings, train and test; what gpt2/ writes stays as it is."""
    earlier = {
        **{"settings": {"mode": "xsum"}, "versions": {"torch": "2.13"}, "device": "cpu"},
        **{"train": {"steps": 3, "curves": {"train": [[1, 2.0]], "validation": [[3, 1.0]]}}, "test": {"scores": {}}},
    }
    assert files.todays_results(earlier) == {
        "run": {"mode": "xsum", "torch": "2.13", "device": "cpu"},
        "training": {"steps": 3, "curves": {"train": [[1, 2.0]], "dev": [[3, 1.0]]}},
        "decoding": {"test": {"scores": {}}},
    }
    today = {"run": {}, "training": {"steps": 1}, "decoding": {}}
    assert files.todays_results(today) == today
