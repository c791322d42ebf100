"""The method: what moves, what the prefix is equal to, what the batch must not change."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2.frozen_lm import without_weights
from gpt2.prefix_lm import PrefixLM
from gpt2.train_control import PrefixConfig, PrefixTuning, split_layers
from prefixlib.system.errors import UserError
from tests.conftest import SETTINGS, close

TEXT = torch.tensor([[5, 6, 7, 49, 8, 9, 49], [10, 49, 11, 49, 49, 49, 49]])
LABELS = torch.tensor([[-100, -100, -100, -100, 8, 9, 49], [-100, -100, 11, 49, -100, -100, -100]])


def test_only_the_prefix_moves_and_all_of_it_does(tiny_lm):
    before = copy.deepcopy(tiny_lm.state_dict())
    optimizer = torch.optim.AdamW([p for p in tiny_lm.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        tiny_lm.train()
        nll, _ = tiny_lm(TEXT, LABELS)
        nll.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        tiny_lm.eval()
        with torch.no_grad():  # an evaluation in between must leave nothing behind
            tiny_lm(TEXT, LABELS)
    after = tiny_lm.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("prefix.")}
    assert len(moved) == 5
    # row by row: every one of the P vectors and every output channel moved
    assert ((before["prefix.wte.weight"] != after["prefix.wte.weight"]).any(dim=1)).all()
    bias = "prefix.control_trans.2.bias"
    assert (before[bias] != after[bias]).float().mean() > 0.99


def test_keys_and_values_of_real_tokens_equal_those_tokens_prepended(tiny_lm):
    base = tiny_lm.base
    words = torch.tensor([[3, 1, 4]])
    with torch.no_grad():
        whole = base(torch.cat([words.expand(2, -1), TEXT], dim=1)).logits[:, 3:]
        cache = base(words, use_cache=True).past_key_values
        flat = torch.cat(
            [t.permute(0, 2, 1, 3).reshape(3, -1) for layer in cache.layers for t in (layer.keys, layer.values)], dim=1
        )
        tiny_lm.prefix.flat = lambda: flat
        behind = tiny_lm(TEXT)
    assert close(behind, whole)


def test_padded_row_equals_the_row_alone(tiny_lm):
    together = tiny_lm(TEXT)
    alone = tiny_lm(TEXT[1:, :4])
    assert close(together[1, :4], alone[0])


def test_the_network_runs_once_on_p_rows_whatever_the_batch(tiny_lm):
    seen = []
    tiny_lm.prefix.control_trans.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    tiny_lm.train()(TEXT.repeat(4, 1), LABELS.repeat(4, 1))
    assert seen == [(3, 16)]


def test_flat_prefix_equals_the_network(tiny_lm):
    flat = tiny_lm.prefix.flat()
    assert flat.shape == (3, 2 * 2 * 16)
    layers = split_layers(flat, tiny_lm.prefix.config, batch_size=2)
    for (keys, values), (network_keys, network_values) in zip(layers, tiny_lm.prefix(2), strict=True):
        assert torch.equal(keys, network_keys)
        assert torch.equal(values, network_values)
    # column ((2*layer + kv)*H + head)*D + d holds one number of one head
    assert torch.equal(layers[1][1][0, 1, 2, 3], flat[2, ((2 * 1 + 1) * 2 + 1) * 8 + 3])


def test_prefix_dropout_is_drawn_for_every_row(tiny_lm):
    tiny_lm.prefix.dropout.p = 0.5
    keys = tiny_lm.train().prefix(64)[0][0]
    zeros = keys.eq(0).float()
    assert 0.4 < zeros.mean() < 0.6
    assert not torch.equal(keys[0], keys[1])
    assert torch.equal(*tiny_lm.eval().prefix(2)[0][0])


def test_base_is_in_eval_mode_while_training_unless_asked(tiny_lm):
    tiny_lm.train()
    assert not any(module.training for module in tiny_lm.base.modules())
    assert tiny_lm.prefix.training
    tiny_lm.train_base = True
    assert all(module.training for module in tiny_lm.train().modules())
    assert not any(module.training for module in tiny_lm.eval().modules())


def test_token_nll_equals_cross_entropy_over_all_logits(tiny_lm):
    nll, rows = tiny_lm(TEXT, LABELS)
    logits = tiny_lm(TEXT)
    expected = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten(), ignore_index=-100, reduction="none"
    )
    assert close(nll, expected[expected != 0])
    assert rows.tolist() == [0, 0, 0, 1, 1]


def test_every_forward_gets_its_own_cache(tiny_lm):
    first = tiny_lm(TEXT)
    assert torch.equal(first, tiny_lm(TEXT))


@pytest.mark.parametrize("length", [0, 63, 64, 1000])
def test_a_prefix_that_does_not_fit_is_refused(length):
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50, n_positions=64)
    with pytest.raises(UserError, match=f"--preseqlen {length}: the model has 64 positions; take 1 to 62"):
        PrefixConfig.for_model(without_weights(config), preseqlen=length, mid_dim=8, **SETTINGS)


def test_parameter_counts_of_the_paper():
    """GPT-2 medium, mid_dim 512: P 5 trains 25,744,896 numbers and keeps 245,760 (paper, section 4.3)."""
    config = GPT2Config(n_layer=24, n_head=16, n_embd=1024)
    with torch.device("meta"):
        for length, count in ((5, 25_744_896), (10, 25_750_016)):
            prefix = PrefixTuning(
                PrefixConfig.for_model(without_weights(config), preseqlen=length, mid_dim=512, **SETTINGS)
            )
            assert sum(p.numel() for p in prefix.parameters()) == count
            assert prefix.flat().numel() == length * 49_152


def test_initialisation_is_torch_default_not_transformers():
    """Embeddings N(0, 1), linears U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=4, n_head=4, n_embd=256)
    prefix = PrefixTuning(PrefixConfig.for_model(without_weights(config), preseqlen=50, mid_dim=64, **SETTINGS))
    assert 0.95 < prefix.wte.weight.std() < 1.05
    assert 0.95 / 8 < prefix.control_trans[2].weight.abs().max() <= 1 / 8
    assert 0.9 / 8 < prefix.control_trans[2].bias.abs().max() <= 1 / 8


def test_autocast_joins_prefix_and_text_in_one_dtype(tiny_lm):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nll, _ = tiny_lm(TEXT, LABELS)
    exact, _ = tiny_lm(TEXT, LABELS)
    assert (nll - exact).abs().max() < 0.1


def test_a_bfloat16_base_trains_a_float32_prefix(tiny_lm):
    tiny_lm.base.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tiny_lm(TEXT, LABELS)[0].sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in tiny_lm.prefix.parameters())


def test_checkpointing_changes_neither_loss_nor_gradient():
    torch.manual_seed(0)
    settings = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    base = GPT2LMHeadModel(GPT2Config(n_layer=3, n_head=2, n_embd=16, vocab_size=50, n_positions=64, **settings))
    prefix = PrefixTuning(PrefixConfig.for_model(base, preseqlen=3, mid_dim=8, **SETTINGS))
    plain, recomputed = {}, {}
    for grads, checkpointing in ((plain, False), (recomputed, True)):
        runs = []
        model = PrefixLM(copy.deepcopy(base), prefix, train_base=checkpointing, checkpointing=checkpointing).train()
        model.base.transformer.h[1].attn.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        prefix.zero_grad()
        nll, _ = model(TEXT, LABELS)
        nll.sum().backward()
        grads.update({name: p.grad.clone() for name, p in prefix.named_parameters()}, loss=nll.detach())
        assert len(runs) == (2 if checkpointing else 1)  # the middle layer really ran again
    assert plain.keys() == recomputed.keys()
    assert all(close(recomputed[name], plain[name]) for name in plain)
