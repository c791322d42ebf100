"""PEFT and this package hold the same prefix: out to an adapter, in from one, equal logits and texts."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gpt2 import model as gpt2_model
from gpt2.prefix_lm import PrefixLM
from gpt2.train_control import PrefixTuning
from prefixlib.system.errors import UserError
from scripts import export
from tests.conftest import GOLDEN, ROOT, close
from tests.export_golden import golden_state, make_golden_base, save_gpt2, write_original

DEMO = ROOT / "data" / "demo"
GENERATIONS = json.loads((GOLDEN / "gpt2_generation.json").read_text())


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


def load_in_peft(base_folder, folder):
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), folder).eval()


def test_peft_gives_the_golden_logits(golden_bases, originals, tmp_path):
    """The original's checkpoint, exported, in PEFT: the original's logits, in a batch with padding."""
    out = tmp_path / "adapter"
    export.main([str(originals["gpt2"]), "--to", "peft", "--output_dir", str(out)])
    model, arrays = load_in_peft(golden_bases["gpt2"], out), golden_state("gpt2")[1]
    ids = arrays["batch.input_ids"]
    assert close(model(input_ids=ids).logits, arrays["logits"])  # padding stands to the right, attention is causal
    real = ids.ne(100)
    assert not real.all()
    masked = model(input_ids=ids, attention_mask=real.long()).logits
    assert close(masked[real], arrays["logits"][real])


def test_peft_decodes_the_golden_outputs(golden_bases, originals, tmp_path):
    """Greedy, one by one and in a batch padded on the left."""
    out = tmp_path / "adapter"
    export.main([str(originals["gpt2"]), "--to", "peft", "--output_dir", str(out)])
    model = load_in_peft(golden_bases["gpt2"], out)
    cases = [GENERATIONS[f"base/prefix/p{n}/greedy"] for n in range(3)]
    rules = {"min_length": 5, "bad_words_ids": [[28], [98]], "eos_token_id": 99, "pad_token_id": 100}
    width = max(len(case["prompt"]) for case in cases)
    rows = [[100] * (width - len(case["prompt"])) + case["prompt"] for case in cases]
    together = torch.tensor(rows)
    batch = model.generate(
        input_ids=together, attention_mask=together.ne(100).long(), max_new_tokens=20, do_sample=False, **rules
    )
    for case, row in zip(cases, batch, strict=True):
        prompt = torch.tensor([case["prompt"]])
        alone = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, **rules
        )
        assert alone[0].tolist() == case["output"]
        assert [token for token in row.tolist() if token != 100] == case["output"]


def test_a_grouped_query_model_in_peft(tmp_path):
    """Fewer key/value heads than queries, and a head size that is not width / heads."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=50, intermediate_size=40, head_dim=12, max_position_embeddings=64, **shape)
    base = LlamaForCausalLM(config).eval()
    base.save_pretrained(tmp_path / "llama")
    checkpoint, model = save_gpt2(tmp_path / "run", base, tmp_path / "llama")
    export.main([str(checkpoint), "--to", "peft"])
    written = json.loads((checkpoint / "peft" / "adapter_config.json").read_text())
    wanted = {"num_virtual_tokens": 3, "num_layers": 2, "num_attention_heads": 2, "token_dim": 24}
    assert {name: written[name] for name in wanted} == wanted
    assert written["base_model_name_or_path"] == str(tmp_path / "llama")
    ids = torch.randint(50, (3, 7))
    found = load_in_peft(tmp_path / "llama", checkpoint / "peft")(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert close(found.logits, model(ids))


@pytest.mark.parametrize("projection", [False, True])
def test_an_adapter_that_peft_made_decodes_the_same_here(tmp_path, projection):
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    base = AutoModelForCausalLM.from_pretrained(DEMO / "gpt2").eval()
    more = {"prefix_projection": projection, "encoder_hidden_size": 24}
    theirs = peft.get_peft_model(base, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, **more))
    theirs.eval().save_pretrained(tmp_path / "adapter")
    out = tmp_path / "checkpoint"
    export.main([str(tmp_path / "adapter"), "--from", "peft", "--mode", "data2text", "--output_dir", str(out)])
    ids = torch.randint(1000, (3, 9))
    expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    loaded = gpt2_model.load_prefix(out)
    prefix = PrefixTuning(loaded.config)
    prefix.load_state_dict(loaded.network)
    ours = PrefixLM(AutoModelForCausalLM.from_pretrained(DEMO / "gpt2"), prefix).eval()
    assert close(ours(ids), expected)
    assert torch.equal(loaded.flat, load_file(tmp_path / "adapter" / "adapter_model.safetensors")["prompt_embeddings"])


def test_there_and_back_again(tmp_path):
    """The adapter's arrays come back to the bit, in a checkpoint that decoding accepts for its mode."""
    base = AutoModelForCausalLM.from_pretrained(DEMO / "gpt2")
    checkpoint, _ = save_gpt2(tmp_path / "run", base, DEMO / "gpt2")
    export.main([str(checkpoint), "--to", "peft"])
    back = tmp_path / "back"
    export.main([str(checkpoint / "peft"), "--from", "peft", "--mode", "data2text", "--output_dir", str(back)])
    ours, again = gpt2_model.load_prefix(checkpoint), gpt2_model.load_prefix(back)
    assert torch.equal(ours.flat, again.flat)
    assert again.base == {"name": str(DEMO / "gpt2"), "revision": None}
    assert again.task == {"mode": "data2text", "tuning_mode": "prefixtune", "imported_from": "peft"}
    assert gpt2_model.load(back, mode="data2text").text_positions == 256 - 3


def test_an_adapter_for_another_shape_is_refused(golden_bases, originals, tmp_path):
    export.main([str(originals["gpt2"]), "--to", "peft", "--output_dir", str(tmp_path / "a")])
    command = [str(tmp_path / "a"), "--from", "peft", "--mode", "data2text", "--output_dir", str(tmp_path / "b")]
    with pytest.raises(UserError, match="trained for a model of another shape than .*demo/gpt2"):
        export.main([*command, "--model_name_or_path", str(DEMO / "gpt2")])
    with pytest.raises(UserError, match=r"the base model of .*, unnamed, is not here: pass --model_name_or_path"):
        export.main(command)
    assert not (tmp_path / "b").exists()


def test_a_cartridge_of_peft_comes_in(golden_bases, tmp_path):
    """Keys and values that PEFT trained without a network, the first position frozen: equal logits."""
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(golden_bases["gpt2"])
    config = peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_frozen_tokens=1)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "cartridge")
    command = [
        str(tmp_path / "cartridge"),
        "--from",
        "peft",
        "--mode",
        "data2text",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    export.main([*command, "--model_name_or_path", str(golden_bases["gpt2"])])
    loaded = gpt2_model.load_prefix(tmp_path / "out")
    assert loaded.config.preseqlen == 4
    lm = PrefixLM(AutoModelForCausalLM.from_pretrained(golden_bases["gpt2"]), loaded.for_decoding()).eval()
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        ours, theirs = lm(input_ids=ids), model(input_ids=ids).logits
    assert close(ours, theirs)
