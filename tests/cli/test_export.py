"""scripts/export.py as a user runs it: checkpoints of the original in use, what is refused, what is left alone."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt2 import model as gpt2_model
from gpt2 import run_generation, run_language_modeling, train_control
from gpt2.train_control import make_prefix
from prefixlib.system.errors import UserError
from scripts import export
from seq2seq import finetune, prefixTuning
from seq2seq import model as seq2seq_model
from tests.conftest import ROOT, run_command
from tests.export_golden import golden_state, make_golden_base, save_gpt2, write_original
from tests.seq2seq_tiny import make_summaries, training_flags

DEMO = ROOT / "data" / "demo"


@pytest.fixture(scope="module")
def golden_bases(tmp_path_factory):
    """Model folders of the golden base models."""
    root = tmp_path_factory.mktemp("bases")
    return {name: make_golden_base(root / name, name) for name in ("gpt2", "bart")}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Checkpoints of the original for both trees."""
    root = tmp_path_factory.mktemp("originals")
    return {name: write_original(root / name, name) for name in ("gpt2", "bart")}


def decode_gpt2(checkpoint, out, scratch, *more):
    """Decode four E2E lines; returns the outputs."""
    lines = (DEMO / "e2e_data" / "src1_valid.txt").read_text().splitlines(keepends=True)[:4]
    (scratch / "lines.txt").write_text("".join(lines))
    command = ["--mode", "data2text", "--split", "valid", "--checkpoint", checkpoint, "--data_file"]
    command += [scratch / "lines.txt", "--output_dir", out, "--length", "12", "--disable_tqdm", "yes", *more]
    run_generation.main([str(word) for word in command])
    return (out / f"{checkpoint.name}_valid_beam").read_text()


def ours_of(original, folder, module, io, base):
    """The same weights in a checkpoint of this package."""
    loaded = io.load_prefix(original)
    prefix = module.PrefixTuning(loaded.config)
    prefix.load_state_dict(loaded.network)
    io.save_prefix(folder, prefix, {"name": str(base), "revision": None}, {"mode": loaded.task.get("mode") or "xsum"})
    return folder


def test_a_gpt2_checkpoint_of_the_original_decodes_trains_on_and_leaves(golden_bases, originals, tmp_path):
    base, original = golden_bases["gpt2"], originals["gpt2"]
    ours = ours_of(original, tmp_path / "gpt2", train_control, gpt2_model, base)
    where = ["--model_name_or_path", str(base)]
    texts = [decode_gpt2(original, tmp_path / "a", tmp_path, *where), decode_gpt2(ours, tmp_path / "b", tmp_path)]
    assert texts[0] == texts[1]
    assert len(texts[0].split()) > 4
    for to, file in (("peft", "adapter_model.safetensors"), ("kv", "keys_values.safetensors")):
        for folder in (original, ours):
            export.main([str(folder), "--to", to, "--output_dir", str(tmp_path / f"{to}-{folder.parent.name}")])
        one, other = (load_file(tmp_path / f"{to}-{folder.parent.name}" / file) for folder in (original, ours))
        assert one.keys() == other.keys()
        assert all(torch.equal(array, other[name]) for name, array in one.items())
    settings = {"mode": "data2text", "preseqlen": 5, "mid_dim": 16, "max_steps": 1, "learning_rate": 1e-3, "bsz": 2}
    words = tmp_path / "words.txt"  # training checks that the tokenizer can write its texts
    words.write_text("w1 : w2 || w3 w4\nw5 : w6 || w8\n")
    settings |= {"train_file": words, "eval_file": words, "skip_decode": "yes"}
    settings |= {"prefix_model_path": original, "output_dir": tmp_path / "on", "disable_tqdm": "yes"}
    run_language_modeling.main([*where, *(f"--{name}={value}" for name, value in settings.items())])
    assert one_small_step(golden_state("gpt2")[0], load_file(tmp_path / "on" / "prefix_model.safetensors"))


def one_small_step(before, after):
    """One AdamW step at rate 1e-3: every array moved, none by more than the rate."""
    assert before.keys() == after.keys()
    return all(0 < (after[name] - array).abs().max() <= 1.01e-3 for name, array in before.items())


def test_a_bart_checkpoint_of_the_original_decodes_trains_on_and_leaves(golden_bases, originals, tmp_path):
    base, original = golden_bases["bart"], originals["bart"]
    ours = ours_of(original, tmp_path / "bart", prefixTuning, seq2seq_model, base)
    data = make_summaries(tmp_path / "data", train=4, rest=3)
    for file in data.iterdir():  # in words that the golden model's tokenizer has
        lines = file.read_text().splitlines()
        words = (" ".join(f"w{10 + len(word) + n}" for word in line.split()) for n, line in enumerate(lines))
        file.write_text("".join(f"{line}\n" for line in words))
    shape = {"preseqlen": 5, "mid_dim": 16, "max_source_length": 40}
    texts = []
    for folder, out in ((original, tmp_path / "a"), (ours, tmp_path / "b")):
        finetune.main(
            training_flags(base, data, out, do_train="no", prefix_model_path=folder, bsz=None, epoch=None, **shape)
        )
        texts.append((out / "test_beam_1.0").read_text())
    assert texts[0] == texts[1]
    assert len(texts[0].split()) > 3
    export.main([str(original), "--to", "kv", "--output_dir", str(tmp_path / "kv-original")])
    export.main([str(ours), "--to", "kv", "--output_dir", str(tmp_path / "kv-ours")])
    one, other = (load_file(tmp_path / f"kv-{who}" / "keys_values.safetensors") for who in ("original", "ours"))
    assert all(torch.equal(array, other[name]) for name, array in one.items())
    settings = {"max_steps": 1, "learning_rate": 1e-3, "prefix_model_path": original, **shape}
    finetune.main(training_flags(base, data, tmp_path / "on", **settings))
    assert one_small_step(golden_state("bart")[0], load_file(tmp_path / "on" / "prefix_model.safetensors"))


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_an_original_with_pickled_code_is_refused(tmp_path, name):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    folder = write_original(tmp_path / "evil", name, evil=Evil())
    with pytest.raises(UserError, match="cannot be read as a checkpoint of the original"):
        export.main([str(folder), "--to", "kv"])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", "evil", "pytorch_model.bin"]


def test_what_peft_cannot_hold_is_one_line(originals, tmp_path):
    with pytest.raises(UserError, match=r"PEFT prefixes only the decoder's self-attention .* use --to kv"):
        export.main([str(originals["bart"]), "--to", "peft", "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["peft", "kv"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_mode": "infix"}, "its keys and values depend on the source"),
        ({"optim_prefix": False}, "its keys and values depend on the source"),
        (
            {"prefix_mode": "embedding"},
            "trained embeddings, which are keys and values only once the model has read them",
        ),
    ],
)
def test_what_is_no_set_of_keys_and_values_is_one_line(originals, to, change, message):
    settings = {"format_mode": "cat", "optim_prefix": True, "prefix_mode": "activation"} | change
    with pytest.raises(UserError, match=f"--to {to} cannot hold .*gpt2: {message}; decode") as error:
        export.check_same_for_all(SimpleNamespace(**settings), originals["gpt2"], to)
    assert "\n" not in str(error.value)


def test_an_infix_checkpoint_does_not_leave(golden_bases, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(golden_bases["gpt2"])
    checkpoint, model = save_gpt2(tmp_path / "run", base, golden_bases["gpt2"])
    infix = make_prefix(replace(model.prefix.config, format_mode="infix"))
    gpt2_model.save_prefix(checkpoint, infix, {"name": "gpt2", "revision": None}, {"mode": "webnlg"})
    with pytest.raises(UserError, match="depend on the source; decode it with gpt2/gen.py"):
        export.main([str(checkpoint), "--to", "peft"])
    assert not (checkpoint / "peft").exists()


def test_a_base_model_is_checked_and_written_down(golden_bases, originals, tmp_path):
    command = [str(originals["gpt2"]), "--to", "peft", "--output_dir", str(tmp_path / "out")]
    for other in (DEMO / "gpt2", golden_bases["bart"]):
        with pytest.raises(UserError, match="was trained for a model of another shape than"):
            export.main([*command, "--model_name_or_path", str(other)])
    export.main([*command, "--model_name_or_path", str(golden_bases["gpt2"])])
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(golden_bases["gpt2"])


def test_a_folder_with_other_files_is_left_alone(originals, tmp_path):
    command = [str(originals["gpt2"]), "--to", "peft", "--output_dir", str(tmp_path)]
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"--output_dir .* contains other files: pass a new folder"):
        export.main(command)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "thesis.tex").unlink()
    export.main(command)
    export.main(command)  # an earlier export is replaced
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "example.py",
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["X", "--to", "kv", "--mode", "webnlg"], "--to kv and --mode webnlg do not go together"),
        (["X", "--from", "peft", "--mode", "webnlg"], "--from peft needs --output_dir"),
        (["X", "--from", "peft", "--output_dir", "OUT"], "--from peft needs .* --mode"),
        (["nowhere", "--to", "kv"], "checkpoint nowhere: no such folder"),
    ],
)
def test_wrong_flags_are_one_line(flags, message):
    with pytest.raises(UserError, match=message):
        export.main(flags)


def test_as_a_command(originals, tmp_path):
    out = tmp_path / "kv"
    result = run_command("scripts/export.py", originals["gpt2"], "--to", "kv", "--output_dir", out)
    assert result.returncode == 0, result.stderr
    assert str(out) in result.stderr
    assert (out / "keys_values.safetensors").is_file()
    wrong = run_command("export.py", tmp_path / "none", "--to", "peft", cwd=ROOT / "scripts")
    assert (wrong.returncode, wrong.stderr) == (2, f"error: checkpoint {tmp_path / 'none'}: no such folder\n")


def test_tokenizers_of_the_golden_models(golden_bases):
    """The helper's ids are the golden ones."""
    assert AutoTokenizer.from_pretrained(golden_bases["gpt2"])("w3 <|endoftext|>")["input_ids"] == [3, 99]
    assert AutoTokenizer.from_pretrained(golden_bases["bart"])("w3 w4")["input_ids"] == [0, 3, 4, 2]
