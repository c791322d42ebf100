"""Linear layers through oneDNN: the numbers of torch's own, in training and decoding, and where they are not taken."""

import copy

import pytest
import torch
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from gpt2.prefix_lm import PrefixLM
from prefixlib.compute import onednn
from tests.conftest import close

has_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def always(monkeypatch):
    """oneDNN on any processor that has it, for any size; counts its products."""
    calls = []

    def counted(*args, product=onednn._product):
        calls.append(args[1].shape)
        return product(*args)

    monkeypatch.setattr(onednn, "is_faster", lambda: True)
    monkeypatch.setattr(onednn, "takes_transposed", lambda: True)
    monkeypatch.setattr(onednn, "WORTH", 0)
    monkeypatch.setattr(onednn, "_product", counted)
    return calls


@has_onednn
@pytest.mark.parametrize("any_layout", [True, False])
@pytest.mark.parametrize(
    "trained", [(True, False, False), (False, True, True), (True, True, True), (True, True, False)]
)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("shape", [(5,), (2, 3), ()])
def test_product_and_gradients_are_those_of_torch(
    always, monkeypatch, shape, transposed, with_bias, trained, any_layout
):
    monkeypatch.setattr(onednn, "takes_transposed", lambda: any_layout)
    torch.manual_seed(0)
    inputs, weight, bias = torch.randn(*shape, 7), torch.randn(4, 7), torch.randn(4) if with_bias else None
    weight = weight.t().contiguous().t() if transposed else weight
    upstream = torch.randn(*shape, 4)
    found = []
    for linear in (onednn.linear, nn.functional.linear):
        leaves = [
            tensor if tensor is None else tensor.detach().clone().requires_grad_(asked)
            for tensor, asked in zip((inputs, weight, bias), trained, strict=True)
        ]
        output = linear(*leaves)
        output *= 2  # in place, as Gemma 3n does it
        output.backward(upstream)
        found.append([output, *(leaf.grad for leaf in leaves if leaf is not None)])
    # with AVX2 MKL takes what lies transposed; backward the weight is seen from its other side
    assert bool(always) == (any_layout or not transposed or trained[0])
    for ours, torchs in zip(*found, strict=True):
        assert (ours is None) == (torchs is None)
        assert ours is None or close(ours, torchs)


@has_onednn
@pytest.mark.parametrize("decoding", [True, False])
@pytest.mark.parametrize("avx512", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_model_keeps_its_names_types_outputs_and_gradients(always, monkeypatch, frozen, avx512, decoding):
    monkeypatch.setattr(onednn, "takes_transposed", lambda: avx512)
    torch.manual_seed(0)
    size = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 31, "n_positions": 32}
    plain = nn.ModuleList([GPT2LMHeadModel(GPT2Config(**size)), _bart(), nn.Linear(3, 3), Conv1D(3, 3)]).eval()
    plain[:2].requires_grad_(not frozen)
    fast = copy.deepcopy(plain)
    onednn.install(fast)
    onednn.install(fast)  # once more changes nothing
    assert fast.state_dict().keys() == plain.state_dict().keys()
    kinds = [type(module) for module in fast.modules()]
    assert nn.Linear not in kinds
    assert Conv1D not in kinds
    assert all(isinstance(a, type(b)) for a, b in zip(fast.modules(), plain.modules(), strict=True))
    if decoding:
        onednn.prepare_to_decode(fast)
    layer = fast[0].transformer.h[0].mlp
    for weight, moved in ((layer.c_fc.weight, decoding or not avx512), (layer.c_proj.weight, decoding)):
        assert weight.is_contiguous() == (not (frozen and moved))
        assert weight.t().is_contiguous() == (frozen and moved)
    ids = torch.randint(4, 31, (2, 6))
    gradients = []
    for model in (plain, fast):
        words = model[0].get_input_embeddings()(ids).detach().requires_grad_()
        other = model[1].get_input_embeddings()(ids).detach().requires_grad_()
        logits = model[0](inputs_embeds=words).logits, model[1](inputs_embeds=other, decoder_input_ids=ids).logits
        sum(part.square().sum() for part in logits).backward()
        trained = [p.grad for p in model.parameters() if p.grad is not None]
        gradients.append([*logits, words.grad, other.grad, *trained])
    assert len(always) > 40
    assert (len(gradients[0]) > 4) == (not frozen)
    for ours, torchs in zip(*gradients, strict=True):
        assert close(ours, torchs)


def _bart() -> BartForConditionalGeneration:
    sides = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sides |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    return BartForConditionalGeneration(BartConfig(vocab_size=31, d_model=16, max_position_embeddings=32, **sides))


@has_onednn
def test_the_golden_losses_and_gradients(always, golden_gpt2, monkeypatch):
    """The head's loss and its gradient too, which are made together."""
    base, prefix, arrays = golden_gpt2
    ids = arrays["batch.input_ids"]
    labels = ids.clone()
    labels[:, :2] = -100
    found = []
    for worth in (float("inf"), 0):
        monkeypatch.setattr(onednn, "WORTH", worth)
        model = PrefixLM(copy.deepcopy(base), copy.deepcopy(prefix)).train()
        nll, _ = model(ids, labels)
        nll.sum().backward()
        found.append([nll, *(p.grad for p in model.prefix.parameters())])
        assert bool(always) == (worth == 0)
    assert base.get_output_embeddings().weight.shape in always  # the logits
    assert base.get_output_embeddings().weight.t().shape in always  # and their gradient
    for ours, torchs in zip(*found, strict=True):
        assert close(ours, torchs)


@has_onednn
def test_not_taken_where_it_does_not_fit_or_pay(always, monkeypatch):
    layer, inputs = nn.Linear(4, 4), torch.randn(2, 4)
    onednn.install(layer)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(inputs).dtype == torch.bfloat16
        assert copy.deepcopy(layer).bfloat16()(inputs.bfloat16()).dtype == torch.bfloat16
        assert copy.deepcopy(layer).double()(inputs.double()).dtype == torch.float64
        monkeypatch.setattr(onednn, "WORTH", 2 * 4 * 4 + 1)
        layer(inputs)
        assert not always
        layer(torch.randn(3, 4))
        assert always


@pytest.mark.parametrize(
    ("capability", "vendor", "expected"),
    [
        ("AVX512", "AuthenticAMD", True),
        ("AVX512", "GenuineIntel", False),
        ("AVX2", "AuthenticAMD", True),
        ("DEFAULT", "AuthenticAMD", False),
    ],
)
def test_only_with_avx_and_not_on_intel(monkeypatch, capability, vendor, expected):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(onednn.Path, "is_file", lambda self: True)
    monkeypatch.setattr(onednn.Path, "read_text", lambda self, **_: f"vendor_id\t: {vendor}\n")
    assert onednn.is_faster.__wrapped__() is expected
    assert onednn.takes_transposed.__wrapped__() is (capability == "AVX512")
    layer = nn.Linear(2, 2)
    monkeypatch.setattr(onednn, "is_faster", lambda: expected)
    onednn.install(layer)
    assert (type(layer) is nn.Linear) == (not expected)
