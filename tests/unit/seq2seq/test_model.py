"""The model object of an encoder-decoder: loaded from every kind of checkpoint, it gives the command line's texts."""

import inspect
import json

import pytest
import torch
from safetensors.torch import load_file

import seq2seq
from prefixlib.methods.table import METHODS
from prefixlib.settings.search import Search
from prefixlib.system.errors import UserError
from seq2seq import decoding, finetune
from seq2seq.model import Model
from seq2seq.prefix_lm import PrefixLM
from tests.conftest import GOLDEN
from tests.export_golden import make_golden_base, write_original
from tests.seq2seq_tiny import make_bart, make_summaries

TRIPLES = [[("A", "is", "B")], [("Abc", "of", "D"), ("E", "on", "F")], [("G", "at", "H")]]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    make_bart(root / "bart", max_position_embeddings=160)
    make_summaries(root / "data" / "xsum", train=12)
    write_webnlg(root / "data" / "webnlg_challenge_2017")
    return root


def write_webnlg(folder):
    folder.mkdir(parents=True)
    for split in ("train", "dev", "test"):
        entries = []
        for number, triples in enumerate(TRIPLES, start=1):
            named = [dict(zip(("subject", "property", "object"), triple, strict=True)) for triple in triples]
            texts = [{"lex": f"{triples[0][0]} is here.", "comment": "good"}]
            entries.append({str(number): {"category": "X", "modifiedtripleset": named, "lexicalisations": texts}})
        (folder / f"{split}.json").write_text(json.dumps({"entries": entries}))


def settings_of(place, output, **changes):
    values = {"mode": "xsum", "model_name_or_path": str(place / "bart"), "data_dir": str(place / "data")}
    values |= {"preseqlen": 3, "bsz": 4, "epoch": 1, "learning_rate": 0.01, "num_workers": 0, "n_val": 2}
    values |= {"num_beams": 1, "max_length": 6, "min_length": 0, "disable_tqdm": True, "output_dir": str(output)}
    return seq2seq.Settings(**{**values, **changes})


@pytest.fixture(scope="module", params=METHODS)
def trained(request, place):
    """The result of seq2seq.train in each tuning mode."""
    return request.param, seq2seq.train(settings_of(place, place / request.param, tuning_mode=request.param))


def command_line(place, mode, tuning_mode, checkpoint, output):
    which = "prefix_model_path" if tuning_mode in ("prefixtune", "bothtune") else "finetune_model_path"
    words = [f"--mode={mode}", "--do_train=no", f"--{which}={checkpoint}", f"--data_dir={place / 'data'}"]
    finetune.main([*words, f"--output_dir={output}", "--disable_tqdm=yes"])
    (found,) = output.glob("test_beam_*")
    return found.read_bytes().decode().split("\n")[:-1]  # an untrained model writes every kind of line end


def test_generate_gives_the_texts_of_the_command_line(place, trained, tmp_path):
    """Defaults are the task's: six beams, an n-gram rule, 11 to 62 tokens."""
    tuning_mode, result = trained
    sources = (place / "data" / "xsum" / "test.source").read_text().splitlines()
    expected = command_line(place, "xsum", tuning_mode, place / tuning_mode, tmp_path)
    assert len(expected) == 5
    assert any(len(text) > 20 for text in expected)
    model = seq2seq.load(place / tuning_mode)
    assert model.generate(sources) == expected
    assert model.generate(sources, batch_size=2) == expected
    assert result.model.generate(sources) == expected
    assert (model.task["mode"], model.task["tuning_mode"]) == ("xsum", tuning_mode)
    assert model.base_record["name"] == str(place / "bart")  # also of a model that was tuned together with its prefix


def test_a_loaded_model_is_saved_and_says_the_same(trained, place, tmp_path):
    tuning_mode, _ = trained
    model, sources = seq2seq.load(place / tuning_mode), ["the cat sat.", "the owl ran and so on."]
    model.save(tmp_path / "copy")
    again = seq2seq.load(tmp_path / "copy")
    assert again.generate(sources) == model.generate(sources)
    assert {**again.task, "tuned_from": None} == {**model.task, "tuned_from": None}


def test_the_results_of_a_training(trained, place):
    tuning_mode, result = trained
    training = json.loads((place / tuning_mode / "results.json").read_text())["training"]
    assert result.output_dir == place / tuning_mode
    assert result.scores == training["last"]
    assert [list(point) for point in result.history["dev"]] == training["curves"]["dev"]
    assert training["dev_loss"] == result.scores["loss"]
    assert training["examples"] == 12
    assert (training["base_parameters"] is None) == (tuning_mode not in ("prefixtune", "bothtune"))
    run = json.loads((place / tuning_mode / "results.json").read_text())["run"]
    assert (run["tuning_mode"], run["bsz"], run["base_model"]) == (tuning_mode, 4, str(place / "bart"))


def test_data_are_linearised_as_in_the_files(place, tmp_path):
    seq2seq.train(settings_of(place, tmp_path / "run", mode="webnlg"))
    expected = command_line(place, "webnlg", "prefixtune", tmp_path / "run", tmp_path / "out")
    model = seq2seq.load(tmp_path / "run")
    assert model.generate(TRIPLES) == expected
    assert model.generate(["| A : is : B", " | Abc : of : D | E : on : F", "| G : at : H"]) == expected
    with pytest.raises(UserError, match="an input of mode webnlg cannot be made from 3"):
        model.generate([3])


@pytest.fixture(scope="module")
def model(place) -> Model:
    output = place / "a prefix"
    seq2seq.train(settings_of(place, output))
    return seq2seq.load(output)


SOURCES = ["the cat sat.", "the owl ran and so on and so on.", "the bee hid and so on."]
SHORT = {"max_new_tokens": 9}


def test_several_texts_and_their_scores(model):
    best = model.generate(SOURCES, num_beams=4, **SHORT)
    several = model.generate(SOURCES, num_beams=4, num_return_sequences=3, return_scores=True, **SHORT)
    assert [pairs[0][0] for pairs in several] == best
    for pairs in several:
        assert len(pairs) == 3
        assert [score for _, score in pairs] == sorted((score for _, score in pairs), reverse=True)
    assert model.generate(SOURCES, num_beams=4, return_scores=True, **SHORT) == [pairs[0] for pairs in several]


def test_samples_depend_on_their_seed_alone(model):
    several = model.generate(SOURCES, strategy="nucleus", num_return_sequences=2, seed=7, **SHORT)
    assert several == model.generate(SOURCES, strategy="nucleus", num_return_sequences=2, seed=7, batch_size=1, **SHORT)
    assert len({text for texts in several for text in texts}) > 3
    alone = model.generate([SOURCES[1]], strategy="nucleus", seed=9, **SHORT)
    assert alone == [several[1][0]]  # two samples a source: the third in all


@torch.no_grad()
def test_scores_are_those_of_teacher_forcing_behind_the_prefix(model):
    """The sum of the tokens' log-probabilities; the end is free of charge where the limit forces it."""
    search = Search(strategy="greedy", max_new_tokens=9, min_length=0)
    inputs, rule = model.encode(SOURCES, search), model.rule(search)
    bare = PrefixLM(model.base)
    for source, (best,) in zip(inputs, model.decode(inputs, search), strict=True):
        ids, start = torch.tensor([source]), model.base.config.decoder_start_token_id
        expected = best.tokens + [rule.eos_token_id] * (len(best.tokens) < 8)
        scores = []
        for lm in (model.lm, bare):
            logits = lm(ids, torch.ones_like(ids), torch.tensor([[start, *expected[:-1]]]))
            scores.append(logits.log_softmax(dim=-1)[0, range(len(expected)), expected].sum().item())
        assert best.score == pytest.approx(scores[0], abs=1e-4)
        assert abs(best.score - scores[1]) > 0.01


def test_a_greedy_text_is_that_of_one_beam(model):
    """The stopping rule aside, which no beam of width one needs."""
    greedy = model.generate(SOURCES, strategy="greedy", **SHORT)
    assert greedy == model.generate(SOURCES, num_beams=1, **SHORT)


@pytest.mark.parametrize("how", [{"strategy": "greedy"}, {"strategy": "nucleus", "seed": 5}])
def test_the_pieces_of_a_stream_are_the_whole_text(model, how):
    for source in SOURCES:
        pieces = list(model.stream(source, **how))
        assert ["".join(pieces)] == model.generate([source], **how)
    assert sum(map(len, pieces)) > 5


def test_min_length_gives_way_to_a_short_limit_that_was_asked_for(model, place):
    task = dict(model.task, mode="cnn_dm")  # at least 56 tokens
    other = Model(model.lm, model.tokenizer, task, model.base_record)
    assert all(len(text) <= 9 for text in other.generate(SOURCES, max_new_tokens=9))
    with pytest.raises(UserError, match="--max_length 10: at least --min_length 20"):
        other.generate(SOURCES, max_new_tokens=9, min_length=20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "beams"}, "--strategy beams: one of beam, greedy, nucleus"),
        (
            {"strategy": "greedy", "num_beams": 3},
            "--strategy greedy and --num_beams do not go together: it belongs to --strategy beam",
        ),
        ({"top_p": 0.5}, "--strategy beam and --top_p do not go together: it belongs to --strategy nucleus"),
        ({"strategy": "nucleus", "top_p": 1.5}, "top_p 1.5"),
        ({"num_beams": 0}, "--num_beams 0: must be above 0"),
        ({"num_beams": 2, "num_return_sequences": 3}, r"num_return_sequences 3: must be 1 to 2 \(beam\)"),
        ({"strategy": "greedy", "num_return_sequences": 2}, r"must be 1 to 1 \(greedy\)"),
        ({"max_new_tokens": 500}, "--max_length 501: .* at most the model's 160 positions"),
        ({"batch_size": 0}, "batch_size 0: must be above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(model, changes, message):
    with pytest.raises(UserError, match=message):
        model.generate(SOURCES, **changes)


def test_sources_must_be_a_list_of_texts(model):
    with pytest.raises(UserError, match="takes a list of sources"):
        model.generate("the cat sat.")
    with pytest.raises(UserError, match="an input of mode xsum is a text, not 3"):
        model.generate([3])
    with pytest.raises(UserError, match="beams are certain only at their end"):
        model.stream("the cat sat.", strategy="beam")
    assert model.generate([]) == []


def test_long_sources_are_cut_as_in_training(model, caplog):
    cut = Model(model.lm, model.tokenizer, {**model.task, "max_source_length": 8}, model.base_record)
    assert cut.source_limit == 8
    assert cut.generate(["the cat sat.", "the cat ran."], **SHORT)[0] == cut.generate(["the cat hid."], **SHORT)[0]
    assert "1 of 1 sources cut to 8 tokens" in caplog.messages


def test_a_plain_model_needs_a_task(place):
    plain = seq2seq.load(place / "bart", mode="xsum")
    assert plain.prefix is None
    assert len(plain.generate(SOURCES)) == 3
    with pytest.raises(UserError, match=r"does not say its task: load\(..., mode=...\)"):
        seq2seq.load(place / "bart").generate(SOURCES)
    with pytest.raises(UserError, match="not a task of seq2seq/"):
        seq2seq.load(place / "bart", mode="sentiment")


def test_a_prefix_of_the_original(tmp_path):
    """Its golden arrays, on the golden base model: the keys and values of every site, and texts."""
    base = make_golden_base(tmp_path / "base", "bart")
    write_original(tmp_path / "original", "bart")
    model = seq2seq.load(tmp_path / "original", mode="xsum", model_name_or_path=str(base))
    golden = load_file(GOLDEN / "bart_prefix.safetensors")
    for site, name in (("self", "self"), ("cross", "encoder_decoder"), ("encoder", "encoder")):
        found = torch.stack([torch.stack(pair) for pair in model.lm.layers()[site]])
        assert torch.allclose(found.expand(-1, -1, 3, -1, -1, -1), golden[f"past.{name}"], atol=1e-5)
    assert len(model.generate(["w10 w11 w12"], num_beams=2, max_new_tokens=5)) == 1
    with pytest.raises(UserError, match=r"the base model of .*, unnamed, is not here: pass --model_name_or_path"):
        seq2seq.load(tmp_path / "original", mode="xsum")


def test_wrong_bases_and_folders_are_refused(model, place, tmp_path):
    wide = make_bart(tmp_path / "wide", d_model=32)
    with pytest.raises(UserError, match="was trained for a model of another shape than"):
        seq2seq.load(place / "a prefix", model_name_or_path=str(wide))
    with pytest.raises(UserError, match="--mode cnn_dm contradicts .*, which was trained with mode xsum"):
        seq2seq.load(place / "a prefix", mode="cnn_dm")
    with pytest.raises(UserError, match="no such folder"):
        seq2seq.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a prefix checkpoint"):
        seq2seq.load(place / "data")


def test_settings_are_checked_by_train_too(place, tmp_path):
    for changes, message in (
        ({"preseqlen": "3"}, "--preseqlen 3: must be a number"),
        ({"mode": "sentiment"}, "--mode sentiment: one of e2e"),
        ({"tuning_mode": "finetune", "mid_dim": 16}, "--tuning_mode finetune and --mid_dim do not go together"),
        ({"do_train": False}, "do_train"),
        ({"output_dir": None}, "--output_dir"),
    ):
        with pytest.raises(UserError, match=message):
            seq2seq.train(settings_of(place, tmp_path, **({"output_dir": str(tmp_path)} | changes)))
    assert not list(tmp_path.iterdir())


def test_the_public_names_are_documented_and_typed():
    assert set(seq2seq.__all__) <= set(dir(seq2seq))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = seq2seq.nothing
    public = [getattr(seq2seq, name) for name in seq2seq.__all__]
    public += [Model.generate, Model.stream, Model.save, decoding.decode]
    assert len(public) == 11
    for thing in public:
        assert len(inspect.getdoc(thing)) > 40, thing
        if inspect.isfunction(thing):
            hints = inspect.signature(thing)
            assert hints.return_annotation is not inspect.Signature.empty
            untyped = [p.name for p in hints.parameters.values() if p.annotation is p.empty and p.name != "self"]
            assert not untyped, (thing, untyped)
