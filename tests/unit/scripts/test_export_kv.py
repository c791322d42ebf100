"""A prefix as plain keys and values: the original's numbers, and an example that decodes as we do."""

import json
import runpy
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from gpt2 import decoding
from gpt2.train_control import split_layers
from prefixlib.decoding.search import DecodingRule
from scripts import export
from seq2seq import model as seq2seq_model
from seq2seq import prefix_lm, prefixTuning
from tests.conftest import ROOT, close
from tests.export_golden import golden_state, save_gpt2, write_original
from tests.seq2seq_tiny import make_bart

DEMO = ROOT / "data" / "demo"


@pytest.mark.parametrize(("name", "past"), [("gpt2", {"decoder.self": "past"}), ("bart", None)])
def test_keys_and_values_are_the_originals(tmp_path, name, past):
    """Every array of every site against what the original's module gave."""
    export.main([str(write_original(tmp_path / name, name)), "--to", "kv", "--output_dir", str(tmp_path / "kv")])
    arrays, golden = load_file(tmp_path / "kv" / "keys_values.safetensors"), golden_state(name)[1]
    bart = {"decoder.self": "past.self", "decoder.cross": "past.encoder_decoder", "encoder.self": "past.encoder"}
    seen = 0
    for site, key in (past or bart).items():
        for layer, states in enumerate(golden[key]):  # (2, 3, H, P, D); the three rows are equal
            for kind, state in zip(("key", "value"), states, strict=True):
                assert close(arrays[f"{site}.layer_{layer}.{kind}"], state[0])
                seen += 1
    assert seen == len(arrays) == {"gpt2": 6, "bart": 12}[name]
    described = json.loads((tmp_path / "kv" / "keys_values.json").read_text())
    assert described["text_starts_at_position"] == {"gpt2": 5, "bart": 0}[name]


def run_example(folder, monkeypatch):
    """Run example.py; returns its variables."""
    monkeypatch.setattr(sys, "argv", ["example.py"])
    return runpy.run_path(str(folder / "example.py"))


def test_the_example_for_a_decoder_only_model_decodes_as_we_do(tmp_path, monkeypatch):
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(DEMO / "gpt2")
    checkpoint, model = save_gpt2(tmp_path / "run", base, DEMO / "gpt2", preseqlen=4)
    export.main([str(checkpoint), "--to", "kv"])
    names = run_example(checkpoint / "kv", monkeypatch)
    prompt, output = names["prompt"][0].tolist(), names["output"][0].tolist()
    rule = DecodingRule(eos_token_id=names["tokenizer"].eos_token_id, max_new_tokens=100, num_beams=1)
    layers = split_layers(model.prefix.flat().detach(), model.prefix.config, batch_size=1)
    best = decoding.decode(base, [prompt], rule, layers=layers, strategy="greedy", progress=False)[0]
    assert len(best.tokens) > 5
    assert output == prompt + best.tokens + [rule.eos_token_id] * best.finished


@pytest.mark.parametrize("off", [None, "encoder", "cross", "self"])
def test_the_example_for_an_encoder_decoder_decodes_as_we_do(tmp_path, monkeypatch, off):
    """Greedy output, token by token the likeliest under teacher forcing; any site may have no prefix."""
    folder = make_bart(tmp_path / "bart", forced_eos_token_id=None)
    base = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    base.final_logits_bias[0, 2] = -100.0  # no end before the example's 60 tokens
    base.save_pretrained(folder)
    sites = {f"use_{site}_prefix": site != off for site in ("encoder", "cross", "self")}
    settings = {"preseqlen": 3, "mid_dim": 8, "prefix_dropout": 0.0, "use_deep": False, "init_shallow": False}
    prefix = prefixTuning.PrefixTuning(prefixTuning.PrefixConfig.for_model(base.config, **settings, **sites))
    seq2seq_model.save_prefix(tmp_path / "run", prefix, {"name": str(folder), "revision": None}, {"mode": "xsum"})
    export.main([str(tmp_path / "run"), "--to", "kv"])
    names = run_example(tmp_path / "run" / "kv", monkeypatch)
    source, output = names["source"], names["output"]
    logits = prefix_lm.PrefixLM(base, prefix).eval()(source, torch.ones_like(source), output[:, :-1])
    assert output.shape[1] == 61
    assert torch.equal(logits.argmax(dim=-1), output[:, 1:])
