"""docs/models.md says of each kind of base model what the tests of that kind saw, and leaves none out."""

import re

import pytest

from gpt2.prefix_lm import PrefixLM
from prefixlib.compute.head import Head
from prefixlib.system.errors import UserError
from seq2seq.frozen_lm import shares_rows
from tests.conftest import ROOT
from tests.unit.gpt2 import test_decoder_families as decoders
from tests.unit.seq2seq import test_families as encoder_decoders

PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


def rows_of(title):
    """The cells of each row of the table under a title, without the table's head."""
    (section,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def kinds(cell):
    return re.findall(r"`(\w+)`", cell)


def recomputes(base):
    try:
        PrefixLM(base, decoders.make(base).prefix, checkpointing=True)
    except UserError:
        return False
    return True


@pytest.mark.parametrize(
    ("title", "module", "count"),
    [("Decoder-only, in gpt2/", decoders, 26), ("Encoder-decoders, in seq2seq/", encoder_decoders, 10)],
)
def test_each_kind_has_its_row_and_the_row_is_true(title, module, count):
    rows = {kinds(row[0])[0]: row for row in rows_of(title)}
    assert len(rows) == count
    seen = {}
    for name in module.FAMILIES:
        base = module.random_model(module.FAMILIES[name] if module is decoders else name)
        seen.setdefault(base.config.model_type, []).append((base, Head(base).plain))
    assert rows.keys() == seen.keys()
    for kind, models in seen.items():
        row, plain = rows[kind], {plain for _, plain in models}
        logits = row[-1 if module is encoder_decoders else 2]
        assert ("output layer" in logits) == (True in plain), kind
        assert ("the model's own" in logits) == (False in plain), kind
        if module is encoder_decoders:
            assert {row[2]} == {"shared" if shares_rows(base) else "own" for base, _ in models}, kind
        else:
            found = {recomputes(base) for base, _ in models}
            assert row[3].startswith({(True,): "yes", (False,): "no: "}.get(tuple(found), "where no")), kind


def test_what_is_said_to_be_refused_is_refused_by_the_tests():
    said = {kind for row in rows_of("Refused") for kind in kinds(row[0])}
    unsteered = {config.model_type.removesuffix("_text") for config, _ in decoders.UNSTEERED}
    assert said == {*unsteered, *decoders.UNSHARED, *encoder_decoders.REFUSED, "bloom"}
    assert len(said) == 19
