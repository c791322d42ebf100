"""Encoder-decoders beyond BART: relative positions, rotary ones, capped scores, positions that the model counts."""

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from prefixlib.compute import attention
from prefixlib.data.tasks import find_task
from prefixlib.decoding.search import DecodingRule, beam_search
from prefixlib.methods import adapters, top_layers
from prefixlib.settings.search import Search
from prefixlib.system.errors import UserError
from scripts import export
from seq2seq import finetune
from seq2seq.building import Given, start_from_text
from seq2seq.callbacks import Checkpoints
from seq2seq.decoding import (
    CopyingSteps,
    Past,
    Seq2SeqSteps,
    decode,
    decoding_rule,
    make_steps,
    pad_sources,
    side_by_side,
    start_tokens,
)
from seq2seq.frozen_lm import attend_to, attention_sites, hidden_states, shares_rows
from seq2seq.model import load
from seq2seq.prefix_lm import PrefixLM
from seq2seq.prefixTuning import BRANCHES, PrefixConfig, PrefixTuning
from seq2seq.utils import Collator, Example
from tests.conftest import close
from tests.seq2seq_tiny import make_bart, make_summaries, training_flags

SIDES = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("attention_heads", 2))}
BART = {**SIDES, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 60, "d_model": 16, "init_std": 0.3}
BART |= {"max_position_embeddings": 64, "dropout": 0.0, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
BART |= {"decoder_start_token_id": 2}
T5 = {"vocab_size": 60, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "dropout_rate": 0.0}
T5 |= {"decoder_start_token_id": 0}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
GEMMA = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 6}
GEMMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 6, "sliding_window": 5}
GEMMA |= {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0, "max_position_embeddings": 64}


def t5gemma_config():
    decoder = {**GEMMA, "hidden_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.T5GemmaConfig(encoder=GEMMA, decoder=decoder, vocab_size=60)


FAMILIES = {
    **{name: lambda name=name: getattr(transformers, f"{name}Config")(**BART) for name in ("Bart", "MBart", "Pegasus")},
    **{name: lambda name=name: getattr(transformers, f"{name}Config")(**BART) for name in ("Blenderbot", "M2M100")},
    "Marian": lambda: transformers.MarianConfig(**{**BART, "pad_token_id": 59, "decoder_start_token_id": 59}),
    "T5": lambda: transformers.T5Config(**T5),
    "T5 gated": lambda: transformers.T5Config(**T5, **GATED),  # Flan-T5
    "MT5": lambda: transformers.MT5Config(**T5, **GATED),
    "UMT5": lambda: transformers.UMT5Config(**T5, **GATED),
    "T5Gemma": t5gemma_config,
}
LIMITED = {key: value for key, value in BART.items() if key != "max_position_embeddings"}
REFUSED = {
    "led": {**LIMITED, "attention_window": 4, "max_encoder_position_embeddings": 64},
    "longt5": {**T5, "local_radius": 3},
    "pegasus_x": {**LIMITED, "num_global_tokens": 2, "block_size": 4},
    "prophetnet": {"vocab_size": 60, "hidden_size": 16, "num_encoder_layers": 1, "num_decoder_layers": 1,
        "num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2, "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16, "decoder_start_token_id": 0},
}  # fmt: skip
COPYING = {"M2M100", "T5", "T5 gated", "MT5", "UMT5", "T5Gemma"}  # the others' beams share a row
OWN_HEAD = {"T5", "UMT5", "T5Gemma"}  # the logits are not their output layer's alone
SETTINGS = {"mid_dim": 8, "prefix_dropout": 0.0, "use_deep": False, "init_shallow": False}
SETTINGS |= {branch.switch: True for branch in BRANCHES}
SIZES = ((9, 6), (5, 6), (7, 2))  # tokens of source and target


def random_model(name):
    torch.manual_seed(0)
    model = transformers.AutoModelForSeq2SeqLM.from_config(FAMILIES[name]()).eval()
    for parameter_name, parameter in model.named_parameters():  # far from the tiny initial values
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
        elif "norm" not in parameter_name:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


def make(name, **settings) -> PrefixLM:
    base = random_model(name)
    torch.manual_seed(1)
    prefix = PrefixTuning(PrefixConfig.for_model(base.config, preseqlen=3, **{**SETTINGS, **settings}))
    return PrefixLM(base, prefix).eval()


def tokens(rows, length, seed=0):
    return torch.randint(4, 58, (rows, length), generator=torch.Generator().manual_seed(seed))


def batch_for(model):
    """Three padded pairs."""
    ids, out, padding = tokens(3, 9), tokens(3, 6, 1), model.base.config.pad_token_id
    mask = torch.zeros(3, 9, dtype=torch.long)
    out[:, 0] = start_tokens(model.base, 1)[0][0]
    labels = torch.cat([out[:, 1:], tokens(3, 1, 2)], dim=1)
    for row, (source, target) in enumerate(SIZES):
        mask[row, :source] = 1
        ids[row, source:] = out[row, target:] = labels[row, target:] = padding
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": out, "labels": labels}


def without_positions(model):
    """Only where no position counts is a token the same wherever it stands."""
    for module in model.modules():
        for position in ("embed_positions", "relative_attention_bias"):
            if hasattr(module, position):
                table = getattr(module, position)
                getattr(table, "weight", getattr(table, "weights", None)).data.zero_()
        if hasattr(module, "inv_freq"):
            module.inv_freq.zero_()
        if getattr(module, "sliding_window", None):
            module.config.sliding_window = 50
    return model


def run(model, *batch):
    masks = [torch.ones_like(ids) for ids in batch]
    return hidden_states(model, batch[0], masks[0], batch[1], masks[1])


def test_only_the_prefix_moves_and_all_of_it_does(name):
    model = make(name)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        model.train().loss(**batch_for(model))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.eval().loss(**batch_for(model))
    after = model.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key for key in before if key.startswith("prefix.")}


@torch.no_grad()
def test_without_a_prefix_it_is_the_model_itself(name):
    """The attention function that is put in gives what transformers' own does."""
    ids, out, base = tokens(2, 7), tokens(2, 5, 1), random_model(name)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": out, "use_cache": False}
    own = base(**batch, decoder_attention_mask=torch.ones_like(out)).logits
    assert close(PrefixLM(base)(ids, torch.ones_like(ids), out), own)


@torch.no_grad()
def test_keys_and_values_of_real_tokens_equal_those_tokens_prepended(name):
    """Decoder self-attention and cross-attention in every layer; the encoder, which looks both ways, in its first."""
    model = without_positions(make(name).base)
    sites, source, head, rest = attention_sites(model), tokens(2, 6), tokens(2, 4, 1), tokens(2, 5, 2)
    with attention.record_key_values(sites["self"]) as seen:
        run(model, source, head)
    whole = run(model, source, torch.cat([head, rest], dim=1))[:, 4:]
    with attend_to(model, {"self": [seen[module] for module in sites["self"]]}):
        assert close(run(model, source, rest), whole)

    encoded = model.get_encoder()(input_ids=torch.cat([head, rest], dim=1)).last_hidden_state
    decoder, inputs = model.get_decoder(), {"input_ids": source, "use_cache": False}
    whole = decoder(**inputs, encoder_hidden_states=encoded).last_hidden_state
    with attention.record_key_values(sites["cross"]) as seen:
        decoder(**inputs, encoder_hidden_states=encoded[:, :4])
    with attend_to(model, {"cross": [seen[module] for module in sites["cross"]]}):
        assert close(decoder(**inputs, encoder_hidden_states=encoded[:, 4:]).last_hidden_state, whole)

    first, kept = sites["encoder"][0], {}
    with attention.record_key_values([first]) as seen:
        model.get_encoder()(input_ids=head)
    hook = first.register_forward_hook(lambda _m, _i, out: kept.__setitem__("out", out[0]))
    model.get_encoder()(input_ids=torch.cat([head, rest], dim=1))
    whole = kept["out"][:, 4:]
    with attention.prefix_attention({first: seen[first]}):
        model.get_encoder()(input_ids=rest)
    assert close(kept["out"], whole)
    hook.remove()


@torch.no_grad()
def test_positions_do_not_move(name):
    """A prefix whose every column is hidden changes nothing: the text's positions stay its own."""
    model = make(name)
    ids, out = tokens(2, 7), tokens(2, 5, 1)
    plain = run(model.base, ids, out)
    assert not close(run_with_prefix(model, ids, out), plain)
    hidden = {}
    for site, layers in model.layers().items():
        for module, layer in zip(attention_sites(model.base)[site], layers, strict=True):
            hidden[module] = attention.Prefix(*layer, torch.zeros(1, 3, dtype=torch.bool))
    assert len(hidden) == sum(len(layers) for layers in model.layers().values())
    with attention.prefix_attention(hidden):
        assert close(run(model.base, ids, out), plain)


def run_with_prefix(model, *batch):
    with attend_to(model.base, model.layers()):
        return run(model.base, *batch)


@torch.no_grad()
def test_a_padded_row_equals_the_row_alone(name):
    model = make(name)
    batch = batch_for(model)
    together = model(batch["input_ids"], batch["attention_mask"], batch["decoder_input_ids"])
    for row, (source, target) in enumerate(SIZES):
        one = batch["input_ids"][row : row + 1, :source], batch["attention_mask"][row : row + 1, :source]
        assert close(together[row, :target], model(*one, batch["decoder_input_ids"][row : row + 1, :target])[0])


@pytest.mark.parametrize("tuned", [False, True])
def test_the_loss_is_that_of_the_model_s_own_logits(name, tuned, monkeypatch):
    """Through whatever the model does to them; with a prefix, and in a model that is tuned itself, without dropout."""
    monkeypatch.setattr("prefixlib.compute.head.CHUNK", 3)
    model = PrefixLM(random_model(name)) if tuned else make(name)
    batch = batch_for(model)
    labels, real = batch["labels"], batch["decoder_input_ids"].ne(model.base.config.pad_token_id)
    real[:, 0] = True
    with attend_to(model.base, model.layers()):
        logits = model.base(
            **{key: batch[key] for key in ("input_ids", "attention_mask", "decoder_input_ids")},
            decoder_attention_mask=real, use_cache=False,
        ).logits  # fmt: skip
    padding = model.base.config.pad_token_id
    expected = nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=padding, reduction="sum"
    )
    found, count = model.loss(**batch)
    assert count == labels.ne(padding).sum()
    assert close(found, expected)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for one, other in zip(
        *(torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (found, expected)), strict=True
    ):
        assert (one is None) == (other is None)
        assert one is None or (one - other).abs().max() <= 1e-4 * max(1.0, other.abs().max())
    assert model.head.plain == (name not in OWN_HEAD)


def test_checkpointing_changes_neither_loss_nor_gradient(name):
    results = []
    for checkpointed in (False, True):
        model = make(name)
        if checkpointed:
            attention.enable_checkpointing(model.base)
        loss, _ = model.train().loss(**batch_for(model))
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.prefix.parameters()))])
    for kept, recomputed in zip(*results, strict=True):
        assert (kept - recomputed).abs().max() <= 1e-4 * max(1.0, kept.abs().max())


class WithoutCache:
    """The reference: every source and output is read anew at each step."""

    def __init__(self, lm, sources):
        self.lm, self.sources, self.texts = lm, sources, start_tokens(lm.base, len(sources))

    def prefill(self):
        pairs = zip(self.sources, self.texts, strict=True)
        batches = [(torch.tensor([source]), torch.ones(1, len(source)), torch.tensor([text])) for source, text in pairs]
        return torch.stack([self.lm(*batch)[0, -1] for batch in batches])

    def advance(self, rows, chosen):
        self.sources = [self.sources[row] for row in rows.tolist()]
        self.texts = [[*self.texts[row], token] for row, token in zip(rows.tolist(), chosen.tolist(), strict=True)]
        return self.prefill()


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["beam", "nucleus"])
def test_every_source_can_have_its_own_prefix(name, strategy):
    """Of other lengths, and one without the encoder's part: each source's outputs are those that it has alone."""
    base = make(name).base
    rule = DecodingRule(2, max_new_tokens=6, num_beams=3, banned_token_ids=(base.config.pad_token_id,), min_length=3)
    kinds = ({"preseqlen": 2}, {"preseqlen": 6}, {"preseqlen": 4, "use_encoder_prefix": False})
    prefixes = []
    for number, settings in enumerate(kinds):
        torch.manual_seed(10 + number)
        config = PrefixConfig.for_model(base.config, **{**SETTINGS, "init_shallow": True, **settings})
        prefixes.append(PrefixTuning(config).eval()(1))
    sources = [tokens(1, size, size)[0].tolist() for size in (7, 4, 9)]
    how = {"count": 2, "strategy": strategy, "progress": False}
    mixed = decode(base, sources, rule, past=lambda rows: side_by_side([prefixes[n] for n in rows]), **how)
    for n, source in enumerate(sources):
        (alone,) = decode(base, [source], rule, prefix=prefixes[n], seed=42 + 2 * n, **how)
        assert [h.tokens for h in mixed[n]] == [h.tokens for h in alone]
        assert close(torch.tensor([h.score for h in mixed[n]]), torch.tensor([h.score for h in alone]))
    other = decode(base, sources, rule, prefix=prefixes[0], **how)
    assert [[h.tokens for h in one] for one in other] != [[h.tokens for h in one] for one in mixed]


@torch.no_grad()
def test_beams_equal_those_of_a_model_without_a_cache(name):
    model = make(name)
    padding = model.base.config.pad_token_id
    rule = DecodingRule(eos_token_id=2, max_new_tokens=6, num_beams=3, banned_token_ids=(padding,), min_length=3)
    sources = [tokens(1, size, size)[0].tolist() for size in (7, 4, 9)]
    expected = beam_search(WithoutCache(model, sources), start_tokens(model.base, 3), rule)
    found = decode(model.base, sources, rule, prefix=model.layers(), count=3, batch_size=3, progress=False)
    assert [[h.tokens for h in one] for one in found] == [[h.tokens for h in one] for one in expected]
    scores = torch.tensor([[h.score for h in one] for one in expected])
    assert close(torch.tensor([[h.score for h in one] for one in found]), scores)
    single = [
        decode(model.base, [source], rule, prefix=model.layers(), count=3, progress=False)[0] for source in sources
    ]
    assert [[h.tokens for h in one] for one in found] == [[h.tokens for h in one] for one in single]
    steps = make_steps(model.base, *pad_sources(model.base, sources), Past(model.layers()))
    assert isinstance(steps, CopyingSteps if name in COPYING else Seq2SeqSteps)
    assert shares_rows(model.base) == (name not in COPYING)


@pytest.mark.parametrize("kind", ["T5", "T5Gemma", "M2M100"])
def test_a_run_is_resumed_decoded_and_loaded(kind, tmp_path, monkeypatch):
    """Resumed equals unbroken; what the command line decodes, with beams, is what the loaded model generates."""
    folder, data = make_bart(tmp_path / "base"), make_summaries(tmp_path / "data")
    special = {"vocab_size": 260, "pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0, "decoder_start_token_id": 2}
    config = FAMILIES[kind]()
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        part.update(special)
    config.dropout_rate = 0.1  # the run goes without
    transformers.AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)

    def train(output, **more):
        finetune.main(training_flags(folder, data, output, save_steps=1, epoch=1, **more))
        return load_file(output / "prefix_model.safetensors")

    whole, finished = train(tmp_path / "whole"), Checkpoints.on_train_batch_end
    with monkeypatch.context() as patch:

        def die(self, trainer, *arguments):
            finished(self, trainer, *arguments)
            if trainer.global_step == 3:
                raise KeyboardInterrupt

        patch.setattr(Checkpoints, "on_train_batch_end", die)
        with pytest.raises(BaseException):  # noqa: B017, PT011  # Lightning ends the process
            train(tmp_path / "killed")
    again = train(tmp_path / "killed", resume="yes")
    assert all(torch.equal(tensor, again[key]) for key, tensor in whole.items())
    where = {"do_train": "no", "prefix_model_path": tmp_path / "whole", "eval_batch_size": 2}
    finetune.main(training_flags(folder, data, tmp_path / "out", **where, preseqlen=None, mid_dim=None))
    written = (tmp_path / "out" / "test_beam_1.0").read_text().split("\n")[:-1]
    sources = (data / "test.source").read_text().splitlines()
    model = load(tmp_path / "whole")
    assert model.generate(sources, num_beams=2, max_new_tokens=11, min_length=2) == written
    assert len(written) == 5
    export.main([str(tmp_path / "whole"), "--to", "kv", "--output_dir", str(tmp_path / "kv")])
    arrays = load_file(tmp_path / "kv" / "keys_values.safetensors")
    for site, layers in (("encoder.self", model.lm.layers()["encoder"]), ("decoder.cross", model.lm.layers()["cross"])):
        for n, (keys, values) in enumerate(layers):
            assert torch.equal(arrays[f"{site}.layer_{n}.key"], keys[0])
            assert torch.equal(arrays[f"{site}.layer_{n}.value"], values[0])
    assert "```" not in (tmp_path / "kv" / "README.md").read_text()  # the example for BART would not do


@pytest.mark.parametrize("kind", ["M2M100", "Marian"])
def test_sentencepiece_tokenizers(kind, tmp_path):
    """Special tokens of training and decoding agree: a language's in front of source and target (M2M100), or none."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder, data = tmp_path / "base", make_summaries(tmp_path / "data")
    folder.mkdir()
    (tmp_path / "corpus.txt").write_text((data / "train.source").read_text() * 9)
    pieces = {"input": tmp_path / "corpus.txt", "vocab_size": 40, "model_type": "unigram", "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(model_prefix=str(tmp_path / "spm"), minloglevel=2, **pieces)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    words = [model.id_to_piece(n) for n in range(model.get_piece_size())]
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", *(word for word in words if word not in ("<s>", "</s>", "<unk>"))]
    (tmp_path / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(vocabulary)}))
    spm, vocab = str(tmp_path / "spm.model"), str(tmp_path / "vocab.json")
    if kind == "M2M100":
        tokenizer = transformers.M2M100Tokenizer(vocab_file=vocab, spm_file=spm)
    else:
        tokenizer = transformers.MarianTokenizer(source_spm=spm, target_spm=spm, vocab=vocab)
    tokenizer.save_pretrained(folder)
    config = FAMILIES[kind]()
    start, more = (2, 108) if kind == "M2M100" else (1, 0)  # 100 languages, 8 unused
    config.update({"vocab_size": len(vocabulary) + more, "pad_token_id": 1, "decoder_start_token_id": start})
    transformers.AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
    finetune.main(training_flags(folder, data, tmp_path / "run", epoch=1, max_steps=2))
    trained = load(tmp_path / "run")
    batch = Collator(trained.tokenizer, 1, 2, 64, 16)([Example("the cat sat.", ("cat sat",))])
    language = [len(vocabulary) + 18] if kind == "M2M100" else []  # English is the 19th of its languages
    for key, text in (("input_ids", "the cat sat."), ("labels", "cat sat")):
        pieces = model.encode(text, out_type=str)
        assert batch[key][0].tolist() == [*language, *map(vocabulary.index, pieces), 2], key
    assert trained.encode(["the cat sat."], 64)[0] == batch["input_ids"].tolist()
    assert len(trained.generate(["the cat sat."], num_beams=2, max_new_tokens=6, min_length=2)) == 1


def test_adapters_and_top_layers_find_their_places(name):
    ids, out, model = tokens(2, 7), tokens(2, 5, 1), random_model(name)
    before = run(model, ids, out)
    adapters.insert(model, 1, 3)
    layers = len(attention_sites(model)["encoder"]) + len(attention_sites(model)["self"])
    assert sum(key.endswith("adapter_block.up.weight") for key, _ in model.named_parameters()) == layers
    trained = adapters.train_only_adapters(model)
    run(model, ids, out).sum().backward()
    assert all(p.grad.abs().sum() > 0 for key, p in model.named_parameters() if key in trained and "norm" not in key)
    assert not torch.equal(run(model, ids, out), before)
    trained = top_layers.train_top(random_model(name), 1, embeddings=False)
    assert any("EncDecAttention" in key or "cross" in key or "encoder_attn" in key for key in trained)
    assert not any("encoder." in key for key in trained)


def test_a_text_start_is_that_text_s_keys_and_values(name):
    model = make(name, init_shallow=True)
    assert start_from_text(model.prefix, Given(model.base, [40, 41, 42])) == []
    sites, text = attention_sites(model.base), torch.tensor([[40, 41, 42]])
    modules = [module for site in sites.values() for module in site]
    with torch.no_grad(), attention.record_key_values(modules) as seen:
        run(model.base, text, text)
    for site, layers in model.layers().items():
        for module, layer in zip(sites[site], layers, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(layer, seen[module], strict=True))


@pytest.mark.parametrize("kind", REFUSED)
def test_models_with_an_attention_of_their_own_are_refused(kind):
    base = transformers.AutoModelForSeq2SeqLM.from_config(transformers.AutoConfig.for_model(kind, **REFUSED[kind]))
    with pytest.raises(UserError, match=f"a {kind} model is not supported: it has an attention of its own$"):
        PrefixLM(base, None)


def test_a_layer_whose_attention_sees_no_prefix_is_refused():
    class Identity(nn.Module):
        def forward(self, hidden_states, **_):
            return hidden_states, None

    base = random_model("Bart")
    base.model.encoder.layers[1].self_attn = Identity()
    with pytest.raises(UserError, match="a bart model is not supported: it has an attention of its own"):
        PrefixLM(base)


def test_a_first_token_cannot_be_forced_where_there_is_none():
    with pytest.raises(UserError, match="--force_bos yes: a t5 model has no token that begins a text"):
        decoding_rule(Search(force_bos=True), None, FAMILIES["T5"](), find_task("xsum"))
