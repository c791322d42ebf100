"""Every kind of prefix: what moves, what it equals, what a batch and a checkpoint must not change."""

import copy
import json

import pytest
import torch

from gpt2 import building
from gpt2.building import Given
from gpt2.dataset import Encoded, Format, TableToTextDataset, collate, encode_inputs, pad_sources, truncate
from gpt2.decoding import decode
from gpt2.model import Model, load_prefix, save_prefix
from gpt2.prefix_lm import PrefixLM
from gpt2.train_control import PrefixConfig, make_prefix
from prefixlib.base_model.load import load_tokenizer
from prefixlib.checkpoints import checkpoint
from prefixlib.data.readers import Record
from prefixlib.decoding.search import DecodingRule
from prefixlib.system.errors import UserError
from tests.conftest import ROOT, SETTINGS, close, gpt2_settings

KINDS = {  # settings -> the parameters there must be
    "cat": ({}, 5),
    "deep": ({"use_deep": True}, 7),
    "shallow": ({"init_shallow": True}, 1),
    "embedding": ({"prefix_mode": "embedding"}, 5),
    "embedding Emb": ({"prefix_mode": "embedding", "parametrize_emb": "Emb"}, 1),
    "infix": ({"format_mode": "infix"}, 6),
    "infix shallow": ({"format_mode": "infix", "init_shallow": True}, 2),
    "infix deep": ({"format_mode": "infix", "use_deep": True}, 8),
    "words": ({"optim_prefix": False, "preseqlen": 0}, 4),
    "words deep": ({"optim_prefix": False, "preseqlen": 0, "use_deep": True}, 6),
}
EXAMPLES = [
    Encoded([5, 6, 7, 49], [8, 9, 49], [5, 6, 7]),
    Encoded([10, 49], [11, 49], [10]),
    Encoded([3, 49], [12, 13, 14, 15, 49], [3, 1, 4, 1, 5]),
]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def make(tiny_lm, kind, **more) -> PrefixLM:
    settings = {"preseqlen": 3, "mid_dim": 8, **SETTINGS, **KINDS[kind][0], **more}
    return PrefixLM(tiny_lm.base, make_prefix(PrefixConfig.for_model(tiny_lm.base, **settings))).eval()


def batch_for(model, examples):
    batch = collate(examples, pad_token_id=49)
    del batch["attention_mask"]
    if not model.prefix.config.needs_source:
        del batch["source"], batch["source_mask"]
    return batch


def test_only_the_prefix_moves_and_all_of_it_does(tiny_lm, kind):
    model = make(tiny_lm, kind)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        model.train()
        nll, _ = model(**batch_for(model, EXAMPLES))
        nll.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            model(**batch_for(model, EXAMPLES))
            model.prefix.stored(model.base)
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("prefix.")}
    assert len(moved) == KINDS[kind][1]
    for name in ("prefix.wte.weight", "prefix.wte2.weight"):
        assert name not in before or (before[name] != after[name]).any(dim=1).all()


def test_a_padded_row_equals_the_row_alone(tiny_lm, kind):
    model = make(tiny_lm, kind)
    together, rows = model(**batch_for(model, EXAMPLES))
    for row, example in enumerate(EXAMPLES):
        alone, _ = model(**batch_for(model, [example]))
        assert close(together[rows == row], alone)


def test_checkpointing_changes_neither_loss_nor_gradient(tiny_lm, kind):
    for module in tiny_lm.base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain = make(tiny_lm, kind)
    recomputing = PrefixLM(copy.deepcopy(plain.base), plain.prefix, train_base=True, checkpointing=True)
    results = []
    for model in (plain, recomputing):
        model.train()
        plain.prefix.zero_grad()
        nll, _ = model(**batch_for(model, EXAMPLES))
        nll.sum().backward()
        results.append([nll.detach(), *(p.grad.clone() for p in plain.prefix.parameters())])
    assert all(close(recomputed, kept) for kept, recomputed in zip(*results, strict=True))


def test_the_network_runs_once_whatever_the_batch(tiny_lm, kind):
    model = make(tiny_lm, kind)
    if not isinstance(getattr(model.prefix, "control_trans", None), torch.nn.Module):
        return
    seen = []
    model.prefix.control_trans.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    model.train()(**batch_for(model, EXAMPLES * 4))
    assert seen == ([(12, 5, 16)] if kind.startswith("words") else [(3, 16)])


def test_dropout_is_drawn_for_every_row(tiny_lm, kind):
    model = make(tiny_lm, kind, prefix_dropout=0.5)
    source = pad_sources(EXAMPLES[:1] * 2) if model.prefix.config.needs_source else {}
    keys = model.train().prefix.past(model.base, 2, **source).layers[1][0]
    assert not torch.equal(keys[0], keys[1])
    keys = model.eval().prefix.past(model.base, 2, **source).layers[1][0]
    assert close(keys[0], keys[1])


def test_trained_as_decoded_from_its_checkpoint(tiny_lm, kind, tmp_path):
    """Stored, loaded, and decoded in a batch, one by one, and step by step with the training forward: all the same."""
    model = make(tiny_lm, kind)
    save_prefix(tmp_path / "run", model.prefix, {"name": "x"}, {}, base=model.base)
    loaded = load_prefix(tmp_path / "run")
    assert loaded.config == model.prefix.config
    again = make_prefix(loaded.config)
    again.load_state_dict(loaded.network)
    decoding = loaded.for_decoding()
    assert kind.startswith("words") or not list(decoding.named_modules())[1:][0][0].startswith("control_trans")
    trained = Model(PrefixLM(model.base, decoding), None)
    own = decoding.config.needs_source
    rule = DecodingRule(eos_token_id=49, max_new_tokens=6, num_beams=1)
    prompts = [example.prompt for example in EXAMPLES]

    def run(members, batch_size, strategy="greedy", rule=rule):
        past = (lambda rows: trained.past([EXAMPLES[members[n]] for n in rows])) if own else None
        layers = None if own else trained.past([]).layers
        texts = [prompts[n] for n in members]
        found = decode(
            model.base, texts, rule, layers=layers, past=past, strategy=strategy, batch_size=batch_size,
            progress=False,
        )  # fmt: skip
        return [hypothesis.tokens for hypothesis in found]

    whole = run([0, 1, 2], 3)
    assert whole == [run([n], 1)[0] for n in range(3)] == run([0, 1, 2], 2)
    beam = DecodingRule(eos_token_id=49, max_new_tokens=6, num_beams=3)
    assert run([0, 1, 2], 3, "beam", beam) == [run([n], 1, "beam", beam)[0] for n in range(3)]
    for example, tokens in zip(EXAMPLES, whole, strict=True):
        ids = list(example.prompt)
        source = pad_sources([example]) if own else {}
        for _ in range(6):
            best = model(torch.tensor([ids]), **source)[0, -1].argmax().item()
            if best == 49:
                break
            ids.append(best)
        assert tokens == ids[len(example.prompt) :]


def test_embeddings_equal_soft_prompts_prepended(tiny_lm):
    for kind in ("embedding", "embedding Emb"):
        model = make(tiny_lm, kind)
        text = torch.tensor([[5, 6, 49, 8], [10, 49, 11, 49]])
        soft = torch.cat([model.prefix.embeddings().expand(2, -1, -1), model.base.get_input_embeddings()(text)], dim=1)
        assert close(model(text), model.base(inputs_embeds=soft).logits[:, 3:])


def test_an_infix_without_additions_equals_its_embeddings_between_source_and_target(tiny_lm):
    model = make(tiny_lm, "infix shallow")
    model.prefix.control_trans.data.zero_()
    words = model.base.get_input_embeddings()
    source, text = torch.tensor([[5, 6, 7]]), torch.tensor([[49, 8, 9]])
    whole = torch.cat([words(source), model.prefix.wte2.weight.unsqueeze(0), words(text)], dim=1)
    behind = model(text, source=source, source_mask=torch.ones_like(source))
    assert close(behind, model.base(inputs_embeds=whole).logits[:, 6:])


@pytest.mark.parametrize("kind", ["shallow", "embedding Emb", "infix", "infix shallow", "infix deep"])
def test_a_text_start_equals_the_text_itself(tiny_lm, kind):
    model = make(tiny_lm, kind)
    assert building.start_from_text(model.prefix, Given(model.base, [3, 1, 4])) == []
    example = EXAMPLES[0]
    infix = kind.startswith("infix")
    prompt = [49] if infix else example.prompt
    before = [*example.source, 3, 1, 4] if infix else [3, 1, 4]
    source = pad_sources([example]) if infix else {}
    whole = model.base(torch.tensor([[*before, *prompt, 8, 9]])).logits[:, len(before) :]
    assert close(model(torch.tensor([[*prompt, 8, 9]]), **source), whole)


def test_a_text_start_through_an_mlp_comes_near_and_leaves_no_gradient(tiny_lm):
    for kind in ("cat", "deep", "embedding"):
        model = make(tiny_lm, kind)
        before = copy.deepcopy(model.prefix.state_dict())
        losses = building.start_from_text(model.prefix, Given(model.base, [3, 1, 4]))
        assert len(losses) == 500
        assert losses[-1] < losses[0]
        assert torch.equal(before["wte.weight"], model.prefix.wte.weight)
        assert all(p.grad is None or not p.grad.any() for p in model.prefix.parameters())


# ---- formats ---------------------------------------------------------------------------------------------------------

ROWS = [
    Record("name : A | food : B", "It is A .", True, ("name", "food"), ""),
    Record("x : C", "C .", True, ("x",), ""),
]
FORMS = {  # what the text shows of the first row, and what its prefix is made of
    Format("cat"): (" name : A | food : B <|endoftext|>", None),
    Format("peek"): (" name : A | food : B <|endoftext|>", None),
    Format("nopeek"): ("<|endoftext|>", None),
    Format("infix"): ("<|endoftext|>", " name : A | food : B "),
    Format("cat", optim_prefix=False): (" name : A | food : B <|endoftext|>", " name food"),
    Format("peek", optim_prefix=False): (" name : A | food : B <|endoftext|>", " name : A | food : B "),
    Format("nopeek", optim_prefix=False): ("<|endoftext|>", " name : A | food : B "),
    Format(word="sum up"): (" sum up name : A | food : B <|endoftext|>", None),
}


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_formats_are_the_same_in_training_and_decoding(form):
    tokenizer = load_tokenizer(str(ROOT / "data" / "demo" / "gpt2"))
    inputs = encode_inputs("data2text", ROWS, tokenizer, form)
    text, source = FORMS[form]
    assert tokenizer.decode(inputs[0].prompt) == text
    assert (inputs[0].source is None) == (source is None)
    assert source is None or tokenizer.decode(inputs[0].source) == source
    trained = TableToTextDataset("data2text", ROWS, tokenizer, 60, form).examples
    assert [(e.prompt, e.source) for e in trained] == [(e.prompt, e.source) for e in inputs]
    assert tokenizer.decode(trained[0].continuation) == " It is A . <|endoftext|>"
    assert ("source" in collate(trained, 0)) == (source is not None)


def test_a_source_without_words_for_its_prefix_is_refused():
    tokenizer = load_tokenizer(str(ROOT / "data" / "demo" / "gpt2"))
    rows = [Record("a story", "It was .", True, (), "")]
    with pytest.raises(UserError, match="--optim_prefix no with --format_mode cat: there are no words"):
        encode_inputs("writingPrompts", rows, tokenizer, Format("cat", optim_prefix=False))


@pytest.mark.parametrize(
    ("example", "cut"),
    [
        (Encoded([9], [1] * 8, [2] * 20), Encoded([9], [1] * 4, [2] * 11)),  # the target keeps a quarter of the room
        (Encoded([9], [1] * 20, [2] * 3), Encoded([9], [1] * 12, [2] * 3)),  # the target gives way first
        (Encoded([9], [1] * 3, [2] * 3), Encoded([9], [1] * 3, [2] * 3)),
        (Encoded([3, 3, 9], [1] * 3, [2] * 30), Encoded([3, 3, 9], [1] * 3, [2] * 10)),  # the prefix's words first
        (Encoded([3] * 9 + [9], [1] * 3, [2] * 9), Encoded([3] * 8 + [9], [1] * 3, [2] * 4)),  # but a quarter stays
    ],
)
def test_what_does_not_fit_is_cut_in_source_and_text(example, cut):
    assert truncate(example, 16) == cut


# ---- flags to module -------------------------------------------------------------------------------------------------


@pytest.fixture
def demo():
    from gpt2.train_control import FAMILY
    from prefixlib.base_model.load import load_model

    folder = str(ROOT / "data" / "demo" / "gpt2")
    return load_model(folder, FAMILY), load_tokenizer(folder)


def make_start(argv, base, tokenizer, resuming=False):
    """The prefix that a command line starts."""
    settings = gpt2_settings(*argv)
    chosen, path = settings.prefix_settings(), settings.start_path
    return building.make_start(base, tokenizer, settings.start, chosen, path, resuming=resuming)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--init_text", "the name of it"], "the name of it"),
        (["--init_text", "the name of it", "--init_shallow", "yes"], "the name of it"),
        (["--init_shallow", "yes"], "summarize"),
        (["--init_shallow", "yes", "--init_shallow_word", "no"], None),
        (["--use_lowdata_token", "yes", "--lowdata_token", "table-to-text:"], "table-to-text:"),
        (["--init_text", "@FILE", "--prefix_mode", "embedding", "--parametrize_emb", "Emb"], "from a\nfile"),
        ([], None),
    ],
)
def test_a_start_has_the_texts_own_length_and_is_not_repeated_on_resume(demo, argv, text, tmp_path, monkeypatch):
    (tmp_path / "start.txt").write_text("from a\nfile\n")
    argv = [word.replace("FILE", str(tmp_path / "start.txt")) for word in argv]
    starts = []
    monkeypatch.setitem(building.STARTS, "text", lambda prefix, given: starts.append(given.ids))
    base, tokenizer = demo
    prefix = make_start(argv, base, tokenizer)
    assert prefix.config.init_text == text
    expected = tokenizer(f" {text}")["input_ids"] if text else None
    assert prefix.config.preseqlen == (len(expected) if text else 10)
    assert starts == ([expected] if text else [])
    make_start(argv, base, tokenizer, resuming=True)
    assert len(starts) == bool(text)


@pytest.mark.parametrize(
    ("argv", "drawn"),
    [
        ([], {"wte.weight"}),
        (["--init_shallow", "yes", "--init_shallow_word", "no"], {"control_trans"}),
        (["--prefix_mode", "embedding"], {"wte.weight"}),
        (["--format_mode", "infix"], {"wte.weight", "wte2.weight"}),
    ],
)
def test_a_uniform_start(demo, argv, drawn):
    """What a random prefix is made of lies in [0, 1); the network and the default start are torch's."""
    base, tokenizer = demo

    def parameters(*more, resuming=False):
        torch.manual_seed(0)
        prefix = make_start([*argv, *more], base, tokenizer, resuming=resuming)
        return {name: parameter.detach() for name, parameter in prefix.named_parameters()}

    plain, uniform = parameters(), parameters("--init_random", "uniform")
    assert {name for name in plain if not torch.equal(plain[name], uniform[name])} == drawn
    for name in drawn:
        assert plain[name].min() < -1  # N(0, 1)
        assert 0 <= uniform[name].min() < 0.02
        assert 0.98 < uniform[name].max() < 1
        assert abs(uniform[name].mean() - 0.5) < 0.02
    resumed = parameters("--init_random", "uniform", resuming=True)  # its weights come from the checkpoint
    assert all(torch.equal(plain[name], resumed[name]) for name in plain)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--init_text", "a"], "--init_text and --init_random uniform do not go together"),
        (["--prefix_model_path", "x"], "--prefix_model_path and --init_random uniform do not go together"),
        (["--init_shallow", "yes"], "--init_shallow_word and --init_random uniform do not go together"),
        (["--use_lowdata_token", "yes"], "--use_lowdata_token yes and --init_random do not go together"),
        (["--optim_prefix", "no"], "--optim_prefix no and --init_random do not go together"),
        (["--tuning_mode", "finetune"], "--tuning_mode finetune and --init_random do not go together"),
    ],
)
def test_a_uniform_start_is_a_random_one(argv, message):
    with pytest.raises(UserError, match=message):
        gpt2_settings(*argv, "--init_random", "uniform")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--init_text", "  "], "the initial text '  ' has 0 tokens; it needs 1 to"),
        (["--init_text", "@/nowhere.txt"], "--init_text @/nowhere.txt: /nowhere.txt cannot be read"),
        (["--init_text", "long " * 2000], r"the initial text 'long long .* has \d{4} tokens; it needs 1 to"),
    ],
)
def test_texts_that_cannot_start_a_prefix(demo, argv, message):
    with pytest.raises(UserError, match=message):
        make_start(argv, *demo)


@pytest.mark.parametrize(
    ("saved", "given", "message"),
    [
        ([], ["--use_deep", "yes"], "--use_deep yes contradicts .* trained with use_deep no"),
        ([], ["--format_mode", "infix"], "--format_mode infix contradicts .* format_mode cat"),
        ([], ["--optim_prefix", "no"], "--preseqlen 0 contradicts"),
        ([], ["--dropout", "0.1"], "--dropout 0.1 contradicts .* dropout 0.0"),
        (["--init_text", "a b"], ["--init_text", "b a"], "started from the text 'a b': --init_text"),
        (["--init_text", "a b"], [], "started from the text 'a b'"),
        ([], ["--init_text", "a"], "did not start from a text"),
        (["--init_shallow", "yes"], ["--init_shallow", "yes"], None),
        (["--init_text", "a b"], ["--init_text", "a b"], None),
    ],
)
def test_resume_and_prefix_model_path_want_the_same_prefix(demo, saved, given, message):
    base, tokenizer = demo
    earlier = make_start(saved, base, tokenizer, resuming=True).config
    if message is None:
        building.check_same_prefix(gpt2_settings(*given).prefix_settings(), earlier, "RUN")
    else:
        with pytest.raises(UserError, match=message):
            building.check_same_prefix(gpt2_settings(*given).prefix_settings(), earlier, "RUN")


def test_settings_of_an_earlier_version_load(tiny_lm):
    saved = tiny_lm.prefix.config.as_dict()
    for name in ("optim_prefix", "parametrize_emb", "use_deep", "init_shallow", "init_text"):
        del saved[name]
    assert checkpoint.rebuild(PrefixConfig, json.loads(json.dumps(saved)), "x") == tiny_lm.prefix.config
