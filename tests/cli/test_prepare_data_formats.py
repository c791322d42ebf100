"""The conversions behind prepare_data: E2E csv, WebNLG XML, hub rows; the original's own files where present."""

import json
import os
from pathlib import Path

import datasets
import pytest

from prefixlib.data.readers import read_webnlg
from prefixlib.system.errors import UserError
from prepare.convert import convert_documents, convert_e2e, convert_webnlg, find, hub_rows
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
    with pytest.raises(UserError, match=r"contains both .*x/b\.csv and .*y/b\.csv; name the folder"):
        find(tmp_path, "b.csv")


RUSSIAN = ENTRY.replace("</entry>", '<lex comment="good" lang="ru" lid="Id2">А.</lex></entry>')


def test_texts_of_another_language_are_left_out(tmp_path, caplog):
    """WebNLG 3.0 has Russian texts, which would become English references."""
    folder = tmp_path / "dev"
    folder.mkdir()
    (folder / "a.xml").write_text(RUSSIAN.format(category="A"), encoding="utf-8")
    for lang, texts in (("en", ["A & B."]), ("ru", ["А."])):
        (entry,) = json.loads(webnlg_json(folder, lang))["entries"]
        assert [lex["lex"] for lex in entry["1"]["lexicalisations"]] == texts
    assert caplog.messages[0] == f"{folder}: 1 of 2 texts left out: they are not in the language en"
    with pytest.raises(UserError, match="--lang de: .*dev has no text in it"):
        webnlg_json(folder, "de")
    (tmp_path / "made").mkdir()
    made = convert_webnlg(tmp_path, "valid", tmp_path / "made" / "dev.json")
    assert "А." not in made.read_text(encoding="utf-8")
    assert webnlg_json(folder, "en") == made.read_text(encoding="utf-8")


def test_texts_of_another_language_in_json(tmp_path):
    lexes = [{"lex": "A.", "comment": "good", "lang": "en"}, {"lex": "А.", "comment": "good", "lang": "ru"}]
    triples = [{"subject": "A", "property": "b", "object": "C"}]
    path = tmp_path / "dev.json"
    path.write_text(json.dumps({"entries": [{"1": {"modifiedtripleset": triples, "lexicalisations": lexes}}]}))
    with pytest.raises(UserError, match=r"dev.json: entry 1: texts in several languages \(en, ru\); .* --lang en"):
        list(read_webnlg(path))
    made = tmp_path / "made"
    made.mkdir()
    assert convert_webnlg(path.parent, "valid", made / "dev.json", "ru") == made / "dev.json"
    assert [record.target for record in read_webnlg(made / "dev.json")] == ["А."]
    (made / "dev.json").unlink()
    path.write_text(json.dumps({"entries": [{"1": {"modifiedtripleset": triples, "lexicalisations": lexes[:1]}}]}))
    assert convert_webnlg(path.parent, "valid", made / "dev.json") == path  # nothing to leave out


def test_the_hubs_parquet(tmp_path):
    rows = [{"document": f"Text\n{n}.", "summary": f"Sum {n}.", "id": str(n)} for n in range(4)]
    for n in range(2):
        name = f"data/validation-0000{n}-of-00002.parquet"
        (tmp_path / "data").mkdir(exist_ok=True)
        datasets.Dataset.from_list(rows[2 * n : 2 * n + 2]).to_parquet(tmp_path / name)
    datasets.Dataset.from_list(rows[:1]).to_parquet(tmp_path / "default" / "test" / "0000.parquet")
    datasets.Dataset.from_list(rows[3:]).to_parquet(tmp_path / "train.parquet")
    made = tmp_path / "made"
    made.mkdir()
    for split, name, wanted in (("valid", "val", rows), ("test", "test", rows[:1]), ("train", "train", rows[3:])):
        assert convert_documents(tmp_path, split, made / f"{name}.source") == made / f"{name}.source"
        texts = (made / f"{name}.source").read_text(), (made / f"{name}.target").read_text()
        assert texts[0] == "".join(row["document"].replace("\n", " ") + "\n" for row in wanted)
        assert texts[1] == "".join(row["summary"] + "\n" for row in wanted)
    (tmp_path / "data/validation-00001-of-00002.parquet").unlink()
    with pytest.raises(UserError, match=r"1 of 00002 files validation-\*.parquet; get them all"):
        convert_documents(tmp_path, "valid", made / "val.source")


def test_the_cleaned_e2e_csv(tmp_path):
    names = {"train": "train-fixed.no-ol.csv", "valid": "devel-fixed.no-ol.csv", "test": "test-fixed.csv"}
    for split, name in names.items():
        (tmp_path / name).write_text(f"orig_mr,ref,mr\nname[X],{split} is.,name[{split}]\n")
        made = convert_e2e(tmp_path, split, tmp_path / f"{split}.txt")
        assert made.read_text() == f"name : {split}||{split} is . \n"
    path = tmp_path / "hub.csv"
    path.write_text("meaning_representation,human_reference\nname[A],A is.\n")
    assert list(csv_lines(path)) == ["name : A||A is . "]
    (tmp_path / "devset.csv").write_text("mr,ref\nname[A],A is.\n")
    with pytest.raises(
        UserError, match=r"contains both .*devset.csv and .*devel-fixed.no-ol.csv; name the folder of one"
    ):
        convert_e2e(tmp_path, "valid", tmp_path / "valid.txt")
