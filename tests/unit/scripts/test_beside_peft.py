"""What docs/models.md says that PEFT's prefix tuning does not do; the tests it names show that this package does."""

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, GPT2Config, GPT2LMHeadModel, T5Config

peft = pytest.importorskip("peft")
from tests.conftest import ROOT  # noqa: E402  after the check that peft is there

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])
ONES = torch.ones_like(IDS)


def gpt2():
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 4, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


def with_prefixes(base, task, *names):
    settings = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3)
    model = peft.get_peft_model(base, settings, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, settings)
    for name in names:
        torch.nn.init.normal_(model.prompt_encoder[name].embedding.weight)
    return model.eval()


def test_no_prefix_in_the_encoder():
    sizes = {"d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 32, "num_layers": 2, "vocab_size": 50}
    base = AutoModelForSeq2SeqLM.from_config(T5Config(decoder_start_token_id=0, **sizes)).eval()
    inputs = {"input_ids": IDS, "attention_mask": ONES, "decoder_input_ids": IDS}
    before = base(**inputs)
    after = with_prefixes(base, "SEQ_2_SEQ_LM", "one")(**inputs)
    torch.testing.assert_close(after.encoder_last_hidden_state, before.encoder_last_hidden_state, atol=1e-5, rtol=0)
    assert (after.logits - before.logits).abs().max() > 1e-3


def test_one_prefix_for_a_batch():
    model = with_prefixes(gpt2(), "CAUSAL_LM", "one", "two")
    mixed = model(input_ids=IDS, attention_mask=ONES, adapter_names=["one", "two"]).logits
    model.set_adapter("two")
    alone = model(input_ids=IDS, attention_mask=ONES).logits
    assert (mixed[1] - alone[1]).abs().max() > 1e-3  # the names are passed over: both rows are behind "one"
    with pytest.raises(ValueError, match="adapter_names"):
        model.generate(input_ids=IDS, attention_mask=ONES, adapter_names=["one", "two"], max_new_tokens=1)


def test_no_checkpointing():
    base = gpt2()
    base.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="does not work with gradient checkpointing"):
        with_prefixes(base, "CAUSAL_LM", "one")


def test_the_page_names_tests_that_exist():
    page = (ROOT / "docs" / "models.md").read_text()
    table = page.split("## Beside PEFT")[1].split("\n## ")[0]
    last = [line.split("|")[-2].strip(" `") for line in table.splitlines() if "::" in line]
    named = [cell.split("::") for cell in last]
    assert len(named) == 5
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text()
