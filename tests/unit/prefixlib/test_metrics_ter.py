"""TER on cases small enough to count by hand, and its batched table against a plain one."""

import random

import pytest

from prefixlib.metrics import ter


def edits(hypothesis: str, reference: str) -> int:
    return ter.edit_counts([(hypothesis.split(), reference.split())])[0]


@pytest.mark.parametrize(
    ("hypothesis", "reference", "expected"),
    [
        ("a b c", "a b c", 0),
        ("a x c d", "a b c d", 1),  # substitution
        ("a b c", "a b x c", 1),  # deletion
        ("a b x c", "a b c", 1),  # insertion
        ("b c a", "a b c", 1),  # one shift
        ("d e f a b c", "a b c d e f", 1),  # a block moves as one
        ("a b", "b a", 1),
        ("", "a b c", 3),
        ("a b", "", 2),
        ("x y z", "a b c", 3),
    ],
)
def test_edits_by_hand(hypothesis, reference, expected):
    assert edits(hypothesis, reference) == expected


def test_example_of_the_ter_paper():
    # Snover et al. 2006, section 2.2: one shift, two substitutions and one insertion make 4 edits for 13 words
    hypothesis = "THIS WEEK THE SAUDIS denied information published in the new york times"
    reference = "SAUDI ARABIA denied THIS WEEK information published in the AMERICAN new york times"
    rows = ter.METRIC.statistics([hypothesis], [[reference]])
    assert rows.tolist() == [[4, 13]]
    assert ter.METRIC.combine(rows[0]) == pytest.approx(0.3077, abs=1e-4)


def test_nearest_reference_and_mean_length():
    rows = ter.METRIC.statistics(["A B c"], [["x y z w v", "a b", ""]])
    assert rows.tolist() == [[1, 3.5]]  # the empty reference is none


def test_no_reference_at_all():
    assert ter.METRIC.statistics(["a b", ""], [[""], []]).tolist() == [[2, 0], [0, 0]]


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (-1, "c d a b e f"),
        (0, "a c d b e f"),
        (4, "a b e c d f"),
        (5, "a b e f c d"),
        (2, "a b c d e f"),
        (3, "a b e c d f"),
    ],
)
def test_shifted_blocks(place, expected):
    # words 2..3 of six; inside the block itself (2, 3) tercom lets that many following words pass
    words = dict(enumerate("abcdef"))
    moved = ter.shifted(tuple(words), 2, 3, place)
    assert " ".join(words[word] for word in moved) == expected


def plain_distance(a, b) -> int:
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            previous, row[j] = row[j], min(previous + (left != right), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def test_batched_edit_distance_equals_the_plain_one():
    # Up to 20 words the beam cannot bite; lengths are mixed so that padding on either side would show
    generator = random.Random(0)
    rows = [tuple(tuple(generator.choices(range(6), k=generator.randint(1, 20))) for _ in range(2)) for _ in range(300)]
    assert ter.edit_distances(rows)[0] == [plain_distance(*row) for row in rows]


def test_beam_prunes_as_tercoms_does():
    # The five words match 30 deletions away, in cells over 20 worse than the best of their column: they are given up,
    # and 5 substitutions and 30 deletions remain. 15 deletions away nothing is given up.
    reference = tuple(range(35))
    assert ter.edit_distances([(reference[30:], reference)])[0] == [35]
    assert ter.edit_distances([(reference[15:], reference)])[0] == [15]


def words(letter: str, count: int) -> list[str]:
    return [f"{letter}{i}" for i in range(count)]


def test_blocks_of_more_than_ten_words_move_in_parts():
    others = words("x", 15)  # 15 words are two moves as well, so the block of 11 is not cheaper moved the other way
    for size, expected in ((10, 1), (11, 2), (20, 2)):
        block = words("b", size)
        assert ter.edit_counts([(block + others, others + block)]) == [expected], size


def test_words_move_over_fifty_others_at_most():
    # further away a word must be deleted and inserted. The place in front of the first word is number -1, so that to
    # the left one word less is passed.
    def moved(count):
        others = words("x", count)
        return ter.edit_counts([(["w", *others], [*others, "w"]), ([*others, "w"], ["w", *others])])

    assert (moved(49), moved(50), moved(51)) == ([1, 1], [1, 2], [2, 2])


def test_equally_near_references_and_longer_ones():
    # one edit against either reference; the mean length is 3. Many edits: more than there are reference words.
    assert ter.METRIC.statistics(["a b c"], [["a b", "a b c d"]]).tolist() == [[1, 3]]
    rows = ter.METRIC.statistics(["a b c d e"], [["x"]])
    assert rows.tolist() == [[5, 1]]
    assert ter.METRIC.combine(rows[0]) == 5  # not cut off at 1


def test_without_any_reference_word_ter_is_one_or_zero():
    assert ter.METRIC.combine(ter.METRIC.statistics(["a b"], [[""]])[0]) == 1
    assert ter.METRIC.combine(ter.METRIC.statistics([""], [[]])[0]) == 0


def test_segments_do_not_disturb_each_other():
    generator = random.Random(2)
    pairs = [
        tuple([generator.choice("abcdefghij") for _ in range(generator.randint(1, 25))] for _ in range(2))
        for _ in range(60)
    ]
    assert ter.edit_counts(pairs) == [ter.edit_counts([pair])[0] for pair in pairs]
