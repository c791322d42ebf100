"""The BART prefix against the first implementation's numbers: every array within 1e-5 x max(1, |x|max)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BartConfig, BartForConditionalGeneration

from prefixlib.decoding.search import DecodingRule, beam_search
from seq2seq.decoding import Past, Seq2SeqSteps, decode
from seq2seq.prefix_lm import PrefixLM
from seq2seq.prefixTuning import BRANCHES, PrefixConfig, PrefixTuning

GOLDEN = Path(__file__).parent.parent / "golden"
SEARCHES = json.loads((GOLDEN / "bart_generation.json").read_text())


def close(found, expected):
    tolerance = 1e-5 * max(1.0, expected.abs().max().item())
    assert found.shape == expected.shape
    assert (found - expected).abs().max().item() < tolerance


@pytest.fixture
def golden():
    return load_file(GOLDEN / "bart_prefix.safetensors")


@pytest.fixture
def model(golden):
    config = BartConfig(**json.loads((GOLDEN / "bart_config.json").read_text()))
    base = BartForConditionalGeneration(config)
    missing, unexpected = base.load_state_dict(load_file(GOLDEN / "bart_base.safetensors"), strict=False)
    assert sorted(missing) == ["model.decoder.embed_tokens.weight", "model.encoder.embed_tokens.weight"]  # tied
    assert not unexpected
    base.tie_weights()
    prefix = PrefixTuning(
        PrefixConfig.for_model(
            config,
            preseqlen=5,
            mid_dim=16,
            prefix_dropout=0.0,
            use_deep=False,
            use_encoder_prefix=True,
            use_cross_prefix=True,
            use_self_prefix=True,
            init_shallow=False,
        )
    )
    prefix.load_state_dict(
        {name.removeprefix("prefix."): array for name, array in golden.items() if name.startswith("prefix.")}
    )
    return PrefixLM(base, prefix).eval()


def batch(golden):
    return golden["batch.input_ids"], golden["batch.attention_mask"], golden["decoder_input_ids"]


@pytest.mark.parametrize("branch", BRANCHES, ids=lambda branch: branch.site)
def test_prefix_of_each_site(model, golden, branch):
    layers = model.prefix(3)[branch.site]
    past = torch.stack([torch.stack(pair) for pair in layers])  # (L, 2, 1, H, P, D)
    close(past.expand(-1, -1, 3, -1, -1, -1), golden[f"past.{branch.saved}"])


def test_encoder_states(model, golden):
    found = []
    encoder = model.base.get_encoder()
    hooks = [encoder.layernorm_embedding.register_forward_hook(lambda _m, _i, out: found.append(out))]
    hooks += [layer.register_forward_hook(lambda _m, _i, out: found.append(out)) for layer in encoder.layers]
    model(*batch(golden))
    for hook in hooks:
        hook.remove()
    assert len(found) == 3
    for number, states in enumerate(found):
        close(states, golden[f"encoder_hidden.{number}"])
    close(found[-1], golden["encoder_last_hidden_state"])


def test_logits(model, golden):
    close(model(*batch(golden)), golden["logits"])


@pytest.mark.parametrize("smoothing", ["0.0", "0.1"])
def test_loss_and_every_gradient(model, golden, smoothing):
    """The original's smoothed loss is a sum over tokens; ours is the mean, so the sum is the mean times the count."""
    labels = golden["batch.labels"]
    total, count = model.loss(*batch(golden), labels, smoothing=float(smoothing))
    assert count == 5 + 8 + 4  # tokens that are not padding
    loss = total if smoothing == "0.1" else total / count
    close(loss.view(1), golden[f"loss.ls{smoothing}"])
    loss.backward()
    gradients = {name: p.grad for name, p in model.prefix.named_parameters()}
    expected = {name.split(".", 2)[2]: a for name, a in golden.items() if name.startswith(f"grad_ls{smoothing}.")}
    assert len(expected) == 15
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        close(gradient, expected[name])
    assert all(p.grad is None for p in model.base.parameters())


def searches():
    assert len(SEARCHES) == 6
    return [pytest.param(case, id=name) for name, case in SEARCHES.items()]


def rule_of(case):
    return DecodingRule(
        eos_token_id=2,
        max_new_tokens=61,
        num_beams=6,
        min_length=11,
        length_penalty=case["length_penalty"],
        early_stopping=case["config"]["early_stopping"],
        no_repeat_ngram_size=case["config"]["no_repeat_ngram_size"],
        forced_first_token_id=0 if case["config"]["force_bos_token_to_be_generated"] else None,
        forced_last_token_id=2,
    )


@pytest.mark.parametrize("case", searches())
def test_generation(model, golden, case):
    """Every output and every hypothesis of the final six, ids and scores."""
    model.base.final_logits_bias[:, 2] += case["eos_bias"]
    input_ids, attention_mask, _ = batch(golden)
    prefix = model.prefix(1)
    with torch.no_grad():
        steps = Seq2SeqSteps(model.base, input_ids, attention_mask, Past(prefix))
        found = beam_search(steps, [[2]] * 3, rule_of(case))
    for hypotheses, output, expected in zip(found, case["output"], case["hyps"], strict=True):
        assert [2, *hypotheses[0].tokens, 2] == [token for token in output if token != 1]
        best = sorted(expected, key=lambda hypothesis: -hypothesis["score"])
        assert [[2, *hypothesis.tokens] for hypothesis in hypotheses] == [hypothesis["ids"] for hypothesis in best]
        for hypothesis, reference in zip(hypotheses, best, strict=True):
            assert hypothesis.score == pytest.approx(reference["score"], rel=1e-5)
    sources = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
    alone = decode(model.base, sources, rule_of(case), prefix=prefix, batch_size=1, progress=False)
    assert [one.tokens for (one,) in alone] == [hypotheses[0].tokens for hypotheses in found]
