"""The conversions behind prepare_data: E2E csv, WebNLG XML, hub rows; the original's own files where present."""

import json
import os
from pathlib import Path

import pytest

from prefixlib.errors import UserError
from prepare.convert import convert_documents, find, hub_rows
from prepare.e2e_text import csv_lines, linearise_meaning, tokenise
from prepare.webnlg_xml import webnlg_json, xml_files

DATA = os.environ.get("PREFIX_TUNING_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="PREFIX_TUNING_DATA is not set")

# raw text -> the original's src1 form, each a case that occurs there
TOKENISED = {
    "Alimentum isn't family-friendly.": "Alimentum isn 't family - friendly .",
    "It's £20-£25, near the Arms'.": "It 's £ 20- £ 25 , near the Arms ' .",
    "A range of £20-25. It is 5-star!": "A range of £ 20 - 25 . It is 5 - star !",
    "The Punter- a high- priced pub": "The Punter- a high- priced pub",
    "'Strada' is a pub. rated 'average'": "'Strada ' is a pub . rated ' average'",  # quotes at a sentence's edge
    "rated 5 out of 5. it is near Avalon": "rated 5 out of 5. it is near Avalon",
    "less than £20. its rating is low": "less than £ 20 . its rating is low",
    "costs £30.99, or more than £30,": "costs £ 30.99 , or more than £ 30,",
    "food .price is high..  ok...but near St. John's": "food .price is high .. ok ... but near St. John 's",
    "3/5, about 1,000 people; 30+": "3 / 5 , about 1,000 people ; 30 +",
    'the "Eagle",it\'s here': 'the " Eagle " , it \'s here',
}


@pytest.mark.parametrize("text", TOKENISED)
def test_tokenise(text):
    assert tokenise(text) == TOKENISED[text]


def test_meaning_is_linearised_in_order_with_the_originals_names():
    meaning = "name[The Mill], eatType[pub], priceRange[£20-25], customer rating[low], familyFriendly[no], near[Café]"
    assert linearise_meaning(meaning) == (
        "name : The Mill | Type : pub | price : £ 20 - 25 | customer rating : low | family friendly : no | near : Café"
    )
    for bad in ("name The Mill", "name[The Mill] eatType[pub]", "name[The Mill], eatType"):
        with pytest.raises(ValueError, match=r"expected key\[value\]"):
            linearise_meaning(bad)


def test_csv_rows_become_lines_in_file_order(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('MR,ref\r\nname[B],"B, a pub."\r\n"name[A], eatType[pub]","A\nis a pub."\r\n')
    assert list(csv_lines(path)) == ["name : B||B , a pub . ", "name : A | Type : pub||A is a pub . "]


BAD_TABLES = {
    "columns": ("meaning,text\na,b\n", "t.csv:1: expected the columns mr and ref, found ['meaning', 'text']"),
    "no text": ("mr,ref\nname[A],A.\nname[B]\n", "t.csv:3: expected a meaning and a text, found 'name[B]', None"),
    "meaning": ("mr,ref\nname A,A.\n", "t.csv:2: expected key[value], key[value], …, found 'name A'"),
    "latin-1": ("mr,ref\nname[Café],A.\n".encode("latin-1"), "t.csv: not UTF-8 text"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_table_names_file_and_line(case, tmp_path):
    content, message = BAD_TABLES[case]
    path = tmp_path / "t.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        list(csv_lines(path))
    assert message in str(caught.value)


@needs_data
def test_devset_gives_the_originals_valid_file_line_for_line():
    folder = Path(DATA) / "e2e_data"
    expected = (folder / "src1_valid.txt").read_text(encoding="utf-8").split("\n")[:-1]
    ours = list(csv_lines(folder / "csv" / "devset.csv"))
    assert len(ours) == len(expected) == 4672
    assert [pair for pair in zip(ours, expected, strict=True) if pair[0] != pair[1]] == []


@needs_data
def test_dev_xml_gives_the_originals_json_byte_for_byte():
    folder = Path(DATA) / "webnlg_challenge_2017"
    assert len(xml_files(folder / "dev")) == 52
    assert webnlg_json(folder / "dev").encode() == (folder / "dev.json").read_bytes()


ENTRY = (
    '<benchmark><entries><entry category="{category}" eid="Id1" size="1">'
    "<originaltripleset><otriple>A_é | p | B</otriple></originaltripleset>"
    "<modifiedtripleset><mtriple>A_é | q | B</mtriple></modifiedtripleset>"
    '<lex comment="good" lid="Id1">A &amp; B.</lex></entry></entries></benchmark>'
)


def write_xml(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(ENTRY.format(category=path.stem), encoding="utf-8")
    return folder


def test_xml_files_are_taken_by_number_of_triples_then_by_name(tmp_path):
    write_xml(tmp_path, "10triples/A.xml", "2triples/B.xml", "2triples/A.xml", "1triples/C.xml")
    entries = json.loads(webnlg_json(tmp_path))["entries"]
    assert [entry[str(n)]["category"] for n, entry in enumerate(entries, 1)] == ["C", "A", "B", "A"]
    assert entries[3]["4"] == {
        "category": "A",
        "dbpedialinks": [],
        "lexicalisations": [{"comment": "good", "lang": "", "lex": "A & B.", "xml_id": "Id1"}],
        "links": [],
        "modifiedtripleset": [{"object": "B", "property": "q", "subject": "A_é"}],
        "originaltriplesets": {"originaltripleset": [[{"object": "B", "property": "p", "subject": "A_é"}]]},
        "shape": "NA",
        "shape_type": "NA",
        "size": "1",
        "xml_id": "Id1",
    }


def test_test_folder_is_its_one_file_with_texts(tmp_path):
    write_xml(tmp_path, "testdata_no_lex.xml", "testdata_unseen_with_lex.xml", "testdata_with_lex.xml")
    assert xml_files(tmp_path) == [tmp_path / "testdata_with_lex.xml"]


def test_bad_xml_names_file_and_place(tmp_path):
    (tmp_path / "a.xml").write_text("<benchmark>\n<entries>\n")
    with pytest.raises(UserError, match=r"a\.xml:3: not XML"):
        webnlg_json(tmp_path)
    (tmp_path / "a.xml").write_text(ENTRY.format(category="A").replace("A_é | q | B", "A_é q B"))
    with pytest.raises(UserError, match=r"a\.xml: entry Id1: expected subject \| property \| object, found 'A_é q B'"):
        webnlg_json(tmp_path)


def test_hub_rows_become_one_line_a_document(tmp_path):
    rows = [
        {"document": "First line.\nSecond\r\n line. ", "summary": "A summary.", "id": "1"},
        {"document": "", "summary": "Nothing to summarise."},
        {"document": "Third.", "summary": "Three.\nFour."},
    ]
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.json").write_text(json.dumps([{"article": "A", "highlights": "H"}]))
    made = tmp_path / "made"
    made.mkdir()
    assert convert_documents(tmp_path, "valid", made / "val.source") == made / "val.source"
    assert (made / "val.source").read_text() == "First line. Second line.\nThird.\n"
    assert (made / "val.target").read_text() == "A summary.\nThree. Four.\n"
    assert list(hub_rows(tmp_path / "test.json")) == [("A", "H")]
    assert convert_documents(tmp_path, "train", made / "train.source") is None


def test_bad_hub_rows_name_file_and_row(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"document": "a", "summary": "b"}\n\n{"document": "a", "title": "b"}\n')
    with pytest.raises(UserError, match=r"train\.jsonl: row 2: expected the texts document\+summary or article\+highl"):
        list(hub_rows(path))
    path.write_text('{"document": "a", "summary": "b"}\n{"document\n')
    with pytest.raises(UserError, match=r"train\.jsonl:2: not JSON"):
        list(hub_rows(path))


def test_find_takes_the_shallowest_and_refuses_to_guess(tmp_path):
    for name in ("a.csv", "deep/a.csv", "x/b.csv", "y/b.csv", ".hidden/c.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find(tmp_path, "none.csv", "a.csv") == tmp_path / "a.csv"
    assert find(tmp_path / "deep", "deep") == tmp_path / "deep"
    assert find(tmp_path, "c.csv") is None
    with pytest.raises(UserError, match=r"both .*x/b\.csv and .*y/b\.csv are there"):
        find(tmp_path, "b.csv")
