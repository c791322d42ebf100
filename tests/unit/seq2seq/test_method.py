"""The three prefixes of an encoder-decoder: real tokens, padding, dropout, initialisation, flattening, checkpoints."""

import json

import pytest
import torch
from transformers import BartForConditionalGeneration

from prefixlib.checkpoints import checkpoint
from prefixlib.compute import attention
from prefixlib.decoding.search import DecodingRule
from prefixlib.system.errors import UserError
from seq2seq.building import Given, start_from_text
from seq2seq.decoding import Past, Seq2SeqSteps, decode
from seq2seq.frozen_lm import attend_to, attention_sites, key_values_of_text
from seq2seq.model import load_prefix, save_prefix
from seq2seq.prefix_lm import PrefixLM
from seq2seq.prefixTuning import BRANCHES, PrefixConfig, PrefixTuning
from tests.seq2seq_tiny import make_bart, random_model

SETTINGS = {"mid_dim": 8, "prefix_dropout": 0.0, "use_deep": False, "init_shallow": False}
SETTINGS |= {branch.switch: True for branch in BRANCHES}
TOLERANCE = 1e-5  # float32, logits of size about 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_bart(tmp_path_factory.mktemp("bart") / "model", init_std=0.3)


@pytest.fixture
def bart(folder):
    model = BartForConditionalGeneration.from_pretrained(folder).eval()
    attention.install(model)
    return model


def make_prefix(bart, length=3, **settings):
    torch.manual_seed(1)
    return PrefixTuning(PrefixConfig.for_model(bart.config, preseqlen=length, **{**SETTINGS, **settings}))


def tokens(rows, length, seed=0):
    return torch.randint(4, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


def without_positions(model):
    """Position tables of zeros: only then is a token the same wherever it stands."""
    for side in (model.get_encoder(), model.get_decoder()):
        side.embed_positions.weight.data.zero_()
    return model


@torch.no_grad()
def test_decoder_keys_of_real_tokens_equal_the_tokens_prepended(bart):
    """Decoder self-attention, every layer: attention is causal, so the head's keys do not depend on what follows."""
    model, source, head, rest = without_positions(bart), tokens(1, 6), tokens(1, 4, 1), tokens(1, 5, 2)
    whole = model(input_ids=source, decoder_input_ids=torch.cat([head, rest], dim=1)).logits[:, 4:]
    sites = attention_sites(model)["self"]
    with attention.record_key_values(sites) as seen:
        model(input_ids=source, decoder_input_ids=head)
    with attend_to(model, {"self": [seen[module] for module in sites]}):
        found = model(input_ids=source, decoder_input_ids=rest, use_cache=False).logits
    assert (found - whole).abs().max() < TOLERANCE


@torch.no_grad()
def test_cross_keys_of_real_tokens_equal_the_encoded_tokens(bart):
    """Cross-attention, every layer: the encoded head as prefix, the encoded rest as source."""
    out = tokens(2, 5, 3)
    encoded = torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(4))
    sites = attention_sites(bart)["cross"]
    whole = bart(encoder_outputs=(encoded,), decoder_input_ids=out).logits
    with attention.record_key_values(sites) as seen:
        bart(encoder_outputs=(encoded[:, :4],), decoder_input_ids=out)
    with attend_to(bart, {"cross": [seen[module] for module in sites]}):
        found = bart(encoder_outputs=(encoded[:, 4:],), decoder_input_ids=out, use_cache=False).logits
    assert (found - whole).abs().max() < TOLERANCE


@torch.no_grad()
def test_encoder_keys_of_real_tokens_equal_the_tokens_prepended(tmp_path):
    """Encoder self-attention looks both ways, so this holds in a first layer alone, whose keys come from the words."""
    model = BartForConditionalGeneration.from_pretrained(make_bart(tmp_path / "one", encoder_layers=1)).eval()
    attention.install(without_positions(model))
    encoder, head, rest = model.get_encoder(), tokens(2, 4, 1), tokens(2, 5, 2)
    whole = encoder(input_ids=torch.cat([head, rest], dim=1)).last_hidden_state[:, 4:]
    (site,) = attention_sites(model)["encoder"]
    with attention.record_key_values([site]) as seen:
        encoder(input_ids=head)
    with attend_to(model, {"encoder": [seen[site]]}):
        found = encoder(input_ids=rest).last_hidden_state
    assert (found - whole).abs().max() < TOLERANCE


@torch.no_grad()
def test_positions_do_not_move(bart):
    """A prefix whose every column is hidden changes nothing: the text's positions stay its own."""
    ids, out = tokens(2, 7), tokens(2, 5, 1)
    plain = PrefixLM(bart, None)(ids, torch.ones_like(ids), out)
    states, unseen = torch.randn(1, 2, 3, 8), torch.zeros(1, 3, dtype=torch.bool)
    modules = [module for layers in attention_sites(bart).values() for module in layers]
    assert len(modules) == 6
    with attention.prefix_attention({module: attention.Prefix(states, states, unseen) for module in modules}):
        found = bart(input_ids=ids, decoder_input_ids=out, use_cache=False).logits
    assert (found - plain).abs().max() < TOLERANCE


@torch.no_grad()
def test_a_padded_row_equals_the_row_alone(bart):
    lm = PrefixLM(bart, make_prefix(bart)).eval()
    ids, out = tokens(3, 9), tokens(3, 6, 1)
    sizes = [(9, 6), (5, 6), (7, 2)]
    mask = torch.zeros(3, 9, dtype=torch.long)
    for row, (source, target) in enumerate(sizes):
        mask[row, :source] = 1
        ids[row, source:] = out[row, target:] = bart.config.pad_token_id
    together = lm(ids, mask, out)
    for row, (source, target) in enumerate(sizes):
        alone = lm(ids[row : row + 1, :source], mask[row : row + 1, :source], out[row : row + 1, :target])
        assert (together[row, :target] - alone[0]).abs().max() < TOLERANCE


@torch.no_grad()
def test_a_start_token_with_the_padding_s_id_is_seen(bart):
    """Pegasus starts its decoder with the padding token."""
    lm, ids, out = PrefixLM(bart, make_prefix(bart)).eval(), tokens(2, 7), tokens(2, 5, 1)
    out[:, 0] = bart.config.pad_token_id
    with attend_to(bart, lm.prefix(1)):
        unmasked = bart(input_ids=ids, decoder_input_ids=out, use_cache=False).logits
    assert (lm(ids, torch.ones_like(ids), out) - unmasked).abs().max() < TOLERANCE


def test_decoding_keeps_file_order_and_ignores_the_batch(bart):
    """Seven sources of different lengths, whatever the batch: the same outputs in the same places."""
    prefix = make_prefix(bart)(1)
    sources = [tokens(1, size, size)[0].tolist() for size in (4, 9, 2, 7, 5, 12, 3)]
    rule = DecodingRule(eos_token_id=2, max_new_tokens=9, num_beams=3, min_length=3, forced_last_token_id=2)
    runs = [
        decode(bart, sources, rule, prefix=prefix, batch_size=size, progress=False) for size in (1, 2, 3, len(sources))
    ]
    outputs = [[best.tokens for (best,) in run] for run in runs]
    assert len(outputs[0]) == 7
    assert len({tuple(tokens) for tokens in outputs[0]}) > 1
    assert all(output == outputs[0] for output in outputs[1:])


@pytest.mark.parametrize("family", ["Bart", "MBart", "Pegasus"])
@torch.no_grad()
def test_beams_on_one_row_of_the_cache_equal_each_output_read_alone(family):
    """Beams split and die, a source leaves the batch: every step's logits are those of teacher forcing."""
    model = random_model(family)
    lm = PrefixLM(model, make_prefix(model)).eval()
    ids, mask = tokens(3, 9) % 90, torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:], ids[1, 6:] = 0, model.config.pad_token_id
    steps = Seq2SeqSteps(model, ids, mask, Past(lm.prefix(1)))
    found, outputs, sources = steps.prefill(), [[2]] * 3, [0, 1, 2]
    moves = [[0, 0, 0, 1, 1, 1, 2, 2, 2], [1, 0, 1, 5, 5, 3, 6, 7, 8], [3, 4, 4, 8, 6, 6], [2, 1, 0, 3, 3, 3]]
    for step, rows in enumerate([*moves, None]):
        whole = lm(ids[sources], mask[sources], torch.tensor(outputs))[:, -1]
        assert (found - whole).abs().max() < TOLERANCE, step
        if rows is not None:
            chosen = [(7 * step + 5 * n) % 80 + 5 for n in range(len(rows))]
            outputs = [[*outputs[row], token] for row, token in zip(rows, chosen, strict=True)]
            sources = [sources[row] for row in rows]
            found = steps.advance(torch.tensor(rows), torch.tensor(chosen))


@torch.no_grad()
def test_under_autocast_the_cache_holds_what_the_model_computes_in(bart):
    """Validation of a bfloat16 run: a prefix in float32 would make the whole cache so, converted anew at every step."""
    ids = tokens(2, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        steps = Seq2SeqSteps(bart, ids, torch.ones_like(ids), Past(make_prefix(bart)(1)))
        steps.prefill()
        steps.advance(torch.tensor([0, 0, 1, 1]), torch.tensor([5, 6, 7, 8]))
    layers = [*steps.cache.self_attention_cache.layers, *steps.cache.cross_attention_cache.layers]
    assert len(layers) == 4
    assert {states.dtype for layer in layers for states in (layer.keys, layer.values)} == {torch.bfloat16}


def test_dropout_is_drawn_for_every_row_after_the_expansion(bart):
    prefix = make_prefix(bart, prefix_dropout=0.5).train()
    for layers in prefix(4).values():
        keys, values = layers[0]
        assert keys.shape == (4, 2, 3, 8)
        assert not torch.equal(keys[0], keys[1])
        kept = (keys[0] != 0) & (keys[1] != 0)
        assert torch.equal(keys[0][kept], keys[1][kept])  # one network output under both masks
        assert 0 < (values == 0).float().mean() < 1
    for layers in prefix.eval()(4).values():
        assert layers[0][0].shape == (1, 2, 3, 8)  # one row, which attention expands as a view
    assert make_prefix(bart).train()(4)["self"][0][0].shape == (1, 2, 3, 8)


def test_branches_are_independent_and_can_be_switched_off(bart):
    whole = make_prefix(bart)
    assert set(whole(1)) == {"self", "cross", "encoder"}
    assert len({parameter.data_ptr() for parameter in whole.parameters()}) == 15
    for branch in BRANCHES:
        prefix = make_prefix(bart, **{branch.switch: False})
        assert set(prefix(1)) == set(whole(1)) - {branch.site}
        assert not any(name.split(".")[0] in (branch.embedding, branch.network) for name in prefix.state_dict())
    with pytest.raises(UserError, match="are all no: nothing to train"):
        make_prefix(bart, **{branch.switch: False for branch in BRANCHES})


def test_parameter_counts_are_the_original_s():
    """facebook/bart-large: P 200, mid_dim 800 and P 5, mid_dim 512, counted on the first implementation."""
    shape = {"encoder_layers": 12, "decoder_layers": 12, "encoder_heads": 16, "decoder_heads": 16, "d_model": 1024}
    for length, middle, expected in ((200, 800, 62_130_528), (5, 512, 39_412_224)):
        with torch.device("meta"):
            prefix = PrefixTuning(PrefixConfig(preseqlen=length, **{**SETTINGS, "mid_dim": middle}, **shape))
        assert sum(parameter.numel() for parameter in prefix.parameters()) == expected


def test_different_depths_and_heads(tmp_path):
    model = BartForConditionalGeneration.from_pretrained(
        make_bart(tmp_path / "odd", encoder_layers=3, decoder_layers=1, encoder_attention_heads=4)
    )
    lm = PrefixLM(model, make_prefix(model))
    layers = lm.prefix(1)
    assert [(len(layers[site]), *layers[site][0][0].shape) for site in ("encoder", "self", "cross")] == [
        (3, 1, 4, 3, 4),
        (1, 1, 2, 3, 8),
        (1, 1, 2, 3, 8),
    ]
    ids = tokens(2, 7)
    lm(ids, torch.ones_like(ids), tokens(2, 5)).sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in lm.prefix.parameters())


@torch.no_grad()
def test_key_values_of_a_text(bart):
    """By hand: the projections of what each attention read."""
    ids = [40, 41, 42]
    flat = key_values_of_text(bart, ids)
    read = {}
    for site, modules in attention_sites(bart).items():
        for number, module in enumerate(modules):
            for kind in ("k_proj", "v_proj"):
                getattr(module, kind).register_forward_hook(
                    lambda _m, _i, out, place=(site, number, kind): read.__setitem__(place, out)
                )
    text = torch.tensor([ids])
    bart(input_ids=text, decoder_input_ids=text, use_cache=False)
    assert len(read) == 3 * 2 * 2
    for site, states in flat.items():
        expected = torch.cat([read[site, layer, kind][0] for layer in (0, 1) for kind in ("k_proj", "v_proj")], dim=1)
        assert states.shape == (3, 2 * 2 * 16)
        assert (states - expected).abs().max() < TOLERANCE


def test_start_from_a_text(bart):
    """Without the MLP: the text's keys and values themselves. With it: 500 steps towards them, embeddings untouched."""
    ids = [40, 41, 42]
    target = key_values_of_text(bart, ids)
    shallow = make_prefix(bart, init_shallow=True)
    assert start_from_text(shallow, Given(bart, ids)) == []
    assert all(torch.equal(flat, target[site]) for site, flat in shallow.flat().items())
    mlp = make_prefix(bart)
    embeddings = {branch.embedding: getattr(mlp, branch.embedding).weight.clone() for branch in BRANCHES}
    losses = start_from_text(mlp, Given(bart, ids))
    assert len(losses) == 500
    assert losses[-1] < losses[0]
    distance = sum((mlp.flat()[site] - target[site]).square().mean() for site in target)
    assert distance.item() == pytest.approx(losses[-1], rel=0.01)
    assert all(torch.equal(getattr(mlp, name).weight, before) for name, before in embeddings.items())
    assert all(parameter.grad is None for parameter in mlp.parameters())


@pytest.mark.parametrize("settings", [{}, {"use_deep": True}, {"init_shallow": True}, {"use_self_prefix": False}])
def test_saved_prefix_comes_back_and_flat_equals_the_network(bart, tmp_path, settings):
    prefix = make_prefix(bart, **settings)
    save_prefix(tmp_path, prefix, {"name": "facebook/bart-large", "revision": None}, {"mode": "xsum"})
    loaded = load_prefix(tmp_path)
    again = PrefixTuning(loaded.config)
    again.load_state_dict(loaded.network)
    layers = loaded.for_decoding()(1)
    expected = again(1)
    assert layers.keys() == expected.keys() == {branch.site for branch in prefix.branches}
    for site, pairs in expected.items():
        assert len(pairs) == 2
        for (keys, values), (flat_keys, flat_values) in zip(pairs, layers[site], strict=True):
            assert torch.equal(keys, flat_keys)
            assert torch.equal(values, flat_values)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "prefix_config.json",
        "prefix_flat.safetensors",
        "prefix_model.safetensors",
    ]


@pytest.mark.parametrize("deep", [False, True])
def test_checkpoint_of_the_original_loads(bart, tmp_path, deep):
    prefix = make_prefix(bart, use_deep=deep)
    torch.save(prefix.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(bart.config.to_dict() | {"preseqlen": 3, "use_prefix": True}))
    loaded = load_prefix(tmp_path)
    assert loaded.config == prefix.config
    assert all(torch.equal(loaded.flat[site], flat) for site, flat in prefix.flat().items())
    torch.save({"control_trans.0.weight": torch.zeros(8, 16)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="not a BART prefix of the original"):
        load_prefix(tmp_path)


def test_wrong_checkpoints_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_prefix(tmp_path / "nowhere")
    checkpoint.save(
        tmp_path,
        family="decoder-only",
        base={"name": "gpt2"},
        prefix={},
        task={},
        network={"x": torch.zeros(1)},
        flat={"x": torch.zeros(1)},
        versions={},
    )
    with pytest.raises(UserError, match=r"holds a prefix .*decoder-only.*encoder-decoder.* is needed here"):
        load_prefix(tmp_path)
