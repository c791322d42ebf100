"""Reading user data: values as they stand, in every kind of file; what is wrong is named by row and column."""

import csv
import json
import re

import datasets
import pytest

from prefixlib.data import special_tokens, tables
from prefixlib.data.conversations import Chat, as_chat
from prefixlib.data.readers import Record
from prefixlib.data.tables import Columns
from prefixlib.data.tasks import given_file, read_groups, read_records
from prefixlib.data.wording import Wording, check_template
from prefixlib.system.errors import UserError

ODD = [
    ("line\nbreak", "one\n\ntwo\n"),
    ("a\ttab", " spaces  \t"),
    ("a | bar || two", "||"),
    ("2020-01-01", "007"),  # a guess at types would make a date and a number of these
    ("NA", "1.0"),
    ("emoji 👩‍🚀", "naïve \u2028 ẞ \x85 日本"),
    ("carriage\r\nreturn\r", 'quote " and \\n, comma'),
    ("null", "true"),
]


def make(folder, kind, rows=None):
    """A file, or a saved folder, of rows of source and target."""
    rows = [{"source": source, "target": target} for source, target in ODD] if rows is None else rows
    path = folder / f"rows{kind}"
    if kind == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), newline="")
    elif kind == ".json":
        path.write_text(json.dumps(rows))
    elif kind in (".csv", ".tsv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv", ".parquet", "-saved"])
def test_values_stay_as_they_are(tmp_path, kind):
    path = make(tmp_path, kind)
    assert [(record.source, record.target) for record in read_records("text", path)] == ODD
    assert [(group.source, group.references) for group in read_groups("text", path)] == [(s, (t,)) for s, t in ODD]


def records(tmp_path, rows, columns=tables.USUAL, blind=True):
    return list(tables.read(make(tmp_path, ".jsonl", rows), blind, columns))


def test_other_columns_and_several_references(tmp_path):
    rows = [
        {"q": "a", "a": "1", "references": ["1", "2", " "]},
        {"q": "b", "references": ["3", "4"]},
        {"q": "a", "a": "5"},
        {"q": "c", "a": ""},
    ]
    found = records(tmp_path, rows, Columns("q", "a"))
    assert [(r.source, r.target, r.trainable) for r in found] == [
        ("a", "1", True),
        ("a", "2", False),  # it counts in scores; trained on is the target
        ("b", "3", True),
        ("b", "4", True),
        ("a", "5", True),
        ("c", "", True),
    ]
    groups = read_groups("text", tmp_path / "rows.jsonl", blind=True, columns=Columns("q", "a"))
    assert [(g.source, g.references) for g in groups] == [("a", ("1", "2", "5")), ("b", ("3", "4")), ("c", ())]


USER, ANSWER = {"role": "user", "content": "Hi \n you"}, {"role": "assistant", "content": "Hello\n"}


def test_conversations(tmp_path):
    rows = [{"messages": [USER, ANSWER, USER, ANSWER]}, {"messages": [USER], "target": "Yes"}, {"messages": [USER]}]
    found = records(tmp_path, rows)
    assert [record.target for record in found] == ["Hello\n", "Yes", ""]
    assert [record.source.messages for record in found] == [[USER, ANSWER, USER], [USER], [USER]]
    assert all(isinstance(group.source, Chat) for group in read_groups("text", tmp_path / "rows.jsonl", blind=True))
    assert records(tmp_path, [{"talk": [USER, ANSWER]}], Columns("talk"))[0].source == as_chat([USER])
    with pytest.raises(UserError, match="row 2: texts and conversations in one file"):
        records(tmp_path, [{"messages": [USER, ANSWER]}, {"source": "a", "target": "b"}])


BAD = {
    "no column": ([{"source": "a", "target": "b"}, {"text": "a"}], r'row 2: no column "source", found \'text\''),
    "empty source": ([{"source": " \n", "target": "b"}], 'row 1: column "source": expected a text, found an empty one'),
    "number": ([{"source": "a", "target": 5}], 'row 1: column "target": expected a text, found a number 5'),
    "truth": ([{"source": True, "target": "a"}], 'row 1: column "source": expected a text, found true or false True'),
    "null": ([{"source": None, "target": "a"}], 'row 1: column "source": expected a text, found nothing'),
    "object": ([{"source": {"a": 1}, "target": "a"}], r'row 1: column "source": expected a text, found \{\'a\': 1\}'),
    "references": ([{"source": "a", "references": "b"}], "row 1: column \"references\": expected a list .* found 'b'"),
    "half": ([{"source": "a", "target": "b\ud83d"}], 'row 1: column "target": expected whole characters'),
    "message": ([{"messages": [{"role": "user"}]}], 'row 1: column "messages": a conversation is a list of'),
    "no question": ([{"messages": [ANSWER]}], 'row 1: column "messages": a conversation to be answered ends in'),
    "half message": (
        [{"messages": [{"role": "user", "content": "\udc00"}]}],
        'row 1: column "messages": expected',
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named(tmp_path, case):
    rows, message = BAD[case]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=f"rows.jsonl: {message}") as error:
        list(tables.read(tmp_path / "rows.jsonl"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"source": "a", "target": "  "}, 'row 1: column "target": expected a text to train on, found an empty text'),
        ({"source": "a", "y": "b"}, r'row 1: column "target": .*, found none \(the row has \'source\', \'y\'\)'),
        ({"source": "a", "references": [""]}, 'row 1: column "target": expected a text to train on, found none'),
    ],
)
def test_training_wants_a_target_and_a_test_file_does_not(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        records(tmp_path, [row], blind=False)
    assert records(tmp_path, [row]) == [Record("a", "", True, (), "")]


FILES = {
    ("x.jsonl", '{"source": "a"}\n\n{"source": \n'): "x.jsonl: row 3: not JSON",
    ("y.jsonl", '["a", "b"]\n'): "y.jsonl: row 1: expected an object like",
    ("deep.jsonl", "[" * 100_000): "deep.jsonl: row 1: not a row of data",
    ("x.json", '"a"'): "x.json: row 1: expected an object like",
    ("cut.json", '[{"source": "a"}, '): "cut.json: line 1: not JSON: the file is cut",
    ("more.json", '[{"source": "a"}]\n[]'): "more.json: line 1: more text after the end of the list",
    ("y.json", '[{"source": "a"},\n{]'): "y.json: line 2: not JSON",
    ("x.csv", "source,target\na,b\nc\n"): "x.csv: row 2: 1 values for the 2 columns of the first line",
    ("y.csv", 'source,target\n"a,b\nc\n'): "y.csv: row 1, line 4: unexpected end of data",
    ("x.txt", "a||b\n"): "x.txt: its name must end in .jsonl, .json, .csv, .tsv, .parquet",
    ("x.parquet", "no"): "x.parquet: cannot be read as a data set: ",
    ("none.jsonl", ""): "none.jsonl: no examples in it",
    ("empty.csv", "source,target\n"): "empty.csv: no examples in it",
}


@pytest.mark.parametrize(("name", "text"), FILES)
def test_a_bad_file_is_one_line(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=re.escape(FILES[name, text])) as error:
        read_records("text", tmp_path / name, blind=True)
    assert "\n" not in str(error.value)


def test_not_utf8_and_a_byte_order_mark(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"source,target\na,\xff\n")
    with pytest.raises(UserError, match="a.csv: not UTF-8 text"):
        read_records("text", tmp_path / "a.csv")
    (tmp_path / "b.csv").write_bytes("\ufeffsource,target\r\na,b\r\n".encode())
    assert [(r.source, r.target) for r in read_records("text", tmp_path / "b.csv")] == [("a", "b")]


def test_a_saved_folder_of_several_sets_is_named(tmp_path):
    parts = datasets.DatasetDict({"train": datasets.Dataset.from_list([{"source": "a", "target": "b"}])})
    parts.save_to_disk(tmp_path / "all")
    with pytest.raises(UserError, match=r"all holds several data sets: pass one of them, all/\{train\}"):
        read_records("text", tmp_path / "all")
    assert read_records("text", tmp_path / "all" / "train")[0].target == "b"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: cannot be read as a data set"):
        read_records("text", tmp_path / "empty")


@pytest.mark.parametrize(
    ("given", "split", "asked"),
    [
        ("owner/pairs", "train", ("owner/pairs", "train")),
        ("owner/pairs", "valid", ("owner/pairs", "validation")),
        ("pairs:test[:10%]", "valid", ("pairs", "test[:10%]")),
    ],
)
def test_names_of_the_hub(monkeypatch, given, split, asked):
    calls = []

    def load_dataset(name, split):
        calls.append((name, split))
        return datasets.Dataset.from_list([{"source": "a", "target": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_records("text", given_file("text", given, split))[0].source == "a"
    assert calls == [asked]


def test_what_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given, message in (
        ("no/such_set", "no/such_set:train: cannot be read as a data set of the hub, and no file of that name is here"),
        ("none.jsonl", "none.jsonl: no such file for mode text; pass a file of your own"),
        ("a/b/c", "a/b/c: no such file for mode text"),
    ):
        with pytest.raises(UserError, match=message) as error:
            read_records("text", given_file("text", given, "train"))
        assert "\n" not in str(error.value)


class Tokenizer:
    """A chat template and no more."""

    chat_template = "x"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert (tokenize, add_generation_prompt) == (False, True)
        if messages[0]["role"] == "system":
            raise ValueError("no system message here")
        return "".join(f"<{m['role']}>{m['content'].strip()}</>" for m in messages) + "<assistant>"


def test_a_tokenizer_that_loses_characters_is_said(caplog):
    class Words:
        def __call__(self, text, add_special_tokens):
            return {"input_ids": text.split()}

        def decode(self, ids, **_):
            return " ".join(ids)

    special_tokens.warn_of_lost_characters(Words(), ["a b", "c"])
    assert not caplog.messages
    special_tokens.warn_of_lost_characters(Words(), ["a b", "c\nd", "e\tf"])
    assert caplog.messages == ["the tokenizer does not keep every character: it turns 'c\\nd' into 'c d'"]


def test_what_the_model_reads():
    assert Wording().text("a {source} b", None) == "a {source} b"
    assert Wording("Sum {up}: {source}!").text("{source}{}", None) == "Sum {up}: {source}{}!"
    chat = Wording(chat=True)
    assert chat.text(as_chat([USER]), Tokenizer()) == chat.text(USER["content"], Tokenizer())
    assert chat.text(as_chat([USER]), Tokenizer()) == "<user>Hi \n you</><assistant>"
    assert chat.ending(as_chat([USER]), Tokenizer()) == "</><assistant>"
    with pytest.raises(UserError, match="was trained on texts, not on conversations"):
        Wording().text(as_chat([USER]), Tokenizer())
    with pytest.raises(UserError, match="chat template refuses .*: no system message here"):
        chat.text(as_chat([{"role": "system", "content": "x"}]), Tokenizer())
    with pytest.raises(UserError, match="the base model has no chat template"):
        chat.text("a", object())
    for template in ("no slot", "{source} {source}"):
        with pytest.raises(UserError, match=r"--source_template .* must hold \{source\} once"):
            check_template(template)
