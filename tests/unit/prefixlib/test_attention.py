"""Prefix inside the attention function: equal to a cache, to real tokens, to single runs; recomputable."""

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from prefixlib.compute import attention

TOLERANCE = 1e-5  # float32, logits of size about 3


@pytest.fixture
def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=61, n_positions=64, initializer_range=0.2)
    model = GPT2LMHeadModel(config).eval()
    attention.install(model)
    return model


@pytest.fixture
def llama():
    """Two key/value heads for four query heads, rotary positions."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=61,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    attention.install(model)
    return model


@pytest.fixture
def bart():
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=61,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=40,
        init_std=0.3,
    )
    model = BartForConditionalGeneration(config).eval()
    attention.install(model)
    return model


def layers_of(model):
    return [layer.attn if hasattr(layer, "attn") else layer.self_attn for layer in _blocks(model)]


def _blocks(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def random_prefix(model, length, rows=1, seed=1):
    """Per attention module (keys, values), each (rows, G, P, D)."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    shape = (rows, heads, length, config.hidden_size // config.num_attention_heads)
    return {
        module: (torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
        for module in layers_of(model)
    }


def tokens(rows, length, seed=2):
    return torch.randint(0, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits_by_cache(model, prefix, ids):
    rows = ids.shape[0]
    cache = DynamicCache([(k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)) for k, v in prefix.values()])
    return model(ids, past_key_values=cache, position_ids=positions(prefix, ids)).logits


def positions(prefix, ids):
    length = next(iter(prefix.values()))[0].shape[2]
    return torch.arange(length, length + ids.shape[1])[None]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_equals_a_seeded_cache(family, request):
    model = request.getfixturevalue(family)
    prefix, ids = random_prefix(model, 5), tokens(3, 9)
    without = model(ids).logits
    expected = logits_by_cache(model, prefix, ids)
    with attention.prefix_attention(prefix):
        found = model(ids, position_ids=positions(prefix, ids), use_cache=False).logits
    assert (found - expected).abs().max() < TOLERANCE
    assert (without - expected).abs().max() > 0.05  # the prefix matters
    assert torch.equal(model(ids).logits, without)  # and is gone once the context is closed


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_keys_of_real_tokens_equal_the_tokens_prepended(family, request):
    model = request.getfixturevalue(family)
    head, ids = tokens(1, 4, seed=5), tokens(3, 9)
    whole = model(torch.cat([head.expand(3, -1), ids], dim=1)).logits[:, 4:]
    with attention.record_key_values(layers_of(model)) as prefix:
        model(head)
    assert len(prefix) == 2
    with attention.prefix_attention(prefix):
        found = model(ids, position_ids=positions(prefix, ids), use_cache=False).logits
    assert (found - whole).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_rows_with_different_prefixes_equal_single_runs(family, request):
    """Lengths 3, 5, 4 in one batch, with a row whose text is padded on the left."""
    model = request.getfixturevalue(family)
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, :3] = 0
    prefixes = [random_prefix(model, length, seed=length) for length in (3, 5, 4)]
    together = {m: attention.pad_prefixes([prefix[m] for prefix in prefixes]) for m in layers_of(model)}
    where = torch.arange(9)[None] + torch.tensor([[3], [5 - 3], [4]])  # the first real token stands at P
    with attention.prefix_attention(together):
        batched = model(ids, attention_mask=mask, position_ids=where, use_cache=False).logits
    for row, prefix in enumerate(prefixes):
        real = mask[row].bool()
        with attention.prefix_attention(prefix):
            alone = model(ids[row, real][None], position_ids=where[row, real][None], use_cache=False).logits[0]
        assert (batched[row, real] - alone).abs().max() < TOLERANCE


def test_decoding_step_by_step_equals_teacher_forcing(llama):
    """The own keys sit in transformers' cache, the prefix beside it; two rows share a prefix over two beams each."""
    prefix, ids = random_prefix(llama, 5, rows=2), tokens(4, 6)
    where = torch.arange(5, 11)[None]
    with attention.prefix_attention(prefix):
        whole = llama(ids, position_ids=where, use_cache=False).logits
        cache, steps = DynamicCache(), []
        for t in range(6):
            out = llama(ids[:, t : t + 1], past_key_values=cache, position_ids=where[:, t : t + 1], use_cache=True)
            steps.append(out.logits)
    assert (torch.cat(steps, dim=1) - whole).abs().max() < TOLERANCE
    for beam in range(4):  # rows 0, 1 belong to prefix row 0, rows 2, 3 to row 1
        own = {m: (k[beam // 2 : beam // 2 + 1], v[beam // 2 : beam // 2 + 1]) for m, (k, v) in prefix.items()}
        with attention.prefix_attention(own):
            alone = llama(ids[beam : beam + 1], position_ids=where, use_cache=False).logits
        assert (whole[beam] - alone[0]).abs().max() < TOLERANCE


@pytest.mark.parametrize("kind", ["none", "bool", "float", "none-causal", "visible-none", "visible-float"])
def test_masks_of_every_kind(kind):
    """Each against a softmax written out by hand."""
    torch.manual_seed(0)
    rows, heads, queries, own, length, size = 2, 3, 4, 4, 3, 8
    query, key, value = (torch.randn(rows, heads, queries, size) for _ in range(3))
    visible = torch.tensor([[False, True, True], [True, True, True]]) if kind.startswith("visible") else None
    prefix = attention.Prefix(torch.randn(1, heads, length, size), torch.randn(1, heads, length, size), visible)
    module = nn.Module()
    module.is_causal = kind == "none-causal"
    seen = torch.ones(rows, 1, queries, own, dtype=torch.bool)
    mask = None
    if kind == "none-causal":
        seen = seen.tril()
    elif kind in ("bool", "float", "visible-float"):
        seen[1, :, :, 2:] = False
        mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with attention.prefix_attention({module: prefix}):
        found, _ = attention.prefix_sdpa(module, query, key, value, mask)

    columns = torch.ones(rows, 1, queries, length, dtype=torch.bool)
    if visible is not None:
        columns = visible[:, None, None, :].expand_as(columns)
    keys = torch.cat([prefix.keys.expand(rows, -1, -1, -1), key], dim=2)
    values = torch.cat([prefix.values.expand(rows, -1, -1, -1), value], dim=2)
    scores = query @ keys.transpose(2, 3) / size**0.5
    scores = scores.masked_fill(~torch.cat([columns, seen], dim=3), float("-inf"))
    expected = (scores.softmax(dim=-1) @ values).transpose(1, 2)
    assert (found - expected).abs().max() < TOLERANCE


def gradients(model, prefix, ids, where):
    """Loss and its gradient for each leaf of the prefix; backward runs after the context has closed."""
    leaves = {m: tuple(t.clone().requires_grad_() for t in pair) for m, pair in prefix.items()}
    torch.manual_seed(3)  # the same dropout masks
    with attention.prefix_attention(leaves):
        loss = model(ids, position_ids=where, labels=ids, use_cache=False).loss
    assert all("_prefix_key_values" not in module.__dict__ for module in model.modules())
    loss.backward()
    return loss.detach(), [t.grad for pair in leaves.values() for t in pair]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_checkpointing_changes_no_gradient(family, request):
    """In train mode with dropout on: recomputation meets the same prefix and the same dropout."""
    model = request.getfixturevalue(family).train()
    prefix, ids = random_prefix(model, 5), tokens(3, 9)
    where = positions(prefix, ids)
    loss, expected = gradients(model, prefix, ids, where)
    calls = []
    hook = layers_of(model)[0].register_forward_hook(lambda *_: calls.append(1))
    attention.enable_checkpointing(model)
    loss_again, found = gradients(model, prefix, ids, where)
    hook.remove()
    assert len(calls) == 2  # once forward, once recomputed: checkpointing did happen
    assert loss_again == loss
    assert len(found) == 4
    for one, other in zip(found, expected, strict=True):
        assert one.abs().max() > 0
        assert torch.equal(one, other)


def test_generate_is_unmodified_and_contexts_nest(gpt2):
    prefix, other, ids = random_prefix(gpt2, 5), random_prefix(gpt2, 2, seed=9), tokens(1, 4)
    with attention.prefix_attention(prefix):
        first = gpt2(ids).logits
        with attention.prefix_attention(other):
            inner = gpt2(ids).logits
        again = gpt2(ids).logits
        generated = gpt2.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=60)
        step_by_hand = ids
        for _ in range(6):
            following = gpt2(step_by_hand).logits[:, -1:].argmax(-1)
            step_by_hand = torch.cat([step_by_hand, following], dim=1)
    assert torch.equal(first, again)
    assert not torch.allclose(first, inner)
    assert torch.equal(generated, step_by_hand)


def test_encoder_decoder_sites_are_independent(bart):
    """A prefix at one site changes the output, one for no site changes nothing."""
    ids, out = tokens(2, 7), tokens(2, 5, seed=4)
    plain = bart(input_ids=ids, decoder_input_ids=out).logits
    sites = [bart.model.encoder.layers[0].self_attn, *(getattr(bart.model.decoder.layers[1], n) for n in SITES)]
    for site in sites:
        with attention.prefix_attention({site: (torch.randn(1, 4, 3, 8), torch.randn(1, 4, 3, 8))}):
            assert (bart(input_ids=ids, decoder_input_ids=out).logits - plain).abs().max() > 1e-3
    with attention.prefix_attention({}):
        assert torch.equal(bart(input_ids=ids, decoder_input_ids=out).logits, plain)


SITES = ("self_attn", "encoder_attn")


@pytest.mark.parametrize("kind", ["no mask", "bool", "additive", "position bias"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_attended_to_in_float32_where_that_is_faster(kind, autocast, monkeypatch):
    """Then the outputs are those of float32, rounded once; gradients come back in the type of what they belong to."""
    torch.manual_seed(0)
    rounded = [torch.randn(2, 2, 4, 8).bfloat16() for _ in range(3)]
    shown = torch.ones(4, 4, dtype=torch.bool).tril()[None, None]
    added = torch.zeros(1, 1, 4, 4).masked_fill(~shown, torch.finfo(torch.bfloat16).min)
    mask = {"bool": shown, "additive": added}.get(kind)
    bias = {"position_bias": torch.randn(1, 2, 4, 4).bfloat16()} if kind == "position bias" else {}
    module = nn.Module()

    def attend(dtypes, mask, **how):
        states = [state.to(dtype, copy=True).requires_grad_() for state, dtype in zip(rounded, dtypes, strict=True)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtypes[2] == torch.bfloat16):
            output, _ = attention.prefix_sdpa(module, *states, mask, scaling=0.3, **how)
        (output.float() * torch.arange(8)).sum().backward()
        return output, [state.grad for state in states]

    half, single = torch.bfloat16, torch.float32
    monkeypatch.setattr(attention.onednn, "is_faster", lambda: True)
    # under autocast the rotary embedding leaves queries and keys in float32
    dtypes = (single, single, half) if autocast else (half, half, half)
    given = mask.bfloat16() if kind == "additive" else mask
    output, gradients = attend(dtypes, given, **bias)
    expected, wide = attend((single,) * 3, mask, **{name: value.float() for name, value in bias.items()})
    assert output.dtype == half
    assert torch.equal(output, expected.bfloat16())
    for gradient, exact, dtype in zip(gradients, wide, dtypes, strict=True):
        assert gradient.dtype == dtype
        assert (gradient - exact).abs().max() <= 2**-8 * exact.abs().max()

    seen = []
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda module, query, *_, **__: (seen.append(query), None))
    asked = rounded[0].clone().requires_grad_()
    attention.prefix_sdpa(module, *rounded, given)  # nothing goes backward
    attention.prefix_sdpa(module, *(state.float().requires_grad_() for state in rounded), mask)
    monkeypatch.setattr(attention.onednn, "is_faster", lambda: False)
    attention.prefix_sdpa(module, asked, *rounded[1:], given)
    assert [query.dtype for query in seen] == [half, single, half]


def test_rows_that_do_not_fit_are_refused(gpt2):
    prefix = random_prefix(gpt2, 5, rows=2)
    with attention.prefix_attention(prefix), pytest.raises(ValueError, match="2 rows does not fit a batch of 3 rows"):
        gpt2(tokens(3, 4))
