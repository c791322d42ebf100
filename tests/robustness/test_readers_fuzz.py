"""Whatever bytes a file holds: a reader gives records or raises UserError in one line; what is well formed comes back.

500 cases by default, 10,000 with PREFIX_TUNING_SLOW=1, shared by the four tests.
"""

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefixlib.data.readers import SEPARATOR, group_records, is_blank
from prefixlib.data.tasks import TASKS, read_groups, read_openings, read_records
from prefixlib.metrics.files import read_lines, read_references
from prefixlib.system import schema
from prefixlib.system.errors import UserError
from seq2seq.utils import Lines, load_examples

CASES = 2500 if os.environ.get("PREFIX_TUNING_SLOW") == "1" else 125
fuzz = settings(
    max_examples=CASES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
# Unicode's other line ends, a byte-order mark, a lone return: text of a line, no ends of it.
ODD = [
    "\u2028",
    "\u2029",
    "\x85",
    "\x0b",
    "\x0c",
    "\x1c",
    "\r",
    "\ufeff",
    "\x00",
    "|",
    "||",
    "|||",
    " ",
    "\t",
    SEPARATOR,
]
texts = st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=12)
line = st.lists(st.one_of(texts, st.sampled_from(ODD)), max_size=5).map("".join)
content = st.one_of(
    st.binary(max_size=60),
    st.lists(line, max_size=6).map(lambda rows: "\n".join(rows).encode()),
    st.lists(st.tuples(line, line), max_size=4).map(lambda rows: "\n".join(map("||".join, rows)).encode()),
)
KEYS = (
    *("entries", "1", "2", "modifiedtripleset", "subject", "property", "object", "lexicalisations", "lex", "comment"),
    *("tripleset", "annotations", "text", "category"),
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()), max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


any_text = st.text(st.sampled_from("ab |:\ud83d\udc00\u2028\n"), max_size=4)  # half characters, too
webnlg = st.fixed_dictionaries(
    {
        "modifiedtripleset": st.lists(
            st.fixed_dictionaries(dict.fromkeys(("subject", "property", "object"), any_text)), max_size=2
        ),
        "lexicalisations": st.lists(st.fixed_dictionaries({"lex": any_text, "comment": any_text}), max_size=2),
    }
).map(lambda entry: {"entries": [{"1": entry}]})
dart = st.fixed_dictionaries(
    {
        "tripleset": st.lists(st.lists(any_text, min_size=3, max_size=3), max_size=2),
        "annotations": st.lists(st.fixed_dictionaries({"text": any_text}), max_size=2),
    }
).map(lambda entry: [entry])


def one_line(read):
    """What `read` gives, or None where it refuses in one line; anything else that it raises fails the test."""
    try:
        return read()
    except UserError as error:
        said = str(error)
    assert said
    assert "\n" not in said
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@fuzz
@given(source=content, target=content, mode=st.sampled_from(sorted(TASKS)))
def test_any_bytes_in_any_data_file(source, target, mode, folder):
    path = folder / "x.source"
    path.write_bytes(source)
    (folder / "x.target").write_bytes(target)
    records = one_line(lambda: read_records(mode, path))
    groups = one_line(lambda: read_groups(mode, path, blind=True))
    if records is not None:  # what trains decodes
        assert groups is not None
        assert all(record.source.strip(" \t\r\n") or mode not in ("xsum", "cnndm") for record in records)
    if TASKS[mode].seq2seq:
        for split in ("train", "valid", "test"):
            found = one_line(lambda split=split: load_examples(mode, split, path))
            assert found is None or all(found[n].source == found[n].source.strip() for n in range(len(found)))


@fuzz
@given(case=st.tuples(st.just("webnlg"), values | webnlg) | st.tuples(st.just("triples"), values | dart))
def test_any_json_in_a_data_file(case, folder):
    mode, value = case
    path = folder / "x.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    for read in (read_records, lambda *where: read_groups(*where, blind=True)):
        for found in one_line(lambda read=read: read(mode, path)) or ():
            texts = [found.target] if read is read_records else found.references
            "".join((found.source, *texts)).encode()  # no half characters, which would fail when outputs are written


@fuzz
@given(
    rows=st.lists(st.tuples(texts, texts), min_size=1, max_size=6),
    end=st.sampled_from(("\n", "\r\n")),
    bom=st.booleans(),
)
def test_well_formed_files_come_back_line_by_line(rows, end, bom, folder):
    """Whatever stands in a line, but a newline, is text; both trees read the same lines."""
    rows = [(a, b) for a, b in rows if not is_blank(a) and not is_blank(b)]
    rows = [(a.removeprefix("\ufeff").rstrip("\r"), b.removeprefix("\ufeff").rstrip("\r")) for a, b in rows]
    rows = [(a, b) for a, b in rows if a.strip() and b.strip() and "|" not in a + b]
    if not rows:
        return
    for name, side in (("y.source", 0), ("y.target", 1)):
        text = "".join(row[side] + end for row in rows)
        (folder / name).write_bytes(b"\xef\xbb\xbf" * bom + text.encode())
    records = read_records("xsum", folder / "y.source")
    assert [(record.source, record.target) for record in records] == rows
    examples = load_examples("xsum", "train", folder / "y.source")
    found = [(examples[n].source, *examples[n].references) for n in range(len(examples))]
    assert found == [(a.strip(), b.strip()) for a, b in rows]
    (folder / "y.txt").write_bytes(b"\xef\xbb\xbf" * bom + "".join(f"{a}||{b}{end}" for a, b in rows).encode())
    records = read_records("data2text", folder / "y.txt")
    assert [(record.source, record.target) for record in records] == rows
    assert sum(len(group.references) for group in group_records(records)) == len(rows)


@fuzz
@given(data=content, other=content)
def test_any_bytes_in_the_other_files(data, other, folder):
    """Outputs, references and openings for the scorers and the decoders; JSON that is read back."""
    path, second = folder / "z.txt", folder / "z2.txt"
    path.write_bytes(data)
    second.write_bytes(other)
    lines = one_line(lambda: read_lines(path, "--hypotheses"))
    if lines is not None:
        one_line(lambda: read_references([path], len(lines)))
        one_line(lambda: read_references([path, second], len(lines)))
    one_line(lambda: read_openings(path))
    one_line(lambda: Lines(path, "no remedy"))
    one_line(lambda: schema.read(path, dict[str, int], "no remedy"))
