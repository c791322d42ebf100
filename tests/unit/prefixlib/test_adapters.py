"""Adapters: their numbers and formulae, that only they move, and that nothing that copies a model loses them."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from prefixlib.base_model.load import fuse_gelu, load_model
from prefixlib.compute import attention
from prefixlib.methods import adapters
from prefixlib.system.errors import UserError

IDS = torch.tensor([[5, 9, 2, 33, 17], [1, 2, 3, 4, 5]])
BOTTLENECK = 4


def make_gpt2(**settings):
    torch.manual_seed(0)
    settings = {"n_layer": 3, "n_head": 2, "n_embd": 16, "vocab_size": 50, "initializer_range": 0.2, **settings}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=49, eos_token_id=49, **settings)).eval()


def make_bart():
    torch.manual_seed(0)
    shape = {f"{side}_{kind}": 2 for side in ("encoder", "decoder") for kind in ("layers", "attention_heads")}
    shape |= {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "init_std": 0.2}
    return BartForConditionalGeneration(BartConfig(vocab_size=50, **shape)).eval()


def make_llama():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=1, **shape)).eval()


def adapted(model, design):
    """`model` with adapters that are large enough to be seen, and only they trainable."""
    adapters.insert(model, design, BOTTLENECK)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if adapters.NAME in name:
            nn.init.normal_(parameter, std=0.5)
    adapters.train_only_adapters(model)
    return model


@pytest.mark.parametrize(("design", "parameters"), [(1, 4_991_328), (2, 9_884_352)])
def test_gpt2_medium_has_the_numbers_of_the_original(design, parameters):
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=24, n_head=16, n_embd=1024))
    adapters.insert(model, design, 100)
    names = adapters.train_only_adapters(model)
    assert all("adapter_block" in name for name in names)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == 354_823_168  # GPT-2 medium itself


@pytest.mark.parametrize("design", [1, 2])
def test_initialisation_is_the_originals(design):
    """N(0, 0.02) and biases 0, so not the identity; a new model starts near its base all the same."""
    model = make_gpt2(n_embd=128)
    adapters.insert(model, design, 50)
    seen = {name: p for name, p in model.named_parameters() if adapters.NAME in name}
    assert len(seen) == (3 * 6 if design == 1 else 3 * 2 * 4)
    for name, parameter in seen.items():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif ".norm." in name:
            assert parameter.eq(1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.002, name


def up_relu_down(adapter, x):
    hidden = torch.relu(x @ adapter.down.weight.T + adapter.down.bias)
    return hidden @ adapter.up.weight.T + adapter.up.bias


def layer_norm(norm, x, eps):
    deviation = (x.var(dim=-1, unbiased=False, keepdim=True) + eps).sqrt()
    return (x - x.mean(dim=-1, keepdim=True)) / deviation * norm.weight + norm.bias


def hidden_states(model):
    """What goes into each GPT-2 block and comes out of the last, before the final norm."""
    seen = []
    hooks = [block.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for block in model.transformer.h]
    hooks.append(model.transformer.ln_f.register_forward_pre_hook(lambda _, args: seen.append(args[0])))
    model(input_ids=IDS)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def test_design_1_by_hand():
    plain = make_gpt2(layer_norm_epsilon=0.3)  # an epsilon that shows
    model = adapted(copy.deepcopy(plain), 1)
    states = hidden_states(model)
    for n in range(3):
        out = plain.transformer.h[n](states[n], attention_mask=None)
        adapter = model.transformer.h[n].adapter_block
        by_hand = out + up_relu_down(adapter, layer_norm(adapter.norm, out, 0.3))
        assert torch.allclose(states[n + 1], by_hand, atol=1e-4)
        assert not torch.allclose(states[n + 1], out, atol=0.1)


@torch.no_grad()
def test_design_2_by_hand():
    plain = make_gpt2()
    model = adapted(copy.deepcopy(plain), 2)
    states = hidden_states(model)
    for n in range(3):
        block, x = plain.transformer.h[n], states[n]
        y = block.attn(block.ln_1(x))[0]
        x = x + y + up_relu_down(model.transformer.h[n].attn.adapter_block, y)
        y = block.mlp(block.ln_2(x))
        x = x + y + up_relu_down(model.transformer.h[n].mlp.adapter_block, y)
        assert torch.allclose(states[n + 1], x, atol=1e-4)


@torch.no_grad()
def test_design_2_in_a_bart_decoder_layer_by_hand():
    """Three sub-layers and so three adapters: self-attention, cross-attention, feed-forward."""
    model = adapted(make_bart(), 2)
    layer, plain = model.model.decoder.layers[0], make_bart().model.decoder.layers[0]
    x, encoded = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    out = layer(x, encoder_hidden_states=encoded, use_cache=False)
    y = plain.self_attn(x)[0]
    x = plain.self_attn_layer_norm(x + y + up_relu_down(layer.self_attn.adapter_block, y))
    y = plain.encoder_attn(x, key_value_states=encoded)[0]
    x = plain.encoder_attn_layer_norm(x + y + up_relu_down(layer.encoder_attn.adapter_block, y))
    y = plain.fc2(plain.activation_fn(plain.fc1(x)))
    x = plain.final_layer_norm(x + y + up_relu_down(layer.fc2.adapter_block, y))
    assert torch.allclose(out if torch.is_tensor(out) else out[0], x, atol=1e-4)


MODELS = {"gpt2": make_gpt2, "llama": make_llama, "bart": make_bart}
ADAPTERS = {  # how many: layers times places; BART has 2 encoder layers of 2 and 2 decoder layers of 3 sub-layers
    **{("gpt2", 1): 3, ("gpt2", 2): 6, ("llama", 1): 2, ("llama", 2): 4},
    **{("bart", 1): 4, ("bart", 2): 10},
}


@pytest.mark.parametrize(("family", "design"), ADAPTERS)
def test_only_adapters_move_and_all_of_them(family, design):
    model = adapted(MODELS[family](), design)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        with torch.no_grad():
            model(input_ids=IDS)
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "adapter_block" in name}
    assert len({name.split(".adapter_block.")[0] for name in moved}) == ADAPTERS[family, design]


@pytest.mark.parametrize(("family", "design"), ADAPTERS)
def test_copies_keep_their_adapters(family, design, tmp_path):
    """save_pretrained and back, deepcopy, pickle: the same logits, and adapters of their own."""
    model = adapted(MODELS[family](), design)
    fuse_gelu(model)  # as load_model does
    logits = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), "encoder-decoder" if family == "bart" else "decoder-only")
    for twin in (loaded, copy.deepcopy(model), copy.deepcopy(loaded), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(input_ids=IDS).logits, logits)
        assert twin.state_dict().keys() == model.state_dict().keys()
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                if adapters.NAME in name:
                    parameter.zero_()
        assert not torch.equal(twin(input_ids=IDS).logits, logits)
    assert torch.equal(model(input_ids=IDS).logits, logits)


@pytest.mark.parametrize(("family", "design"), ADAPTERS)
def test_checkpointing_gives_the_same_gradients(family, design):
    model = adapted(MODELS[family](), design)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            attention.enable_checkpointing(model)
        model.train()
        for module in model.modules():  # BART keeps its probabilities as numbers
            module.__dict__.update({k: 0.0 for k in module.__dict__ if "dropout" in k})
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.zero_grad()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


def test_a_model_without_a_place_for_design_2_is_refused():
    """BLOOM's modules add the residual themselves; design 1 works there."""
    model = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2))
    with pytest.raises(UserError, match="--adapter_design 2: BloomBlock has no place for it"):
        adapters.insert(model, 2, BOTTLENECK)
    adapters.insert(model, 1, BOTTLENECK)
    assert sum(isinstance(m, adapters.Adapter) for m in model.modules()) == 2


def test_adapters_upon_adapters_are_refused():
    model = adapted(make_gpt2(), 1)
    with pytest.raises(UserError, match="has adapters already"):
        adapters.insert(model, 2, BOTTLENECK)


def test_adapters_of_another_make_are_refused(tmp_path):
    """Under names of their own they would be left out of the model in silence."""
    adapted(make_gpt2(), 1).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    renamed = {name.replace(".down.", ".project_down."): t for name, t in load_file(path).items()}
    save_file(renamed, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="its adapters are not of this package's kind") as error:
        load_model(str(tmp_path), "decoder-only")
    assert "\n" not in str(error.value)
    plain = make_gpt2()
    plain.save_pretrained(tmp_path / "plain")
    save_file({**load_file(tmp_path / "plain" / "model.safetensors"), "h.adapter_block.x": torch.ones(1)}, path)
    (tmp_path / "config.json").write_text((tmp_path / "plain" / "config.json").read_text())
    with pytest.raises(UserError, match=r"its adapters are not of this package's kind .*h.adapter_block.x"):
        load_model(str(tmp_path), "decoder-only")
