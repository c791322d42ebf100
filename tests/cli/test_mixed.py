"""Several prefixes on one base model: a mixed batch gives what each prefix gives alone; who may come in, and go."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import gpt2
from gpt2 import run_language_modeling
from prefixlib.system.errors import UserError
from tests.cli.test_api import DEMO

TABLE = [("Aarhus_Airport", "cityServed", "Aarhus")]
PLACE = {"name": "The Fern River", "food": "Chinese", "area": "riverside"}
KINDS = {  # name -> its task and settings: other lengths, another task, another kind
    "long": ("webnlg", {"preseqlen": 9}),
    "short": ("webnlg", {"preseqlen": 2}),
    "e2e": ("data2text", {"preseqlen": 5}),
    "infix": ("webnlg", {"preseqlen": 3, "format_mode": "infix"}),
}
SOURCES = {"webnlg": [TABLE, [*TABLE, ("Aarhus", "country", "Denmark")]], "data2text": [PLACE, {"name": "The Mill"}]}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A prefix of each kind; their weights are made large, so that leaving one out or mixing them up would be seen."""
    folder = tmp_path_factory.mktemp("runs")
    for number, (name, (mode, flags)) in enumerate(KINDS.items()):
        where = {"model_name_or_path": str(DEMO / "gpt2"), "data_dir": str(DEMO), "output_dir": str(folder / name)}
        brief = {"bsz": 8, "max_steps": 2, "learning_rate": 0.05, "mid_dim": 16, "seed": number, "disable_tqdm": True}
        run_language_modeling.train(gpt2.Settings(mode=mode, skip_decode=True, **where, **brief, **flags))
    return {name: folder / name for name in KINDS}


@pytest.fixture(scope="module")
def mixed(checkpoints):
    return gpt2.load_mixed(checkpoints)


def jobs():
    """Every prefix with each source of its task, in an order that mixes them."""
    pairs = [(name, source) for n in range(2) for name in KINDS for source in [SOURCES[KINDS[name][0]][n]]]
    return [name for name, _ in pairs], [source for _, source in pairs]


@pytest.mark.parametrize(
    "how",
    [{"num_beams": 3}, {"strategy": "greedy"}, {"strategy": "nucleus", "seed": 3}, {"num_beams": 4, "batch_size": 3}],
    ids=str,
)
def test_a_mixed_batch_gives_what_each_prefix_gives_alone(mixed, checkpoints, how):
    names, sources = jobs()
    found = mixed.generate(sources, names, max_new_tokens=12, return_scores=True, **how)
    seeds = {}
    for n, (name, source) in enumerate(zip(names, sources, strict=True)):
        if how.get("strategy") == "nucleus":  # a sample's seed is its place in the list
            seeds = {"seed": 3 + n}
        alone = gpt2.load(checkpoints[name]).generate([source], max_new_tokens=12, return_scores=True, **how | seeds)
        assert found[n][0] == alone[0][0], (name, source)
        assert found[n][1] == pytest.approx(alone[0][1], rel=1e-4)
    assert len({text for text, _ in found}) > len(KINDS)  # or the prefixes would not matter


def test_several_outputs_for_one_name(mixed, checkpoints):
    found = mixed.generate(SOURCES["data2text"], "e2e", num_beams=3, num_return_sequences=2, max_new_tokens=8)
    alone = gpt2.load(checkpoints["e2e"])
    assert found == alone.generate(SOURCES["data2text"], num_beams=3, num_return_sequences=2, max_new_tokens=8)
    assert [len(texts) for texts in found] == [2, 2]


def test_prefixes_come_and_go_on_one_base(mixed, checkpoints):
    before = sum(p.numel() for p in mixed.base.parameters())
    assert all(model.base is mixed.base for model in mixed.models.values())
    mixed.add("again", checkpoints["long"])
    assert mixed.generate([TABLE], "again", max_new_tokens=8) == mixed.generate([TABLE], "long", max_new_tokens=8)
    mixed.remove("again")
    with pytest.raises(UserError, match="no prefix 'again'; there are 'long', 'short', 'e2e', 'infix'"):
        mixed.generate([TABLE], "again")
    assert sum(p.numel() for p in mixed.base.parameters()) == before


def test_no_sources_no_texts(mixed):
    assert mixed.generate([], "e2e") == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, c: m.add("e2e", c["long"]), "there is a prefix 'e2e' already"),
        (lambda m, c: m.add("x", DEMO / "gpt2"), "data/demo/gpt2"),
        (lambda m, c: m.generate([TABLE, TABLE], ["long"]), "prefix has 1 names for 2 sources"),
        (lambda m, c: m.generate("text", "long"), "takes a list of sources"),
        (lambda m, c: m.generate([TABLE], "e2e"), "an input of mode data2text cannot be made from"),
        (lambda m, c: gpt2.load_mixed({}), "needs at least one checkpoint"),
    ],
)
def test_refusals(mixed, checkpoints, call, message):
    with pytest.raises(UserError, match=message):
        call(mixed, checkpoints)
    assert list(mixed.models) == list(KINDS)


def test_a_prefix_of_another_base_is_refused(mixed, tmp_path):
    torch.manual_seed(5)
    base = AutoModelForCausalLM.from_pretrained(DEMO / "gpt2")
    with torch.no_grad():
        base.transformer.h[0].attn.c_attn.weight.add_(0.1)
    shutil.copytree(DEMO / "gpt2", tmp_path / "base")
    base.save_pretrained(tmp_path / "base")
    where = {"model_name_or_path": str(tmp_path / "base"), "data_dir": str(DEMO), "output_dir": str(tmp_path / "run")}
    brief = {"bsz": 8, "max_steps": 1, "preseqlen": 3, "mid_dim": 16, "skip_decode": True, "disable_tqdm": True}
    run_language_modeling.train(gpt2.Settings(mode="webnlg", **where, **brief))
    with pytest.raises(UserError, match=str(tmp_path / "run")):
        mixed.add("other", tmp_path / "run")
    mixed.add("other", tmp_path / "run", allow_other_base=True)
    mixed.remove("other")


def test_a_model_tuned_with_its_prefix_shares_no_base(mixed, tmp_path):
    where = {"model_name_or_path": str(DEMO / "gpt2"), "data_dir": str(DEMO), "output_dir": str(tmp_path / "run")}
    brief = {"bsz": 8, "max_steps": 1, "preseqlen": 3, "mid_dim": 16, "skip_decode": True, "disable_tqdm": True}
    run_language_modeling.train(gpt2.Settings(mode="webnlg", tuning_mode="bothtune", **where, **brief))
    with pytest.raises(UserError, match="was tuned together with a model of its own"):
        mixed.add("both", tmp_path / "run")
