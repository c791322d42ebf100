"""Readers on the real data sets: their counts, and real first lines (PREFIX_TUNING_DATA names the folder)."""

import os

import pytest

from prefixlib.data.readers import SEPARATOR, group_records
from prefixlib.data.tasks import data_file, prompt_text, read_records

DATA = os.environ.get("PREFIX_TUNING_DATA")
pytestmark = pytest.mark.skipif(not DATA, reason="PREFIX_TUNING_DATA is not set")

# (texts, texts trained on, distinct inputs); the sets' published sizes where they publish one, else counted once
COUNTS = {
    ("data2text", "train"): (42061, 42061, 4862),
    ("data2text", "valid"): (4672, 4672, 547),
    ("webnlg", "train"): (18102, 18025, 6893),  # of 6,940 entries
    ("webnlg", "valid"): (2268, 2258, 871),  # of 872 entries
    ("triples", "valid"): (6980, 6980, 2721),  # of 2,768 entries
}


@pytest.mark.parametrize(("mode", "split"), COUNTS)
def test_counts(mode, split):
    path = data_file(mode, split, DATA)
    if not path.is_file():
        pytest.skip(f"no {path.name}")
    records = read_records(mode, path)
    groups = group_records(records)
    trained = sum(record.trainable for record in records)
    assert (len(records), trained, len(groups)) == COUNTS[mode, split]
    assert sum(len(group.references) for group in groups) == len(records)  # no text is lost by grouping
    if mode == "data2text":  # every target ends in the space that training sees twice before the separator
        assert all(record.target.endswith(" ") for record in records)


PROMPTS = {
    "data2text": " name : Alimentum | area : city centre | family friendly : no <|endoftext|>",
    # the original decoded this entry without its bar
    "webnlg": "  | Aarhus : leaderName : Jacob_Bundsgaard <|endoftext|>",
    "triples": " Mars Hill College : joined : 1973 | Mars Hill College : location : Mars Hill, North Carolina"
    " <|endoftext|>",
}


@pytest.mark.parametrize("mode", PROMPTS)
def test_first_prompt(mode):
    path = data_file(mode, "valid", DATA)
    if not path.is_file():
        pytest.skip(f"no {path.name}")
    assert prompt_text(mode, read_records(mode, path)[0].source, SEPARATOR) == PROMPTS[mode]
