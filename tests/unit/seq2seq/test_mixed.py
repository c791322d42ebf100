"""Several prefixes on one encoder-decoder: a mixed batch gives what each prefix gives alone; who may come in."""

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import seq2seq
from prefixlib.system.errors import UserError
from tests.unit.seq2seq.test_model import TRIPLES, place, settings_of  # noqa: F401

KINDS = {  # name -> its settings: other lengths, another task, a site less
    "long": {"preseqlen": 7},
    "short": {"preseqlen": 2, "use_encoder_prefix": False},
    "webnlg": {"preseqlen": 4, "mode": "webnlg"},
}
SOURCES = {"xsum": ["a long document of words", "another one"], "webnlg": TRIPLES[:2]}


@pytest.fixture(scope="module")
def checkpoints(place, tmp_path_factory):  # noqa: F811
    """A prefix of each kind; their weights are made large, so that leaving one out or mixing them up would be seen."""
    folder = tmp_path_factory.mktemp("runs")
    for number, (name, flags) in enumerate(KINDS.items()):
        brief = {"seed": number, "init_shallow": True, "init_shallow_word": "no", "learning_rate": 1.0}
        seq2seq.train(settings_of(place, folder / name, **{**brief, **flags}))
    return {name: folder / name for name in KINDS}


@pytest.fixture(scope="module")
def mixed(checkpoints):
    return seq2seq.load_mixed(checkpoints)


@pytest.mark.parametrize(
    "how",
    [{"num_beams": 3}, {"strategy": "greedy"}, {"num_beams": 4, "batch_size": 2, "num_return_sequences": 2}],
    ids=str,
)
def test_a_mixed_batch_gives_what_each_prefix_gives_alone(mixed, checkpoints, how):
    how |= {"max_new_tokens": 8, "min_length": 0}
    jobs = [(name, SOURCES[flags.get("mode", "xsum")][n]) for n in range(2) for name, flags in KINDS.items()]
    found = mixed.generate([source for _, source in jobs], [name for name, _ in jobs], return_scores=True, **how)
    for (name, source), given in zip(jobs, found, strict=True):
        (alone,) = seq2seq.load(checkpoints[name]).generate([source], return_scores=True, **how)
        pairs = zip(given, alone, strict=True) if "num_return_sequences" in how else [(given, alone)]
        for one, other in pairs:
            assert one[0] == other[0], (name, source)
            assert one[1] == pytest.approx(other[1], rel=1e-4)
    assert len({str(text) for text in found}) > len(KINDS)  # or the prefixes would not matter


def test_one_base_serves_all(mixed, checkpoints):
    assert all(model.base is mixed.base for model in mixed.models.values())
    with pytest.raises(UserError, match="there is a prefix 'long' already"):
        mixed.add("long", checkpoints["long"])
    with pytest.raises(UserError, match="no prefix 'other'; there are 'long', 'short', 'webnlg'"):
        mixed.generate(["x"], "other")
    mixed.add("again", checkpoints["long"])
    mixed.remove("again")
    assert list(mixed.models) == list(KINDS)


def test_a_prefix_of_another_base_is_refused(mixed, place, tmp_path):  # noqa: F811
    """One of the same shape, of which one matrix differs."""
    model = AutoModelForSeq2SeqLM.from_pretrained(place / "bart")
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.weight.add_(0.1)
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(place / "bart").save_pretrained(tmp_path / "base")
    seq2seq.train(settings_of(place, tmp_path / "run", model_name_or_path=str(tmp_path / "base")))
    with pytest.raises(UserError, match="has other weights"):
        mixed.add("other", tmp_path / "run")
