"""METEOR's words and alignment on a small table of our own: no package and no Java needed."""

import gzip
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from prefixlib.metrics import meteor, meteor_paraphrases, meteor_text
from prefixlib.metrics.meteor_align import EXACT, SYNONYM, find_matches, segment_statistics
from prefixlib.metrics.meteor_text import Tables


@pytest.fixture(scope="module")
def jar(tmp_path_factory) -> Path:
    """Tables in the official files' format with a handful of words, as the package has them beside the jar."""
    folder = tmp_path_factory.mktemp("meteor")
    with zipfile.ZipFile(folder / "meteor-1.5.jar", "w") as jar:
        jar.writestr("function/english.words", "the\na\nof\n.\n")
        jar.writestr("nonbreaking/english.prefixes", "# abbreviations\nDr\nNo #NUMERIC_ONLY#\n")
        jar.writestr("synonym/english.synsets", "big\n1 2\nlarge\n2 3\npub\n4\ntavern\n4\nox\n5\nbull\n5\n")
        jar.writestr("synonym/english.exceptions", "ox\noxen\n")
    (folder / "data").mkdir()
    pairs = ["0.1\nclose to\nnear\n", "0.2\nclose to\nnext to\n", "0.3\nriver bank\nriverside\n"]
    (folder / "data" / "paraphrase-en.gz").write_bytes(gzip.compress("".join(pairs).encode()))
    return folder / "meteor-1.5.jar"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory) -> Iterator[Path]:
    """A cache folder of our own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield Path(os.environ["XDG_CACHE_HOME"]) / "prefix-tuning"


@pytest.fixture(scope="module")
def tables(jar, cache) -> Tables:
    loaded = Tables(jar)
    loaded.load_paraphrases([["close", "to"], ["near"], ["river", "bank"], ["riverside"]])
    return loaded


def score(tables, hypothesis: str, reference: str) -> tuple[list[int], float]:
    """(module matches, function words included, chunks; score) of one pair."""
    row = segment_statistics(tables.normalise(hypothesis), tables.normalise(reference), tables)
    rows = meteor.without_perfect_chunks(np.array([row], dtype=float))
    return [sum(row[i : i + 4]) for i in (4, 8, 12, 16)] + [row[20]], float(meteor.combine(rows[0]))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The U.S.-based Dr. Who, No. 5 (1,000)...", "the us based dr. who , no. 5 ( 1,000 ) ..."),
        ("It's Alimentum's, isn't it? Ltd. is. No. Yes", "it 's alimentum 's , isn 't it ? ltd. is . no . yes"),
        ("“family-friendly” – 1990's café", '" family friendly " - 1990 \'s café'),
        ("", ""),
    ],
)
def test_words(tables, text, words):
    assert " ".join(tables.normalise(text)) == words


def test_a_text_scores_one_against_itself(tables):
    assert score(tables, "the pub is big", "The pub is big") == ([8, 0, 0, 0, 1], 1)


def test_modules(tables):
    assert score(tables, "zebras", "zebra")[0] == [0, 2, 0, 0, 1]
    assert score(tables, "big oxen", "large bulls")[0] == [0, 0, 4, 0, 1]  # by exception and by ending
    assert score(tables, "near riverside", "close to river bank")[0] == [0, 0, 0, 6, 1]
    assert score(tables, "next to", "close to")[0] == [2, 0, 0, 0, 1]  # "next" is not in the vocabulary read


def test_half_words_that_compete_are_cut_off(tables):
    # stem and synonym both match, so neither is certain; half a word adds nothing and a chunk costs (so does the jar)
    assert score(tables, "pubs", "pub") == ([0, 0, 0, 0, 0], 0)


def test_chunks_and_score_by_hand(tables):
    matches, value = score(tables, "big pub the", "the big pub")
    # all words match, in 2 chunks: penalty 0.6 * (2 / 3) ** 0.2
    assert matches == [6, 0, 0, 0, 2]
    assert value == pytest.approx(1 - 0.6 * (2 / 3) ** 0.2)


def test_precision_and_recall_weigh_content_words(tables):
    # matched: "the" (function, 0.25) and "pub" (content, 0.75) of the / pub / zebra against the / pub
    _, value = score(tables, "the pub zebra", "the pub")
    precision, recall = 1 / 1.75, 1
    f_mean = precision * recall / (0.85 * precision + 0.15 * recall)
    assert value == pytest.approx(f_mean * (1 - 0.6 * (1 / 2) ** 0.2))


def test_ambiguous_words_go_where_the_chunks_are_fewest(tables):
    # the first "the" of the reference must go with "the pub", though another "the" stands nearer
    matches, _ = score(tables, "the x the pub", "the pub y the")
    assert matches == [6, 0, 0, 0, 2]


def test_nothing_in_common_and_nothing_at_all(tables):
    assert score(tables, "zebra", "pub") == ([0, 0, 0, 0, 0], 0)
    assert score(tables, "", "pub")[1] == 0
    assert score(tables, "pub", "")[1] == 0
    assert score(tables, "", "")[1] == 0


def test_the_best_reference_counts(jar, monkeypatch):
    monkeypatch.setattr(meteor, "find_jar", lambda: jar)
    rows = meteor.statistics(["the pub", "x"], [["zebra", "the pub", ""], []])
    assert rows[0].tolist() == [2, 2, 1, 1, 1, 1, 1, 1, *[0] * 12, 0, 2, 2]
    assert rows[1, :2].tolist() == [1, 0]


def test_of_equally_good_references_the_first_counts(jar, monkeypatch):
    # neither matches: both score 0, and the corpus score depends on which length is summed (the jar takes the first)
    monkeypatch.setattr(meteor, "find_jar", lambda: jar)
    rows = meteor.statistics(["zebra", "zebra"], [["pub", "big ox"], ["big ox", "pub"]])
    assert rows[:, :2].tolist() == [[1, 1], [1, 2]]


def test_short_and_long_outputs_by_hand(tables):
    # "pub" of "pub tavern ox": precision 1, recall 1/3, one chunk of one matched word: penalty 0.6.
    # F = P R / (0.85 P + 0.15 R) = (1/3) / (0.85 + 0.05) = 0.370370; times 0.4
    assert score(tables, "pub", "pub zebra zoo")[1] == pytest.approx(0.4 * (1 / 3) / 0.9)
    # the other way round: P 1/3, R 1: (1/3) / (0.85 / 3 + 0.15) = 0.769231
    assert score(tables, "pub zebra zoo", "pub")[1] == pytest.approx(0.4 * (1 / 3) / (0.85 / 3 + 0.15))


def test_texts_of_function_words_alone(tables):
    # both words weigh 0.25: "the of" against "of a": P = R = 1/2, one chunk of one word: 0.5 * 0.4
    assert score(tables, "the of", "of a")[1] == pytest.approx(0.2)


def test_a_repeated_word_matches_once(tables):
    # P 1/3, R 1; one of the three is used
    matches, value = score(tables, "pub pub pub", "pub")
    assert matches == [2, 0, 0, 0, 1]
    assert value == pytest.approx(0.4 * (1 / 3) / (0.85 / 3 + 0.15))


def test_equal_texts_are_matched_word_for_word_only(tables):
    # "big" and "large" are synonyms, which would compete with the words themselves
    matches = find_matches(["big", "large"], ["big", "large"], tables)
    assert [[match.module for match in each] for each in matches] == [[EXACT], [EXACT]]
    matches = find_matches(["big", "large"], ["large", "big"], tables)
    assert [[match.module for match in each] for each in matches] == [[EXACT, SYNONYM], [EXACT, SYNONYM]]


PAIRS = [("near", "close to"), ("near", "next to"), ("close to", "near"), ("near", "by")]  # "near" comes twice
PHRASES = [("near",), ("close", "to"), ("by",), ("far",), ("next",)]
FOUND = {("near",): [("close", "to"), ("by",)], ("close", "to"): [("near",)]}


@pytest.fixture
def table(tmp_path, monkeypatch) -> Path:
    """A paraphrase table, and a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "paraphrase-en.gz"
    path.write_bytes(gzip.compress("".join(f"0.5\n{a}\n{b}\n" for a, b in PAIRS).encode()))
    return path


def test_pairs_are_found_among_the_phrases_in_the_tables_order(table):
    # "next to" is not among the phrases, "far" and "next" are not in the table
    assert meteor_paraphrases.open_paraphrases(table).among(PHRASES) == FOUND
    assert meteor_paraphrases.open_paraphrases(table).among([]) == {}


def test_phrases_with_the_same_hash_are_told_apart(table, monkeypatch):
    monkeypatch.setattr(meteor_paraphrases, "_hash", lambda phrase: 7)
    assert meteor_paraphrases.open_paraphrases(table).among(PHRASES) == FOUND


def test_the_table_is_read_once_and_then_mapped(table, monkeypatch):
    first = meteor_paraphrases.open_paraphrases(table)
    monkeypatch.setattr(meteor_paraphrases, "_build", None)  # reading it again would fail
    second = meteor_paraphrases.open_paraphrases(table)
    assert isinstance(first.text, np.memmap)
    assert isinstance(second.text, np.memmap)
    assert second.among(PHRASES) == FOUND


def test_another_table_has_another_index(table):
    meteor_paraphrases.open_paraphrases(table)
    table.write_bytes(gzip.compress(b"0.5\nnear\nfar\n"))
    assert meteor_paraphrases.open_paraphrases(table).among(PHRASES) == {("near",): [("far",)]}


def test_a_damaged_index_is_made_anew(table):
    folder = meteor_paraphrases.index_folder(table)
    meteor_paraphrases.open_paraphrases(table)
    (folder / "text.npy").write_bytes((folder / "text.npy").read_bytes()[:-20])
    assert meteor_paraphrases.open_paraphrases(table).among(PHRASES) == FOUND
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]  # no scratch folder is left


def test_an_index_of_zeros_after_a_power_cut_is_made_anew_with_a_word(table, caplog):
    folder = meteor_paraphrases.index_folder(table)
    for name in ("text.npy", "spans.npy", "hashes.npy"):
        meteor_paraphrases.open_paraphrases(table)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:128] + bytes(len(content) - 128))  # npy's head of 128 bytes stays
        caplog.clear()
        assert meteor_paraphrases.open_paraphrases(table).among(PHRASES) == FOUND
        (line,) = caplog.messages
        assert f"{folder} is damaged ({name} has changed since it was written): METEOR's tables are read anew" in line
        assert (folder / name).read_bytes() == content


def test_without_a_cache_folder_the_tables_stay_in_memory(table, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert meteor_paraphrases.open_paraphrases(table).among(PHRASES) == FOUND
    assert "cannot be written" in caplog.text


def test_the_tables_are_loaded_once_per_process(jar, monkeypatch):
    monkeypatch.setattr(meteor, "find_jar", lambda: jar)
    meteor_text.load_tables.cache_clear()
    first = meteor.statistics(["near"], [["close to"]])
    monkeypatch.setattr(meteor_text.Tables, "__init__", None)  # loading them again would fail
    assert meteor.statistics(["zebra"], [["pub"]])[0, 0] == 1
    assert (meteor.statistics(["near"], [["close to"]]) == first).all()  # other texts in between change nothing
    assert first[0, 16:20].tolist() == [1, 2, 0, 0]  # one word of the hypothesis, two of the reference, by paraphrase
