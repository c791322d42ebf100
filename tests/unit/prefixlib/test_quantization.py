"""A frozen base model in fewer bits: the prefix trains and decodes in float32; what cannot be done here is one line."""

import importlib.util

import pytest
import torch

import gpt2
import seq2seq
from prefixlib.base_model import quantization
from prefixlib.base_model.load import load_model
from prefixlib.system.errors import UserError
from tests.conftest import ROOT, gpt2_settings
from tests.llama_tiny import save_llama
from tests.seq2seq_tiny import make_bart, make_summaries

DATA = ROOT / "data" / "demo"
NEEDS_TORCHAO = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def bart(tmp_path_factory):
    return make_bart(tmp_path_factory.mktemp("bart") / "base")


@pytest.mark.parametrize(
    ("kind", "library", "message"),
    [
        ("int8", "torchao", "--quantization int8 needs torchao: pip install torchao"),
        ("4bit", "bitsandbytes", "--quantization 4bit needs bitsandbytes: pip install bitsandbytes"),
        ("8bit", "bitsandbytes", "--quantization 8bit needs bitsandbytes: pip install bitsandbytes"),
        ("3bit", None, "--quantization 3bit: one of no, 4bit, 8bit, int8"),
    ],
)
def test_what_is_missing_is_one_line(kind, library, message, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else find(name))
    with pytest.raises(UserError, match=f"^{message}$"):
        quantization.loading_options(kind, torch.float32)


def test_without_a_gpu_bitsandbytes_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="^--quantization 4bit needs a GPU and there is none here: int8 does without$"):
        quantization.loading_options("4bit", torch.float32)


def test_a_model_that_is_tuned_itself_keeps_its_bits():
    with pytest.raises(UserError, match="--tuning_mode finetune and --quantization do not go together: weights that"):
        gpt2_settings("--mode=webnlg", "--tuning_mode=finetune", "--quantization=int8")


@NEEDS_TORCHAO
def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(UserError, match="--quantization int8: a gpt2 model has no linear layers to quantise"):
        load_model(str(DATA / "gpt2"), "decoder-only", quantization="int8")


@NEEDS_TORCHAO
@pytest.mark.parametrize("tree", ["gpt2", "seq2seq"])
def test_a_prefix_trains_on_an_int8_model_and_is_loaded_with_it(tree, tmp_path, request):
    """What is stored is float32; the model is loaded in as many bits as in training, or in others where told so."""
    package, base, name = {"gpt2": (gpt2, "llama", "webnlg"), "seq2seq": (seq2seq, "bart", "xsum")}[tree]
    base = request.getfixturevalue(base)
    settings = {"mode": name, "preseqlen": 3, "mid_dim": 8, "max_steps": 2, "bsz": 4, "learning_rate": 1e-2}
    settings |= {"model_name_or_path": str(base), "output_dir": str(tmp_path / "run"), "quantization": "int8"}
    if tree == "gpt2":
        settings |= {"data_dir": str(DATA), "skip_decode": True}
        source = [("The Eagle", "type", "pub")]
    else:
        settings |= {"data_dir": str(make_summaries(tmp_path / "data")), "num_workers": 0, "max_source_length": 64}
        settings |= {"max_target_length": 16, "max_length": 12, "min_length": 2, "num_beams": 2}
        source = "the cat sat."
    result = package.train(package.Settings(**settings))
    assert {p.dtype for p in result.model.prefix.parameters()} == {torch.float32}
    loaded = package.load(tmp_path / "run")
    assert loaded.base_record["quantization"] == "int8"
    assert loaded.base_record["fingerprint"].keys() == {"tokenizer"}
    whole = package.load(tmp_path / "run", quantization="no")
    assert [quantization.is_quantized(model.base) for model in (result.model, loaded, whole)] == [True, True, False]
    kept = {key: array for key, array in loaded.base.state_dict().items() if type(array) is torch.Tensor}
    assert len(kept) < len(whole.base.state_dict())
    texts = [model.generate([source], max_new_tokens=8) for model in (result.model, loaded)]
    assert texts[0] == texts[1]
