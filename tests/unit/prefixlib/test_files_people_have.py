"""Files as other tools write them: each is read, with the rows that its author meant, or refused with the remedy."""

import bz2
import gzip
import json
import logging
import lzma

import pytest

import gpt2
import seq2seq
from gpt2 import run_language_modeling, train_e2e
from prefixlib.data import formats, tables
from prefixlib.data.conversations import as_chat
from prefixlib.data.tables import Columns
from prefixlib.system.errors import UserError
from seq2seq import finetune, train_bart
from seq2seq.utils import load_examples
from tests.llama2_tiny import make_llama
from tests.seq2seq_tiny import make_bart

LONG = [(f"name: Inn {n}\ntype: pub", f"Inn {n} is a pub.") for n in range(3)]
SHORT = [(f"Inn {n}", f"Inn {n} is a pub.") for n in range(3)]
ROWS = [{"source": source, "target": target} for source, target in LONG]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
PAIRS = ["source,target", *(f"{a},{b}" for a, b in SHORT)]


def csv_of(separator=",", end="\n", before="", after=""):
    return before + "".join(line.replace(",", separator) + after + end for line in PAIRS)


def lines_of(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def named(first, second):
    return lines_of(*({first: a, second: b} for a, b in LONG))


def talk(*messages):
    return [{"role": role, "content": content} for role, content in messages]


def chat(source):
    return as_chat(talk(("user", source)))


ASKED = [(chat(source), target) for source, target in LONG]
CALL = {"type": "function", "function": {"name": "find", "arguments": '{"q": "pub"}'}, "id": "1"}
CALLED = {"type": "function", "function": {"name": "find", "arguments": {"q": "pub"}}, "id": "1"}
TOOL = {"role": "tool", "content": "3", "tool_call_id": "1", "name": "find"}
ALPACA = [
    {"instruction": "Describe it.", "input": "", "output": "Inn 0 is a pub."},
    {"instruction": "Describe it.", "input": "name: Inn 1", "output": "Inn 1 is a pub."},
]
SAME = ("nan", "NA", "None", "null", "N/A", "12", "2020-01-01", "TRUE", "1e5", "0012")

READ = {  # name -> (what the file holds, its pairs)
    "Caps.csv": (csv_of().replace("source,target", "Source,Target"), SHORT),
    "UPPER.CSV": (csv_of(), SHORT),
    "array.jsonl": (json.dumps(ROWS), LONG),
    "bom.csv": (csv_of(end="\r\n", before="\ufeff"), SHORT),
    "bom.jsonl": ("\ufeff" + LINES.replace("\n", "\r\n"), LONG),
    "chat.jsonl": (
        lines_of({"messages": talk(("system", "Be terse."), ("user", "a"), ("assistant", "b"))}),
        [(as_chat(talk(("system", "Be terse."), ("user", "a"))), "b")],
    ),
    "chat_multi.jsonl": (
        lines_of({"messages": talk(("user", "Hi"), ("assistant", "Hello."), ("user", "a"), ("assistant", "b"))}),
        [(as_chat(talk(("user", "Hi"), ("assistant", "Hello."), ("user", "a"))), "b")],
    ),
    "chat_parts.jsonl": (
        lines_of(
            *(
                {
                    "messages": [
                        {"role": "user", "content": [{"type": "text", "text": a[:4]}, {"type": "text", "text": a[4:]}]},
                        {"role": "assistant", "content": [{"type": "text", "text": b}]},
                    ]
                }
                for a, b in LONG
            )
        ),
        ASKED,
    ),
    "chat_str.jsonl": (
        lines_of({"messages": json.dumps(talk(("user", "a"), ("assistant", "b")))}),
        [(chat("a"), "b")],
    ),
    "chat_tools.jsonl": (
        lines_of(
            {
                "messages": [
                    *talk(("user", "a")),
                    {"role": "assistant", "content": None, "tool_calls": [CALL]},
                    TOOL,
                    *talk(("assistant", "b")),
                ],
                "tools": [],
            }
        ),
        [(as_chat([*talk(("user", "a")), {"role": "assistant", "content": "", "tool_calls": [CALLED]}, TOOL]), "b")],
    ),
    "columns.json": (json.dumps({"source": [a for a, _ in LONG], "target": [b for _, b in LONG]}), LONG),
    "comma.jsonl": (LINES.replace("}\n", "},\n"), LONG),
    "cr.csv": (csv_of(end="\r"), SHORT),
    "dict.json": (json.dumps({"version": "1", "data": ROWS}), LONG),
    "emptyrows.csv": ("source,target\nInn 1,one\n,\n\nInn 2,two\n,\n", [("Inn 1", "one"), ("Inn 2", "two")]),
    "index.csv": (",source,target\n0,a,b\n1,c,d\n", [("a", "b"), ("c", "d")]),
    "lines.json": (LINES, LONG),
    "ls.jsonl": ('{"source": "a\u2028b", "target": "c\u2029d\x85e"}\n', [("a\u2028b", "c\u2029d\x85e")]),
    "nan.csv": ("source,target\n" + "".join(f"{a},{a}\n" for a in SAME), [(a, a) for a in SAME]),
    "ndjson.ndjson": (LINES, LONG),
    "nul.csv": ("source,target\nInn\0,Inn is.\n", [("Inn\0", "Inn is.")]),
    "pandas.json": (
        json.dumps({name: {str(n): row[name] for n, row in enumerate(ROWS)} for name in ("source", "target")}),
        LONG,
    ),
    "index.json": (json.dumps({str(n): row for n, row in enumerate(ROWS)}), LONG),
    "split.json": (json.dumps({"columns": ["source", "target"], "index": [0, 1, 2], "data": LONG}), LONG),
    "pc.jsonl": (named("prompt", "completion"), LONG),
    "pcchat.jsonl": (
        lines_of(*({"prompt": talk(("user", a)), "completion": talk(("assistant", b))} for a, b in LONG)),
        ASKED,
    ),
    "pretty.jsonl": ("\n".join(json.dumps(row, indent=2) for row in ROWS), LONG),
    "qnl.csv": (
        'source,target\r\n"Inn 0\r\ntype: ""pub""","a\r\n\r\nb"\r\n"Inn 1\r\n""x""",c\r\n',
        [('Inn 0\r\ntype: "pub"', "a\r\n\r\nb"), ('Inn 1\r\n"x"', "c")],
    ),
    "quote5.tsv": (
        'source\ttarget\n5" pipe\tA 5" pipe.\n"quoted\tstart\n',
        [('5" pipe', 'A 5" pipe.'), ('"quoted', "start")],
    ),
    "refs_str.csv": ('source,target,references\na,b,"[""x"",""y""]"\n', [("a", "b"), ("a", "x"), ("a", "y")]),
    "semi.csv": (csv_of(";"), SHORT),
    "semi_bom.csv": (csv_of(";", "\r\n", "\ufeff"), SHORT),
    "semi_comma.csv": ("source;target\nInn 0, old;A, b.\n", [("Inn 0, old", "A, b.")]),
    "sepline.csv": ("sep=;\n" + csv_of(";"), SHORT),
    "sharegpt.jsonl": (
        lines_of(
            *({"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]} for a, b in LONG),
        ),
        ASKED,
    ),
    "singlequote.csv": (
        'source,target\nIt\'s "so",He said "so".\nb,c\n',
        [('It\'s "so"', 'He said "so".'), ("b", "c")],
    ),
    "spaces.csv": (csv_of(", "), SHORT),
    "special.jsonl": (lines_of({"source": "a <|endoftext|> b", "target": "c"}), [("a <|endoftext|> b", "c")]),
    "special2.jsonl": (
        lines_of({"source": "a <|im_end|>", "target": "c <|im_end|>"}),
        [("a <|im_end|>", "c <|im_end|>")],
    ),
    "tabs.csv": (csv_of("\t"), SHORT),
    "trail.json": ("[" + LINES.replace("}\n", "},\n") + "]", LONG),
    "trailingcomma.csv": (csv_of(after=","), SHORT),
    "commas.csv": ("source,target\na,b,\nc,d,,\n", [("a", "b"), ("c", "d")]),
    "utf16.csv": (csv_of("\t", "\r\n").encode("utf-16"), SHORT),
    "utf16.tsv": (csv_of("\t", "\r\n").encode("utf-16"), SHORT),
    "bare16.csv": (csv_of().encode("utf-16-le"), SHORT),
    "z.csv.gz": (gzip.compress(csv_of().encode()), SHORT),
    "z.jsonl.gz": (gzip.compress(LINES.encode()), LONG),
    "zipped.jsonl": (gzip.compress(LINES.encode()), LONG),
    "unnamed": (LINES, LONG),
    "table.txt": (csv_of("\t"), SHORT),
    "quoted.csv": ('"source","target"\n"a","b"\n"c","d"\n', [("a", "b"), ("c", "d")]),
}

PACKED = {"bz2": bz2.compress, "xz": lzma.compress, "gz": lambda data: gzip.compress(gzip.compress(data))}
BESIDE_READ = {  # kinds like those
    "rows.csv": (LINES, LONG),
    "list.tsv": (json.dumps(ROWS), LONG),
    "noindex.json": (
        json.dumps({"columns": ["source", "target"], "data": [list(pair) for pair in LONG]}),
        LONG,
    ),
    "system.jsonl": (
        lines_of(
            *(
                {"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}], "system": "Be terse."}
                for a, b in LONG
            )
        ),
        [(as_chat(talk(("system", "Be terse."), ("user", a))), b) for a, b in LONG],
    ),
    "onetools.jsonl": (
        lines_of({"messages": talk(("user", "a"), ("assistant", "b")), "tools": [CALLED]}),
        [(as_chat(talk(("user", "a")), [CALLED]), "b")],
    ),
    "roles.jsonl": (
        lines_of(*({"messages": talk(("User", a), ("model", b))} for a, b in LONG)),
        ASKED,
    ),
    "columns_of_both.jsonl": (
        lines_of(*({"messages": talk(("user", a), ("assistant", b)), "prompt": a, "completion": "z"} for a, b in LONG)),
        ASKED,
    ),
    "blanks.csv": (csv_of() + " ,\t\n", SHORT),
}

REFUSED = {  # name -> (what the file holds, the line that is said)
    "alpaca.jsonl": (
        lines_of(*ALPACA),
        r"row 1: no column \"source\", found .* "
        r'\(pass --source_template "{instruction}\\n{input}" --target_column output\)',
    ),
    "chat_empty.jsonl": (
        lines_of({"messages": talk(("user", "a"), ("assistant", ""))}),
        "row 1: the conversation's last answer: expected a text to train on, found an empty text; leave the row out",
    ),
    "chat_endsuser.jsonl": (
        lines_of({"messages": talk(("user", "a"), ("assistant", "b"), ("user", "thanks"))}),
        "row 1: the conversation ends in a message that is not the assistant's.*; leave that message out",
    ),
    "chat_name.jsonl": (
        lines_of(
            {
                "messages": [
                    {"role": "user", "name": "Ann", "content": "a"},
                    {**talk(("assistant", "b"))[0], "weight": 0},
                ]
            }
        ),
        'row 1: column "messages": the last answer has "weight": 0, not to be trained on; leave the row out',
    ),
    "comment.jsonl": ("// mine\n" + LINES, "row 1: not JSON: .*; leave the comment out"),
    "dictrows.json": (
        json.dumps({"train": ROWS, "test": ROWS}),
        r"holds several lists of rows \(train, test\); give each of them a file of its own",
    ),
    "dup.csv": (
        "source,target,target\na,b,c\n",
        'the column "target" appears twice in the first line; rename one of the two',
    ),
    "dup.jsonl": ('{"source": "a", "target": "b", "target": "c"}\n', 'row 1: .*"target" appears twice; keep one'),
    "emptytarget.jsonl": (
        lines_of({"source": "a", "target": "b"}, {"source": "c", "target": ""}),
        'row 2: column "target": expected a text to train on, found an empty text; leave the row out',
    ),
    "inout.jsonl": (named("input", "output"), r"row 1: .* \(pass --source_column input --target_column output\)"),
    "lat1.csv": (
        "source,target\nCafé,b\n".encode("latin-1"),
        "not UTF-8 text .*; convert it to UTF-8: iconv -f LATIN1",
    ),
    "listtarget.jsonl": (
        lines_of({"source": "a", "target": ["b", "c"]}),
        r'row 1: column "target": expected a text, found .*; several texts go into the column "references"',
    ),
    "nanval.jsonl": (
        '{"source":"a","target":NaN}\n',
        'row 1: column "target": .* found a number nan; leave the row out',
    ),
    "nulltarget.jsonl": (
        lines_of({"source": "a", "target": "b"}, {"source": "c", "target": None}),
        'row 2: column "target": expected a text to train on, found none .*; leave the row out',
    ),
    "num.jsonl": (
        lines_of({"source": "a", "target": 5}),
        'row 1: column "target": expected a text, found a number 5; put it in quotation marks',
    ),
    "qa.jsonl": (named("question", "answer"), r"row 1: .* \(pass --source_column question --target_column answer\)"),
    "ragged.csv": (
        "source,target\na,b\nInn 2,Inn 2, a pub, is old.\n",
        "row 2: 4 values for the 2 columns of the first line; put cells that hold the separator in quotation marks",
    ),
    "summ.jsonl": (
        named("document", "summary"),
        r"row 1: .* \(pass --source_column document --target_column summary\)",
    ),
    "trans.jsonl": (
        lines_of({"translation": {"en": "a", "de": "b"}}),
        r"row 1: .* \(pass --source_column translation.en --target_column translation.de, or the other way round\)",
    ),
    "txt.txt": ("a\tb\n", "its name must end in .jsonl, .*a table whose first line names its columns"),
    "cut.csv": (
        '"source","target"\n"a","b"\n"c","d\n',
        "row 2, line 4: unexpected end of data; close the quotation mark",
    ),
    "cut.gz": (gzip.compress(LINES.encode())[:40], "damaged or cut: .*; compress or fetch it again"),
    "book.csv": (b"PK\x03\x04rest", "a zip archive or a spreadsheet; unpack it, or save the sheet as .csv"),
    "lengths.json": (
        '{"source": ["a", "b"], "target": ["c"]}',
        r"columns of different lengths \(source: 2, target: 1\)",
    ),
    "image.jsonl": (
        lines_of(
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, *talk(("assistant", "b"))]}
        ),
        "row 1: .* a content's parts are .*, not 'image'; leave others out",
    ),
    "who.jsonl": (
        lines_of({"conversations": [{"from": "narrator", "value": "a"}, {"from": "gpt", "value": "b"}]}),
        "row 1: .*\"from\" is one of system, human, .*, not 'narrator'",
    ),
}
BESIDE_REFUSED = {
    **{
        f"twice.{end}": (pack(LINES.encode()), f"its content is compressed; unpack it with {program}")
        for (end, pack), program in zip(PACKED.items(), ("bunzip2", "unxz", "gunzip"), strict=True)
    },
    "return.csv": ("source,target\na\rb,c\n", "row 1, line 2: a carriage return inside a cell; end all lines in the"),
    "two_systems.jsonl": (
        lines_of({"messages": talk(("system", "s"), ("user", "a"), ("assistant", "b")), "system": "t"}),
        'row 1: .*: a message of the system, and a column "system"; keep one of the two',
    ),
    "tools.jsonl": (
        lines_of({"messages": talk(("user", "a"), ("assistant", "b")), "tools": "none"}),
        "row 1: column \"tools\": expected a list, found text that is not JSON: 'none'",
    ),
    "half_messages.jsonl": (
        lines_of({"prompt": "a", "completion": talk(("assistant", "b"))}),
        'row 1: column "completion": .*; messages need a prompt that is messages too',
    ),
    "origin.jsonl": (
        lines_of({"messages": talk(("user", "a"), ("assistant", "b")), "source": "a set of chats"}),
        'row 1: column "target": .*; did you mean --source_column messages',
    ),
}


def test_every_kind_of_file_is_here():
    """All 63 of the collection, and kinds beside them."""
    beside = {
        "index.json",
        "split.json",
        "commas.csv",
        "bare16.csv",
        "zipped.jsonl",
        "unnamed",
        "table.txt",
        "quoted.csv",
    }
    beside |= {"dup.jsonl", "cut.csv", "cut.gz", "book.csv", "lengths.json", "image.jsonl", "who.jsonl"}
    assert not READ.keys() & REFUSED.keys()
    assert len((READ.keys() | REFUSED.keys()) - beside) == 63


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", [*READ, *BESIDE_READ])
def test_is_read(tmp_path, name):
    content, pairs = (READ | BESIDE_READ)[name]
    path = write(tmp_path, name, content)
    assert [(record.source, record.target) for record in tables.read(path)] == pairs
    trained = [(source, (target,)) for source, target in pairs if target not in "xy"]  # references are not trained on
    assert [(row.source, row.references) for row in load_examples("text", "train", path)] == trained


@pytest.mark.parametrize("name", [*REFUSED, *BESIDE_REFUSED])
def test_is_refused_with_the_remedy(tmp_path, name):
    content, message = (REFUSED | BESIDE_REFUSED)[name]
    path = write(tmp_path, name, content)
    for read in (lambda: list(tables.read(path)), lambda: load_examples("text", "train", path)):
        with pytest.raises(UserError, match=f"{name}: {message}") as error:
            read()
        assert "\n" not in str(error.value)


def test_what_an_error_proposes_reads_the_file(tmp_path):
    for name, columns, pairs in (
        ("inout.jsonl", Columns("input", "output"), LONG),
        ("qa.jsonl", Columns("question", "answer"), LONG),
        ("summ.jsonl", Columns("document", "summary"), LONG),
        ("trans.jsonl", Columns("translation.en", "translation.de"), [("a", "b")]),
    ):
        found = tables.read(write(tmp_path, name, REFUSED[name][0]), columns=columns)
        assert [(record.source, record.target) for record in found] == pairs


def test_a_template_of_several_columns(tmp_path):
    path = write(tmp_path, "alpaca.jsonl", lines_of(*ALPACA))
    expected = ["Describe it.\n", "Describe it.\nname: Inn 1"]
    for target in ("output", None):
        found = list(tables.read(path, columns=Columns(None, target, "{instruction}\n{input}")))
        assert [record.source for record in found] == expected
        assert [record.target for record in found] == [row["output"] for row in ALPACA]
    with pytest.raises(UserError, match=r"row 1: --source_template '{task}': no column 'task'; found 'instruction'"):
        list(tables.read(path, columns=Columns(template="{task}")))
    braces = write(tmp_path, "braces.jsonl", lines_of({"source": "{b}", "b": "{source}", "target": "x"}))
    assert next(tables.read(braces, columns=Columns(template="{b}|{source}|{c}"))).source == "{source}|{b}|{c}"


def test_names_of_columns_are_matched_without_case_only_by_default(tmp_path):
    path = write(tmp_path, "Caps.csv", READ["Caps.csv"][0])
    message = r"no column \"source\", found 'Source', 'Target' \(did you mean --source_column Source\?\)"
    with pytest.raises(UserError, match=message):
        list(tables.read(path, columns=Columns("source")))


def test_empty_rows_are_counted(tmp_path, caplog):
    path = write(tmp_path, "emptyrows.csv", READ["emptyrows.csv"][0])
    with caplog.at_level(logging.WARNING):
        assert [number for number, _ in formats.rows(path)] == [1, 3]
    assert caplog.messages == [f"{path}: 2 empty rows left out"]


MERGED = 'source\ttarget\nq1\t"a1\nq2\ta2"\nq3\t"a3\nq4\ta4"\n'


def test_marks_that_would_merge_rows_are_asked_about(tmp_path):
    path = write(tmp_path, "answers.tsv", MERGED)
    message = "answers.tsv: row 1, line 2: quotation marks can be read in two ways: .*pass --quotes yes .*--quotes no"
    with pytest.raises(UserError, match=message) as error:
        list(tables.read(path))
    assert "q1" in str(error.value)
    assert "\n" not in str(error.value)
    merged = [("q1", "a1\nq2\ta2"), ("q3", "a3\nq4\ta4")]
    lines = [("q1", '"a1'), ("q2", 'a2"'), ("q3", '"a3'), ("q4", 'a4"')]
    for quotes, pairs in ((True, merged), (False, lines)):
        assert [(r.source, r.target) for r in tables.read(path, columns=Columns(quotes=quotes))] == pairs
    as_commas = write(tmp_path, "answers.csv", MERGED.replace("\t", ","))
    with pytest.raises(UserError, match="answers.csv: row 1, line 2: quotation marks"):
        list(tables.read(as_commas))


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ('source,target\n"a","b"\n', [("a", "b")]),  # both fit, with the same rows: quoting wins
        ('source,target\n"a\nb",c\n', [("a\nb", "c")]),  # with quoting alone is every row as wide as the head
        ('source,target\n"a, b",c\n', [("a, b", "c")]),
        ('source,target\n"a",b\n5" pipe,"c\n', [('"a"', "b"), ('5" pipe', '"c')]),  # without it alone
        ('source,target\n"a" b,c\n', [('"a" b', "c")]),
    ],
)
def test_the_one_reading_that_fits_is_taken(tmp_path, text, pairs):
    path = write(tmp_path, "rows.csv", text)
    assert [(record.source, record.target) for record in tables.read(path)] == pairs


@pytest.mark.parametrize("launcher", [train_e2e, train_bart])
def test_the_launchers_pass_it_on(launcher, tmp_path):
    """In the shell, \\n stands for a line break; --quotes reaches the reader."""
    words = ["--mode", "text", "--train_file", "a.csv", "--eval_file", "a.csv", "--quotes", "no"]
    words += ["--source_template", r"{instruction}\n{input}", "--output_dir", str(tmp_path)]
    command = launcher.build_command(launcher.parse_args(words))[2:]
    parse = {train_e2e: run_language_modeling.parse, train_bart: lambda argv: finetune.parse_args(argv)[0]}[launcher]
    assert parse(command).columns == Columns(template="{instruction}\n{input}", quotes=False)


@pytest.mark.parametrize("tree", ["gpt2", "seq2seq"])
def test_several_columns_in_training_and_generating(tree, tmp_path):
    package, make = {"gpt2": (gpt2, make_llama), "seq2seq": (seq2seq, make_bart)}[tree]
    path = write(tmp_path, "alpaca.jsonl", lines_of(*ALPACA))
    settings = package.Settings(
        **{"mode": "text", "train_file": str(path), "eval_file": str(path), "output_dir": str(tmp_path / "run")},
        **{"source_template": "{instruction}\n{input}", "model_name_or_path": str(make(tmp_path / "base"))},
        **{"preseqlen": 2, "mid_dim": 8, "max_steps": 1, "bsz": 2, "max_new_tokens": 4, "disable_tqdm": True},
        decode="valid",
    )
    model = package.train(settings).model
    row = json.loads((tmp_path / "run" / "run_valid_beam.jsonl").read_text().split("\n")[1])
    assert row["source"] == "Describe it.\nname: Inn 1"
    for source in ({"instruction": "Describe it.", "input": "name: Inn 1"}, "Describe it.\nname: Inn 1"):
        assert model.generate([source], max_new_tokens=4) == [row["output"]]
