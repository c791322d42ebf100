"""Readers: the exact text of every mode, grouping, and one clear error for each kind of bad file."""

import json
import subprocess
import sys

import pytest

from prefixlib.data.readers import SEPARATOR, Group, group_records
from prefixlib.data.tasks import GPT2_MODES, data_file, prompt_text, read_groups, read_records, training_text
from prefixlib.system.errors import UserError


def webnlg_entry(lexicalisations, triples=(("Aarhus", "leaderName", "Jacob_Bundsgaard"),), category="Airport"):
    return {
        "category": category,
        "lexicalisations": [{"lex": lex, "comment": comment} for lex, comment in lexicalisations],
        "modifiedtripleset": [dict(zip(("subject", "property", "object"), t, strict=True)) for t in triples],
    }


def write_webnlg(path, *entries):
    path.write_text(json.dumps({"entries": [{str(i): entry} for i, entry in enumerate(entries, 1)]}))
    return path


TWO_TRIPLES = (("Aarhus", "leaderName", "Jacob_Bundsgaard"), ("Aarhus", "isPartOf", "Denmark"))

# mode -> file name, file content, training line. The lines follow the original's templates, spaces included.
LITERALS = {
    "data2text": (
        "d.txt",
        "name : Alimentum | area : city centre||In the centre , Alimentum . \n",
        " name : Alimentum | area : city centre <|endoftext|> In the centre , Alimentum .  <|endoftext|>",
    ),
    "webnlg": (
        "w.json",
        json.dumps({"entries": [{"1": webnlg_entry([("Aarhus is led by him.", "good")], TWO_TRIPLES)}]}),
        "  | Aarhus : leaderName : Jacob_Bundsgaard | Aarhus : isPartOf : Denmark <|endoftext|>"
        " Aarhus is led by him. <|endoftext|>",
    ),
    "triples": (
        "t.json",
        json.dumps([{"tripleset": TWO_TRIPLES, "annotations": [{"source": "x", "text": "Aarhus is led by him."}]}]),
        " Aarhus : leadername : Jacob_Bundsgaard | Aarhus : ispartof : Denmark <|endoftext|>"
        " Aarhus is led by him. <|endoftext|>",
    ),
    "writingPrompts": (
        "p.txt",
        "[ WP ] A door -lrb- red -rrb- .|||It opened . <newline> Wide .\n",
        " [ WP ] A door ( red ) . <|endoftext|> It opened . \n Wide . <|endoftext|>",
    ),
    "xsum": ("x.source", "A long article.\n", "A long article.<|endoftext|>A summary.<|endoftext|>"),
    "cnndm": ("c.source", "A long article.\n", "A long article.<|endoftext|>A summary.<|endoftext|>"),
    "sentiment": (
        "s.txt",
        "positive |||good < br / > film\n",
        " positive <|endoftext|>good \n film<|endoftext|>",
    ),
    "topic": ("n.tsv", "world||peace < br / > talks\n", " world<|endoftext|>peace < br / > talks<|endoftext|>"),
    "classify-sentiment": (
        "s.txt",
        "positive|||good < br / > film\n",
        " good \n film <|endoftext|> positive<|endoftext|>",
    ),
    "text": (
        "n.jsonl",
        '{"source": " a\\n|  b ", "target": "c || d\\u2028\\n"}\n',
        " a\n|  b <|endoftext|>c || d\u2028\n<|endoftext|>",
    ),
    "classify-topic": ("n.tsv", "world||peace talks\n", " peace talks <|endoftext|> world<|endoftext|>"),
}


def test_every_mode_has_a_literal():
    assert len(GPT2_MODES) == 11
    assert LITERALS.keys() == set(GPT2_MODES)


@pytest.mark.parametrize("mode", LITERALS)
def test_training_line_is_the_originals_to_the_space(mode, tmp_path):
    name, content, line = LITERALS[mode]
    path = tmp_path / name
    path.write_text(content)
    if name.endswith(".source"):
        (tmp_path / name.replace("source", "target")).write_text("A summary.\n")
    (record,) = read_records(mode, path)
    prompt, continuation = training_text(mode, record.source, record.target, SEPARATOR)
    assert prompt + continuation == line
    assert prompt == prompt_text(mode, record.source, SEPARATOR)  # decoding sees what training saw
    assert prompt.endswith(SEPARATOR)
    assert prompt.count(SEPARATOR) == 1


def test_separator_may_be_another_tokenizers():
    assert training_text("data2text", "a", "b", "</s>") == (" a </s>", " b </s>")
    with pytest.raises(UserError, match="must not occur in a text"):
        prompt_text("data2text", "a </s> b", "</s>")


def test_webnlg_keeps_all_references_and_trains_on_the_good(tmp_path):
    path = write_webnlg(
        tmp_path / "w.json",
        webnlg_entry([("One.", "good"), ("Two.", "toFix"), ("   ", "good")]),
        webnlg_entry([("Else.", "good")], TWO_TRIPLES, "City"),
        webnlg_entry([("Three.", "good")], category="Food"),  # the first entry's input again
    )
    records = read_records("webnlg", path)
    assert [record.trainable for record in records] == [True, False, True, True, True]
    assert group_records(records) == [
        Group(" | Aarhus : leaderName : Jacob_Bundsgaard", ("One.", "Two.", "Three."), "Airport", ("leaderName",)),
        Group(
            " | Aarhus : leaderName : Jacob_Bundsgaard | Aarhus : isPartOf : Denmark",
            ("Else.",),
            "City",
            ("leaderName", "isPartOf"),
        ),
    ]


def test_blind_entries_give_a_group_without_references(tmp_path):
    webnlg = write_webnlg(tmp_path / "w.json", webnlg_entry([]))
    dart = tmp_path / "d.json"
    dart.write_text(json.dumps([{"tripleset": [["S", "REL", "O"]], "annotations": []}]))
    assert read_groups("webnlg", webnlg)[0].references == ()
    assert read_groups("triples", dart) == [Group("S : rel : O", (), "", ("rel",))]
    assert [record.trainable for record in read_records("triples", dart)] == [False]


def test_data2text_keeps_the_target_as_read_and_strips_references(tmp_path):
    path = tmp_path / "d.txt"
    path.write_bytes("\ufeffname : Café | food : Thai||A . \r\n\n  \nname : Café | food : Thai||B\u2028C . \n".encode())
    records = read_records("data2text", path)
    assert [record.target for record in records] == ["A . ", "B\u2028C . "]
    assert read_groups("data2text", path) == [
        Group("name : Café | food : Thai", ("A .", "B\u2028C ."), "", ("name", "food"))
    ]


def test_file_names_are_the_originals(tmp_path):
    assert data_file("data2text", "train").parts[-3:] == ("data", "e2e_data", "src1_train.txt")
    assert data_file("webnlg", "valid", tmp_path) == tmp_path / "webnlg_challenge_2017" / "dev.json"
    assert data_file("triples", "test", tmp_path) == tmp_path / "dart" / "dart-v1.1.1-full-test.json"
    assert data_file("xsum", "valid", tmp_path) == tmp_path / "xsum" / "val.source"
    assert data_file("cnndm", "test", tmp_path) == tmp_path / "cnn_dm" / "test.source"


TRIPLE = '{"subject": "s", "property": "p", "object": "o"}'
BAD_FILES = {
    # name: (mode, file name, content, what the one line must say)
    "no bars": ("data2text", "b.txt", "a : b||c\n\nonly a source\n", "b.txt:3: expected source||target, found 'only a"),
    "bars twice": ("data2text", "b.txt", "a||b||c\n", "b.txt:1: expected source||target"),
    "no source": ("data2text", "b.txt", " ||c\n", "b.txt:1: expected source||target"),
    "label": ("sentiment", "b.txt", "positive||good\n", "b.txt:1: expected label|||text"),
    "separator": ("data2text", "b.txt", "a : b||c\na <|endoftext|>||c\n", "b.txt:2: '<|endoftext|>' separates"),
    "empty": ("data2text", "b.txt", "\n \n", "b.txt: no examples"),
    "latin-1": ("data2text", "b.txt", "a : b||caf\xe9\n".encode("latin-1"), "b.txt: not UTF-8"),
    "not JSON": ("webnlg", "b.json", '{"entries":\n [}', "b.json:2: not JSON"),
    "list": ("webnlg", "b.json", "[1]", 'b.json: top level: expected {"entries": [...]}, found [1]'),
    "no entries": ("webnlg", "b.json", '{"entries": []}', "b.json: no examples"),
    "bare entry": ("webnlg", "b.json", '{"entries": [{"a": 1, "b": 2}]}', 'entry 1: expected {"1": {...}}'),
    "no triples": (
        "webnlg",
        "b.json",
        '{"entries": [{"1": {"lexicalisations": []}}]}',
        'entry 1: expected {"modifiedtripleset": [...]}',
    ),
    "no object": (
        "webnlg",
        "b.json",
        '{"entries": [{"1": {"modifiedtripleset": [' + TRIPLE.replace("object", "obj") + "]}}]}",
        'entry 1: triple 1: expected {"object": text}',
    ),
    "no lex": (
        "webnlg",
        "b.json",
        '{"entries": [{"1": {"modifiedtripleset": [' + TRIPLE + '], "lexicalisations": [{"text": "x"}]}}]}',
        'entry 1: lexicalisation 1: expected {"lex": text}',
    ),
    "object for list": ("triples", "b.json", '{"entries": []}', "b.json: top level: expected [{"),
    "pair": ("triples", "b.json", '[{"tripleset": [["s", "r"]]}]', "entry 1: expected [subject, relation, object]"),
    "no text": (
        "triples",
        "b.json",
        '[{"tripleset": [["s", "r", "o"]], "annotations": [{}]}]',
        'entry 1: annotation 1: expected {"text": text}',
    ),
    "blank document": ("xsum", "b.source", "\n", "b.source:1: expected one document a line, found a blank line"),
    "not a source": ("xsum", "b.txt", "x\n", "b.txt: expected a file ending in 'source'"),
    "short": ("xsum", "b.source", "x\ny\n", "b.target:2: expected a target for b.source:2"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_one_line_that_names_the_place(case, tmp_path):
    mode, name, content, message = BAD_FILES[case]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "b.target").write_text("A summary.\n")
    with pytest.raises(UserError) as caught:
        read_records(mode, path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_longer_target_file_is_refused(tmp_path):
    (tmp_path / "b.source").write_text("x\n")
    (tmp_path / "b.target").write_text("X\nY\n")
    with pytest.raises(UserError, match=r"b\.target:2: expected the end of file"):
        read_records("cnndm", tmp_path / "b.source")


def test_missing_file_names_the_command_that_mends_it(tmp_path):
    with pytest.raises(UserError, match=r"no such file.*prepare_data\.py webnlg`, or pass a file of your own"):
        read_records("webnlg", tmp_path / "train.json")
    with pytest.raises(UserError, match=r"no such file for mode topic; pass a file of your own"):
        read_records("topic", tmp_path / "train1.tsv")
    (tmp_path / "x.source").write_text("x\n")
    with pytest.raises(UserError, match=r"x\.target: no such file"):
        read_records("xsum", tmp_path / "x.source")


def test_unknown_mode_and_split_list_the_known():
    with pytest.raises(UserError, match="--mode nope: unknown; one of "):
        read_records("nope", "x")
    with pytest.raises(UserError, match="split 'dev' of mode webnlg: expected one of train, valid, test"):
        data_file("webnlg", "dev")


def test_importing_loads_the_standard_library_alone():
    code = (
        "import sys, prefixlib.data.tasks; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
