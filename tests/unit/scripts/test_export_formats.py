"""The two formats that prefixes leave in: PEFT's adapter folder, and plain keys and values."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from formats import kv
from prefixlib.checkpoints import peft_format
from prefixlib.system.errors import UserError

# What PEFT 0.21 needs of a PrefixTuningConfig; P 3, L 2, H 2 heads of size 4 (a grouped-query model of any width).
CONFIG = {
    "peft_type": "PREFIX_TUNING",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "openai-community/gpt2",
    "revision": "abc123",
    "inference_mode": True,
    "num_virtual_tokens": 3,
    "num_layers": 2,
    "num_attention_heads": 2,
    "token_dim": 8,
    "num_transformer_submodules": 1,
    "prefix_projection": False,
    "encoder_hidden_size": 8,
}
BASE = {"name": "openai-community/gpt2", "revision": "abc123"}


@pytest.fixture
def adapter():
    return peft_format.Adapter(torch.arange(3 * 32.0).view(3, 32), layers=2, heads=2, base=BASE)


def test_an_adapter_is_what_peft_reads(adapter, tmp_path):
    peft_format.write(tmp_path, adapter)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == CONFIG
    arrays = load_file(tmp_path / "adapter_model.safetensors")
    assert list(arrays) == ["prompt_embeddings"]
    assert torch.equal(arrays["prompt_embeddings"], adapter.flat)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\nbase_model: openai-community/gpt2\n---\n")
    assert "from_pretrained('openai-community/gpt2', revision='abc123')" in card
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }


def test_the_card_of_a_local_base_names_no_hub_model(adapter, tmp_path):
    local = peft_format.Adapter(adapter.flat, 2, 2, {"name": "/models/mine", "revision": None})
    peft_format.write(tmp_path, local)
    card = (tmp_path / "README.md").read_text()
    assert "base_model:" not in card
    assert "from_pretrained('/models/mine')" in card


@pytest.mark.parametrize("projection", [False, True])
def test_an_adapter_comes_back(adapter, tmp_path, projection):
    """A projection is applied when PEFT saves, so such an adapter differs in its settings alone."""
    peft_format.write(tmp_path, adapter)
    changed = CONFIG | {"prefix_projection": projection, "encoder_hidden_size": 77}
    (tmp_path / "adapter_config.json").write_text(json.dumps(changed))
    found = peft_format.read(tmp_path)
    assert torch.equal(found.flat, adapter.flat)
    assert (found.layers, found.heads, found.base) == (2, 2, BASE)


def test_an_adapter_in_half_precision_and_in_the_old_file_comes_back(adapter, tmp_path):
    peft_format.write(tmp_path, adapter)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({"prompt_embeddings": adapter.flat.bfloat16()}, tmp_path / "adapter_model.bin")
    found = peft_format.read(tmp_path)
    assert found.flat.dtype == torch.float32
    assert torch.equal(found.flat, adapter.flat)  # whole numbers below 256 are exact in bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LORA"}, "is an adapter of the kind LORA; only PREFIX_TUNING and CARTRIDGE are prefixes"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "is a prefix for the task type SEQ_2_SEQ_LM; only CAUSAL_LM can be read"),
        ({"num_transformer_submodules": 2}, "only CAUSAL_LM can be read"),
        ({"num_layers": None, "token_dim": "8"}, "num_layers, token_dim must be whole numbers above 0"),
        ({"num_virtual_tokens": 4}, "prompt_embeddings is 3x32, its adapter_config.json asks for 4x32"),
        ({"token_dim": 16}, "prompt_embeddings is 3x32, its adapter_config.json asks for 3x64"),
    ],
)
def test_what_is_no_prefix_is_one_line(adapter, tmp_path, change, message):
    peft_format.write(tmp_path, adapter)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(UserError, match=message) as error:
        peft_format.read(tmp_path)
    assert "\n" not in str(error.value)


def test_missing_and_damaged_files_are_one_line(adapter, tmp_path):
    with pytest.raises(UserError, match=r"is not an adapter of PEFT: adapter_config.json is missing"):
        peft_format.read(tmp_path)
    peft_format.write(tmp_path, adapter)
    weights = tmp_path / "adapter_model.safetensors"
    save_file({"prompt_embeddings": adapter.flat, "base.h.0.lora_A": torch.zeros(1)}, weights)
    with pytest.raises(UserError, match=r"expected the one array prompt_embeddings, found .*lora_A"):
        peft_format.read(tmp_path)
    weights.write_bytes(weights.read_bytes()[:20])
    with pytest.raises(UserError, match=r"adapter_model.safetensors is damaged"):
        peft_format.read(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match=r"has no adapter_model.safetensors"):
        peft_format.read(tmp_path)
    for damaged in ("{", "[]"):
        (tmp_path / "adapter_config.json").write_text(damaged)
        with pytest.raises(UserError, match=r"adapter_config.json is damaged"):
            peft_format.read(tmp_path)


def test_pickled_code_is_never_run(adapter, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    peft_format.write(tmp_path, adapter)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({"prompt_embeddings": adapter.flat, "evil": Evil()}, tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model.bin cannot be read without running pickled code") as error:
        peft_format.read(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_keys_and_values_have_plain_names(tmp_path):
    def pair(start):
        return torch.full((2, 3, 4), start), torch.full((2, 3, 4), start + 0.5)

    prefix = kv.KeysValues(
        {"decoder.self": [pair(0.0), pair(1.0)], "encoder.self": [pair(2.0)]},
        family="encoder-decoder",
        text_starts_at=0,
        base={"name": "facebook/bart-base", "revision": None},
        task={"mode": "xsum"},
    )
    kv.write(tmp_path, prefix)
    arrays = load_file(tmp_path / "keys_values.safetensors")
    assert {name: array.unique().tolist() for name, array in arrays.items()} == {
        "decoder.self.layer_0.key": [0.0],
        "decoder.self.layer_0.value": [0.5],
        "decoder.self.layer_1.key": [1.0],
        "decoder.self.layer_1.value": [1.5],
        "encoder.self.layer_0.key": [2.0],
        "encoder.self.layer_0.value": [2.5],
    }
    assert {array.shape for array in arrays.values()} == {(2, 3, 4)}
    assert json.loads((tmp_path / "keys_values.json").read_text()) == {
        "family": "encoder-decoder",
        "base_model": {"name": "facebook/bart-base", "revision": None},
        "task": {"mode": "xsum"},
        "names": "SITE.layer_N.key and SITE.layer_N.value",
        "array": "(heads, positions, head_size)",
        "text_starts_at_position": 0,
        "sites": {
            "decoder.self": {"layers": 2, "heads": 2, "positions": 3, "head_size": 4},
            "encoder.self": {"layers": 1, "heads": 2, "positions": 3, "head_size": 4},
        },
    }
    card = (tmp_path / "README.md").read_text()
    assert "| `decoder.self` | 2 | (2, 3, 4) |" in card
    assert "The first token of text has position 0." in card
