"""The Python API of gpt2/: every kind of checkpoint gives the text that the command line gives."""

import json
import subprocess
import sys

import pytest

import gpt2
from gpt2 import run_language_modeling
from prefixlib.data.tasks import read_groups
from prefixlib.decoding import outputs
from prefixlib.system.errors import UserError
from tests.conftest import ROOT

DEMO = ROOT / "data" / "demo"
KINDS = {
    "plain": {"preseqlen": 4, "mid_dim": 16},
    "infix": {"format_mode": "infix", "preseqlen": 4, "mid_dim": 16},
    "made of words": {"optim_prefix": False, "mid_dim": 16},
    "embedding": {"prefix_mode": "embedding", "preseqlen": 4, "mid_dim": 16},
    "fine-tuned": {"tuning_mode": "finetune"},
    "top layers": {"tuning_mode": "finetune-top"},
    "adapters": {"tuning_mode": "adaptertune", "adapter_bottleneck": 6},
    "both": {"tuning_mode": "bothtune", "preseqlen": 4, "mid_dim": 16},
}


@pytest.fixture(scope="module", autouse=True)
def unscored():
    """Scoring is tested elsewhere; METEOR's paraphrase table alone would take most of the time here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outputs, "score", lambda *_: {"BLEU": 1.0})
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The demo's WebNLG, cut to a few entries."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "webnlg_challenge_2017").mkdir()
    for name, count in (("train", 12), ("dev", 3), ("test", 4)):
        path = DEMO / "webnlg_challenge_2017" / f"{name}.json"
        entries = json.loads(path.read_text())["entries"][:count]
        (folder / "webnlg_challenge_2017" / path.name).write_text(json.dumps({"entries": entries}))
    return folder


def settings(data, output, **more):
    brief = {"bsz": 8, "max_steps": 3, "learning_rate": 3e-3, "disable_tqdm": True}
    where = {"model_name_or_path": str(DEMO / "gpt2"), "data_dir": str(data), "output_dir": str(output)}
    return gpt2.Settings(mode="webnlg", **where, **{**brief, **more})


@pytest.fixture(scope="module", params=KINDS)
def trained(request, data, tmp_path_factory):
    """A run through the API: its result, and its checkpoint."""
    output = tmp_path_factory.mktemp("runs") / "run"
    return gpt2.train(settings(data, output, **KINDS[request.param])), output


def test_it_generates_what_the_command_line_writes(trained, data):
    result, output = trained
    groups = read_groups("webnlg", data / "webnlg_challenge_2017" / "test.json")
    written = (output / "run_test_beam").read_text().splitlines()
    model = gpt2.load(output)
    assert model.generate([group.source for group in groups]) == written
    assert result.model.generate([group.source for group in groups], batch_size=3) == written
    assert result.scores == {"valid": {"BLEU": 1.0}, "test": {"BLEU": 1.0}}
    assert [row["step"] for row in result.history if "eval_loss" in row] == [3]


def test_data_and_texts_are_the_same_source(trained, data):
    _, output = trained
    entries = json.loads((data / "webnlg_challenge_2017" / "test.json").read_text())["entries"]
    triples = [
        [(t["subject"], t["property"], t["object"]) for t in next(iter(entry.values()))["modifiedtripleset"]]
        for entry in entries
    ]
    assert gpt2.load(output).generate(triples) == (output / "run_test_beam").read_text().splitlines()


def test_a_stream_is_what_generate_gives(trained, data):
    _, output = trained
    model = gpt2.load(output)
    source = read_groups("webnlg", data / "webnlg_challenge_2017" / "test.json")[0].source
    for how in ({"strategy": "greedy"}, {"strategy": "nucleus", "seed": 7}):
        pieces = list(model.stream(source, **how, max_new_tokens=30))
        assert "".join(pieces) == model.generate([source], **how, max_new_tokens=30)[0]
        assert len(pieces) > 1


def test_several_outputs_and_their_scores(trained):
    model, sources = gpt2.load(trained[1]), [" | A : b : C", " | D : e : F"]
    short = {"max_new_tokens": 25}
    best = model.generate(sources, num_beams=3, **short)
    lists = model.generate(sources, num_beams=3, num_return_sequences=3, **short)
    assert [texts[0] for texts in lists] == best
    scored = model.generate(sources, num_beams=3, num_return_sequences=2, return_scores=True, **short)
    for pairs, texts in zip(scored, lists, strict=True):
        assert [text for text, _ in pairs] == texts[:2]
        assert pairs[0][1] >= pairs[1][1]
    drawn = {"strategy": "nucleus", "num_return_sequences": 4, "seed": 3, **short}
    samples = model.generate(sources, **drawn)
    assert samples == model.generate(sources, **drawn, batch_size=1)
    assert len({text for texts in samples for text in texts}) > 2


@pytest.mark.parametrize(
    ("sources", "how", "message"),
    [
        ("one text", {}, "takes a list of sources"),
        ([""], {}, "an input is empty"),
        (["a \ud83d"], {}, "an input holds half of a character"),
        ([[("a", "b")]], {}, "cannot be made from"),
        ([" | a : b : c"], {"num_beams": 0}, "--num_beams 0: must be above 0"),
        ([" | a : b : c"], {"top_p": 0.5}, "--strategy beam and --top_p do not go together"),
        ([" | a : b : c"], {"num_return_sequences": 6}, "num_return_sequences 6: must be 1 to 5"),
        ([" | a : b : c"], {"strategy": "greedy", "num_return_sequences": 2}, "must be 1 to 1"),
        ([" | a : b : c"], {"max_new_tokens": 10_000}, "--length 10000: the model has only"),
        ([" | a <|endoftext|> : b : c"], {}, "separates source and target"),
    ],
)
def test_what_makes_no_sense_is_one_line(data, tmp_path_factory, sources, how, message):
    output = tmp_path_factory.getbasetemp() / "refusing"
    if not output.is_dir():
        gpt2.train(settings(data, output, max_steps=1, skip_decode=True, preseqlen=2, mid_dim=8))
    with pytest.raises(UserError, match=message) as error:
        gpt2.load(output).generate(sources, **how)
    assert "\n" not in str(error.value)


def test_settings_are_checked(data, tmp_path):
    with pytest.raises(UserError, match="--bsz 0: must be above 0"):
        gpt2.train(settings(data, tmp_path / "x", bsz=0))
    with pytest.raises(UserError, match="--bf16 yes: must be yes or no, not 'yes'"):
        gpt2.train(settings(data, tmp_path / "x", bf16="yes"))
    with pytest.raises(UserError, match="--output_dir is missing"):
        gpt2.train(gpt2.Settings())
    assert not (tmp_path / "x").exists()


def test_importing_costs_nothing():
    code = "import sys, gpt2; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules], dir(gpt2))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout
    assert printed.startswith("[] [")
    assert "'load', 'load_mixed', 'train'" in printed
    assert gpt2.train is run_language_modeling.train
