"""Base models unlike GPT-2: a token that begins texts, none for padding, embeddings without a word, shards."""

import json
import runpy
import sys

import pytest
import torch

import gpt2
from gpt2.dataset import TableToTextDataset
from gpt2.decoding import to_text
from gpt2.model import load
from prefixlib.base_model.load import load_model
from prefixlib.data.tasks import read_records
from prefixlib.settings.search import Search
from scripts import export
from tests.conftest import ROOT
from tests.llama_tiny import save_llama

DATA = ROOT / "data" / "demo"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama") / "base")


def test_shards_and_pickled_shards_load(base, tmp_path):
    """Several safetensors files, and as many of torch's own, of which transformers reads arrays alone."""
    shards = sorted(base.glob("model-*.safetensors"))
    assert len(shards) > 2
    model = load_model(str(base), "decoder-only")
    index = {"metadata": {}, "weight_map": {}}
    for path in base.glob("*.json"):
        if "index" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    for n, key in enumerate(model.state_dict()):
        file = f"pytorch_model-{n % 3}.bin"
        index["weight_map"][key] = file
    for file in sorted(set(index["weight_map"].values())):
        part = {key: array for key, array in model.state_dict().items() if index["weight_map"][key] == file}
        torch.save(part, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    again = load_model(str(tmp_path), "decoder-only")
    assert all(torch.equal(array, again.state_dict()[key]) for key, array in model.state_dict().items())


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    where = {"model_name_or_path": str(base), "data_dir": str(DATA), "output_dir": str(tmp_path_factory.mktemp("run"))}
    settings = gpt2.Settings(mode="webnlg", preseqlen=3, mid_dim=8, max_steps=2, bsz=4, skip_decode=True, **where)
    return gpt2.train(settings).output_dir


def run_example(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["example.py", " | The Eagle : type : pub"])
    return runpy.run_path(str(folder / "example.py"))


@pytest.mark.parametrize("to", ["kv", "peft"])
def test_exported_prompt_tokens_are_the_trained_prompt_tokens(trained, tmp_path, monkeypatch, to):
    """And those that decoding makes of the same source; what the example then writes is what gpt2.load generates."""
    export.main([str(trained), "--to", to, "--output_dir", str(tmp_path / to)])
    names = run_example(tmp_path / to, monkeypatch)
    exported = names["prompt"][0].tolist()
    model = load(trained)
    triples = [("The Eagle", "type", "pub")]
    (decoded,) = model.encode([triples], Search(max_new_tokens=50))
    assert exported == decoded.prompt
    file = tmp_path / "train.json"
    entry = {
        "category": "X",
        "eid": "1",
        "lexicalisations": [{"comment": "good", "lex": "A pub.", "lid": "1", "lang": ""}],
    }
    entry |= {"modifiedtripleset": [{"subject": "The Eagle", "property": "type", "object": "pub"}], "size": "1"}
    entry |= {"originaltriplesets": {"originaltripleset": [entry["modifiedtripleset"]]}, "shape": "", "shape_type": ""}
    file.write_text(json.dumps({"entries": [{"1": entry}]}))
    (example,) = TableToTextDataset("webnlg", list(read_records("webnlg", file)), model.tokenizer, 400).examples
    assert exported == example.prompt
    assert exported[-1] == example.continuation[-1] == model.tokenizer.eos_token_id == 2
    assert 1 not in example.prompt + example.continuation
    written = names["output"][0, len(exported) :].tolist()
    (text,) = model.generate([triples], strategy="greedy", max_new_tokens=100)
    banned = any(token == model.tokenizer.convert_tokens_to_ids("Ċ") for token in written)
    assert banned or to_text(model.tokenizer, written) == text
