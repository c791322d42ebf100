"""Every kind of GPT-2 prefix against the original implementation's numbers (tests/golden/README.md)."""

import json

import pytest
import torch
from safetensors.torch import load_file

from gpt2 import frozen_lm, prefix_lm
from gpt2.building import Given, start_from_text
from gpt2.dataset import Encoded, pad_sources
from gpt2.decoding import CausalSteps
from gpt2.model import load_prefix
from gpt2.prefix_lm import PrefixLM
from gpt2.train_control import make_prefix
from gpt2.trainer_prefix import row_losses
from prefixlib.decoding.search import DecodingRule, beam_search, sample
from prefixlib.system.errors import UserError
from tests.conftest import GOLDEN, close

CASES = ("prefix", "infix", "shallow_words", "shallow_random", "lowdata", "emb_mlp")
GENERATIONS = json.loads((GOLDEN / "gpt2_generation.json").read_text())
SHIFT = {"base": 0.0, "eosminus": -0.15, "eosplus": 0.3}  # ln_f.bias += shift * wte[99]


def original_checkpoint(folder, arrays, **settings):
    """A folder as the original wrote it; the file's preseqlen is the flag's, which a text can have overruled."""
    folder.mkdir()
    weights = {name.removeprefix("prefix."): array for name, array in arrays.items() if name.startswith("prefix.")}
    torch.save(weights, folder / "pytorch_model.bin")
    config = {
        "n_layer": 3,
        "n_head": 4,
        "n_embd": 32,
        "preseqlen": 10,
        "mid_dim": 16,
        "prefix_dropout": 0.0,
        **settings,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def padding_counts(monkeypatch):
    """The original numbers the padding of a source too."""
    for module in (frozen_lm, prefix_lm):
        monkeypatch.setattr(module, "count_positions", lambda seen: torch.arange(seen.shape[1]).expand_as(seen))


def golden(case, golden_gpt2, tmp_path, train_base=False, checkpointing=False):
    """The tiny model behind the case's prefix, loaded as an original checkpoint, and the case's arrays."""
    base = golden_gpt2[0]
    arrays = load_file(GOLDEN / f"gpt2_{case}.safetensors")
    loaded = load_prefix(original_checkpoint(tmp_path / case, arrays))
    prefix = make_prefix(loaded.config)
    prefix.load_state_dict(loaded.network)
    model = PrefixLM(base, prefix, train_base=train_base, checkpointing=checkpointing)
    source = {"source": arrays["batch.src"], "source_mask": arrays["batch.src_attn"]} if case == "infix" else {}
    return model, arrays, source


def test_every_case_is_there():
    assert {path.stem.removeprefix("gpt2_") for path in GOLDEN.glob("gpt2_*.safetensors")} == {
        *CASES,
        *("base", "train_plain"),
    }


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_past_logits_losses_and_gradients(golden_gpt2, padding_counts, tmp_path, case, checkpointing):
    if checkpointing:
        for module in golden_gpt2[0].modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    model, arrays, source = golden(case, golden_gpt2, tmp_path, checkpointing, checkpointing)
    model.train()
    past = model.prefix.past(model.base, 3, **source)
    assert close(torch.stack([torch.stack(layer) for layer in past.layers]), arrays["past"])
    if case == "infix":
        assert torch.equal(past.visible, arrays["attention_mask_prompt"].bool())
    input_ids, labels = arrays["batch.input_ids"], arrays["batch.labels"]
    logits, expected = model(input_ids, **source), arrays["logits"]
    if case == "infix":  # here the original hides the padding behind a text from itself, where nothing is scored
        real = arrays["batch.tgt_attn"].bool()
        logits, expected = logits[real], expected[real]
    assert close(logits, expected)
    nll, rows = model(input_ids, labels, **source)
    every_token, not_eos = torch.full((3,), input_ids.shape[1]), input_ids.ne(99).sum(dim=1)
    for mode in range(5):
        assert close(row_losses(nll, rows, labels, every_token, mode), arrays[f"loss.mode{mode}"]), mode
    assert close(row_losses(nll, rows, labels, not_eos, 4), arrays["loss.mode4_eos99"])
    loss = row_losses(nll, rows, labels, every_token, mode=1).mean()
    assert close(loss, arrays["trainer_loss.mode1"].squeeze())
    loss.backward()
    gradients = {name.removeprefix("grad."): array for name, array in arrays.items() if name.startswith("grad.")}
    assert gradients.keys() == dict(model.prefix.named_parameters()).keys()
    for name, parameter in model.prefix.named_parameters():
        gradient = gradients[name]
        if case == "shallow_random":
            gradient = gradient.view(5, 192)
        if case == "shallow_words":
            gradient = gradient.squeeze(1).permute(2, 0, 1, 3).reshape(6, 192)
        assert close(parameter.grad, gradient), name


def test_words_are_the_keys_and_values_copied(golden_gpt2, tmp_path):
    model, arrays, _ = golden("shallow_words", golden_gpt2, tmp_path)
    copied = model.prefix.flat().detach().clone()
    model.prefix.control_trans.data.zero_()
    assert start_from_text(model.prefix, Given(model.base, arrays["init_words"][0].tolist())) == []
    assert close(model.prefix.flat().detach(), copied)


def test_low_data_start_takes_the_500_steps_of_the_original(golden_gpt2, tmp_path):
    model, arrays, _ = golden("lowdata", golden_gpt2, tmp_path)
    start = {name.removeprefix("init."): array for name, array in arrays.items() if name.startswith("init.")}
    model.prefix.load_state_dict(start)
    losses = start_from_text(model.prefix, Given(model.base, arrays["init_words"][0].tolist()))
    assert len(losses) == 500
    assert close(torch.tensor(losses), arrays["mse_losses"])
    for name, parameter in model.prefix.named_parameters():
        assert (parameter - arrays[f"prefix.{name}"]).abs().max() < 2e-4, name  # 500 steps of Adam
        assert parameter.grad is None or not parameter.grad.any()
    assert torch.equal(model.prefix.wte.weight, start["wte.weight"])


@pytest.mark.parametrize("variant", SHIFT)
@pytest.mark.parametrize("kind", ["greedy", "beam"])
@pytest.mark.parametrize("case", ["infix", "emb_mlp"])
@pytest.mark.parametrize("together", [True, False])
def test_generation(golden_gpt2, tmp_path, case, variant, kind, together):
    """The original decodes one source at a time, so its positions are those of an unpadded row."""
    base = golden(case, golden_gpt2, tmp_path)[0].base
    # golden prefixes are made by the model as it was; the shift of its last bias does not reach keys and values
    base.transformer.ln_f.bias.data += SHIFT[variant] * base.transformer.wte.weight.data[99]
    wanted = [GENERATIONS[f"{variant}/{case}/p{n}/{kind}"] for n in range(3)]
    rule = DecodingRule(eos_token_id=99, max_new_tokens=20, num_beams=5, min_length=5, banned_token_ids=(28, 98))
    prefix = load_prefix(tmp_path / case).for_decoding()
    for members in [[0, 1, 2]] if together else [[0], [1], [2]]:
        prompts = [wanted[n]["prompt"] for n in members]
        source = pad_sources([Encoded([], [], wanted[n]["src"]) for n in members]) if case == "infix" else {}
        with torch.no_grad():
            past = prefix.past(base, len(members), **source)
        steps = CausalSteps(base, prompts, past.layers, past.visible)
        if kind == "greedy":
            found = [[hypothesis] for hypothesis in sample(steps, prompts, rule)]
        else:
            found = beam_search(steps, prompts, rule)
            for n, hypotheses in zip(members, found, strict=True):
                assert [wanted[n]["prompt"] + h.tokens for h in hypotheses] == [h["ids"] for h in wanted[n]["hyps"]]
                assert [h.score for h in hypotheses] == pytest.approx([h["score"] for h in wanted[n]["hyps"]], abs=1e-5)
        for n, hypotheses in zip(members, found, strict=True):
            best = hypotheses[0]
            assert wanted[n]["prompt"] + best.tokens + [99] * best.finished == wanted[n]["output"]


def test_an_original_checkpoint_with_another_array_is_refused(tmp_path):
    arrays = load_file(GOLDEN / "gpt2_infix.safetensors")
    arrays["prefix.extra"] = torch.zeros(2)
    with pytest.raises(UserError, match=r"not a GPT-2 prefix of the original \(names or shapes differ in extra\)"):
        load_prefix(original_checkpoint(tmp_path / "odd", arrays))
