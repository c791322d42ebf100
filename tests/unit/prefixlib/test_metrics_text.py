"""What the scorers read: PTB tokens, normalised WebNLG and DART text, files in odd states."""

import pytest

from prefixlib.metrics import normalise
from prefixlib.metrics.files import read_lines, read_references
from prefixlib.metrics.ptb import tokens
from prefixlib.system.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [  # expected: Stanford PTBTokenizer 3.4.1 (-lowerCase), punctuation dropped as COCO's wrapper does
        ("The Vaults, near Café Adriatic, has a 5-star rating.", "the vaults near café adriatic has a 5-star rating"),
        ("Prices start at £30 (or £20-25).", "prices start at # 30 -lrb- or # 20-25 -rrb-"),
        ("It isn't family-friendly; it's £10.50!", "it is n't family-friendly it 's # 10.50"),
        ("In the city center., a place", "in the city center. a place"),
        ("5out of 5... rated 3of5", "5out of 5 rated 3of5"),
        ('They cannot say "no" - not at 18L/36R.', "they can not say no not at 18l/36r"),
        ("", ""),
        # what the published outputs do not have, but an output may
        ("Cheap food, etc.", "cheap food etc."),
        (
            "It is by Mr. X (Co. Ltd.). Is it cheap? No. It is not",
            "it is by mr. x -lrb- co. ltd. -rrb- is it cheap no it is not",
        ),
        ("No. 5 on 1st Ave. is no.1", "no. 5 on 1st ave. is no. 1"),
        ("rated A. The pub, rated A. there", "rated a the pub rated a. there"),
        ("Great!! Really?! Yes!", "great !! really ?! yes"),
        ("5 stars*** and a *", "5 stars *** and a *"),
        ("fish 'n' chips since the '90s", "fish 'n' chips since the '90s"),
        ("a B&B, M&S & x.com <unk>", "a b&b m&s & x.com <unk>"),
    ],
)
def test_ptb_tokens(text, expected):
    assert " ".join(tokens(text.replace("\\", ""))) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [  # as WebNLG's official hypothesis and reference files read
        ("Adolfo Suárez Madrid–Barajas Airport's 18L/36R.", "adolfo suarez madrid - barajas airport ' s 18l / 36r ."),
        ("A.C. Milan  (İstanbul, Łódź)", "a . c . milan ( istanbul , lodz )"),
        ("", ""),
    ],
)
def test_webnlg_text(text, expected):
    assert normalise.webnlg_hypothesis(text) == expected
    assert normalise.webnlg_reference(text) == expected
    assert normalise.webnlg_hypothesis(expected) == expected  # already normalised files stay as they are


def test_webnlg_references_become_ascii_after_the_split():
    assert normalise.webnlg_hypothesis("½ km") == "1 / 2 km"
    assert normalise.webnlg_reference("½ km") == "1/2 km"


def test_ascii_of_accents_and_signs():
    # Unidecode 1.4's spellings
    assert normalise.to_ascii("éüßøæłđıİŞț—“”…€£†♀√") == 'eussoaeldiISt--""...EURPS++'[:-1]


def test_dart_text_keeps_accents_and_three_references():
    hypotheses, references = normalise.dart(["Café No.1"], [["A", "B", "C", "D"]])
    assert (hypotheses, references) == (["café no . 1"], [["a", "b", "c"]])
    assert normalise.dart(["x"], [["A"]])[1] == [["a", "", ""]]


def write(path, data: bytes):
    path.write_bytes(data)
    return path


def test_lines_with_crlf_bom_and_odd_separators(tmp_path):
    path = write(tmp_path / "a", "\ufeffone \r\n\r\ntwo\u2028still two\nthree".encode())
    assert read_lines(path, "--hypotheses") == ["one", "", "two\u2028still two", "three"]


def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path):
    path = write(tmp_path / "a", b"one\ntwo\ncaf\xe9\n")
    with pytest.raises(UserError, match=r"a:3: byte 0xe9 is not UTF-8"):
        read_lines(path, "--hypotheses")


@pytest.mark.parametrize("data", [b"", b"\n\n"])
def test_empty_and_missing_files_are_named(tmp_path, data):
    with pytest.raises(UserError, match="--hypotheses .*a: the file is empty"):
        read_lines(write(tmp_path / "a", data), "--hypotheses")
    with pytest.raises(UserError, match="--hypotheses .*none: no such file"):
        read_lines(tmp_path / "none", "--hypotheses")


def test_references_in_groups_per_line_and_parallel(tmp_path):
    grouped = write(tmp_path / "gold", b"a\nb\n\nc\n\n\nd")
    assert read_references([grouped], 4) == [["a", "b"], ["c"], [], ["d"]]
    single = write(tmp_path / "single", b"a\n\nc\n")
    assert read_references([single], 3) == [["a"], [""], ["c"]]
    other = write(tmp_path / "other", b"x\ny\n\n")
    assert read_references([single, other], 3) == [["a", "x"], ["", "y"], ["c", ""]]
    with pytest.raises(UserError, match=r"single has 3 lines but .*gold has 7 lines"):
        read_references([single, grouped], 3)
