"""BLEU, NIST, ROUGE-L, CIDEr and ROUGE on cases small enough to count by hand."""

import math
import random

import numpy as np
import pytest

from prefixlib.metrics import bleu, cider, nist, rouge, rouge_l
from prefixlib.metrics.base import Metric


def score(metric: Metric, hypotheses: list[str], references: list[list[str]]) -> float:
    return float(metric.scale * metric.combine(metric.statistics(hypotheses, references).sum(axis=0)))


def test_bleu_clips_repeated_words():
    # Papineni et al. 2002, section 2.1: "the" seven times against two references holding it at most twice: 2 of 7
    references = [["The cat is on the mat .", "There is a cat on the mat ."]]
    rows = bleu.MULTI.statistics(["the the the the the the the"], references)
    assert rows.tolist() == [[7, 7, 2, 0, 0, 0, 7, 6, 5, 4]]
    assert bleu.MULTI.combine(rows[0]) == 0


def test_bleu_counts_by_hand():
    # unigrams 5/6, bigrams 3/5, trigrams 1/4, no 4-gram of the first; the second segment brings 4-grams 1/1
    hypotheses, references = ["the cat sat on a mat", "a b c d"], [["the cat sat on the mat"], ["a b c d"]]
    rows = bleu.MULTI.statistics(hypotheses, references)
    assert rows.sum(axis=0).tolist() == [10, 10, 9, 6, 4, 2, 10, 8, 6, 4]
    expected = 100 * (9 / 10 * 6 / 8 * 4 / 6 * 2 / 4) ** 0.25
    assert score(bleu.MULTI, hypotheses, references) == pytest.approx(expected, abs=1e-9)


def test_bleu_brevity_penalty_takes_the_nearest_length_and_the_shorter_of_two():
    rows = bleu.MULTI.statistics(["a b c"], [["a b c d", "a b", "a b c d e"]])
    assert rows[0, 1] == 2
    same = np.array([8.0, 12, 8, 7, 6, 5, 8, 7, 6, 5])
    assert bleu.MULTI.combine(same) == pytest.approx(100 * math.exp(1 - 12 / 8))


def test_an_empty_reference_line_has_length_zero_as_in_multi_bleu():
    assert bleu.MULTI.statistics(["a b"], [["a b c d e", ""]])[0, 1] == 0
    assert bleu.MULTI.statistics(["a b"], [["a b c d e"]])[0, 1] == 5


def test_mteval_bleu_tokenises_and_ignores_case():
    assert score(bleu.MTEVAL, ["The Mill, near 1.5 km (cheap)."], [["the mill , near 1.5 km ( cheap ) ."]]) == (
        pytest.approx(100)
    )
    assert bleu.MTEVAL.statistics(["a,b"], [["a"]])[0, 0] == 3


def test_mteval_lower_cases_ascii_alone():
    # "CAFÉ" becomes "cafÉ", which is not "café": 4/5, 3/4, 2/3, 1/2, product 1/5
    assert score(bleu.MTEVAL, ["CAFÉ A B C D"], [["café a b c d"]]) == pytest.approx(100 * 0.2**0.25)
    assert score(nist.METRIC, ["É"], [["é"]]) == 0


def test_mteval_bleu_counts_halves_where_nothing_matches():
    # words 3/5; no pair of 4 matches: 1/2 of 4, no triple of 3: 1/4, no 4-gram of 2: 1/8. 3/5 * 1/8 * 1/12 * 1/16
    hypotheses, references = ["a b c d e"], [["a x b y c"]]
    assert score(bleu.MTEVAL, hypotheses, references) == pytest.approx(14.058533129758727, abs=1e-9)
    assert score(bleu.MULTI, hypotheses, references) == 0
    # no word matches at all: 1/2 of 2, 1/4 of 1, and nothing is long enough for the rest: (1/4 * 1/4) ** (1/4)
    assert score(bleu.MTEVAL, ["a b"], [["c d"]]) == pytest.approx(50)


def test_orders_longer_than_every_hypothesis():
    # mteval leaves them out of the product, multi-bleu has no match in them and gives 0
    assert score(bleu.MTEVAL, ["a b"], [["a b"]]) == pytest.approx(100)
    assert score(bleu.MULTI, ["a b"], [["a b"]]) == 0


@pytest.mark.parametrize("metric", [bleu.MULTI, bleu.MTEVAL])
def test_bleu_brevity_penalty_is_the_corpus(metric):
    # 4 of 8 words, then 8 of 4: 12 words against 12, no penalty though the first segment is short; all of its n-grams
    # match; of the second's 8, 7, 6, 5 match 4, 3, 2, 1: 8/12 * 6/10 * 4/8 * 2/6 = 1/15
    hypotheses, references = ["a b c d", "e f g h i j k l"], [["a b c d e f g h"], ["e f g h"]]
    assert score(metric, hypotheses, references) == pytest.approx(100 * (1 / 15) ** 0.25)
    # the first alone: exp(1 - 8/4), and precision 1
    assert score(metric, hypotheses[:1], references[:1]) == pytest.approx(100 * math.exp(-1))


def test_bleu_equals_sacrebleu_on_random_text():
    from sacrebleu.metrics import BLEU

    generator = random.Random(0)
    texts = [" ".join(generator.choices("abc", k=generator.randint(4, 12))) for _ in range(120)]
    hypotheses, first, second = texts[:40], texts[40:80], texts[80:]
    whole = BLEU(tokenize="none", smooth_method="none", force=True).corpus_score(hypotheses, [first, second]).score
    assert score(bleu.MULTI, hypotheses, [list(pair) for pair in zip(first, second, strict=True)]) == (
        pytest.approx(whole, abs=1e-9)
    )
    assert whole > 1


def test_nist_weighs_words_by_their_information():
    # a: log2(2/1) = 1 bit, b: 1 bit, "a b": log2(1/1) = 0 bits; (1 + 1) / 2 + 0 / 1 = 1
    assert score(nist.METRIC, ["a b"], [["a b"]]) == pytest.approx(1)


def test_nist_penalty_is_one_half_at_two_thirds_of_the_length():
    # each of three words carries log2(3) bits; two matched of two said: log2(3) * 0.5
    assert score(nist.METRIC, ["A b"], [["a b c"]]) == pytest.approx(math.log2(3) / 2)


def test_nist_counts_a_word_as_often_as_one_reference_has_it():
    # a: log2(4/2) = 1 bit; said twice, but no reference has it twice: 1 of 2
    assert score(nist.METRIC, ["a a"], [["a b", "a c"]]) == pytest.approx(0.5)


def test_nist_length_of_three_segments_with_unequal_numbers_of_references():
    # Hypotheses: 2 + 1 + 1 = 4 words. References: one of 4 words; two of 2 + 1 (the empty one is none); three of
    # 3 + 2 + 1: 13 words in 6 references of 3 segments. Ratio 4 * (6 / 3) / 13 = 8/13, so the penalty is
    # 0.5 ** (ln(8/13) / ln(1.5)) ** 2 = 0.5 ** (0.485508 / 0.405465) ** 2 = 0.370157.
    # (The mean length of each segment's references, 7.5 in all, would give the ratio 4 / 7.5; weighing each hypothesis
    # with its own number of references (2 * 1 + 1 * 2 + 1 * 3) / 13.)
    # Information of the matched words: a and b log2(13/1), c and e log2(13/3), of 4 words; "a b" log2(1/1), of 1.
    # (2 * 3.700440 + 2 * 2.115477) / 4 + 0 = 2.907958; times 0.370157 = 1.076402.
    hypotheses, references = ["a b", "c", "e"], [["a b c d"], ["c d", "c", ""], ["e f g", "e f", "e"]]
    rows = nist.METRIC.statistics(hypotheses, references)
    assert rows[:, :4].tolist() == [[2, 4, 1, 1], [1, 3, 2, 1], [1, 6, 3, 1]]
    assert score(nist.METRIC, hypotheses, references) == pytest.approx(1.0764019408086225, abs=1e-12)


def test_nist_has_no_bonus_for_length():
    # Five words against two: of them two matched, a and b with 1 bit each; the penalty stays 1. 2 / 5.
    assert score(nist.METRIC, ["a x b y z"], [["a b"]]) == pytest.approx(0.4)


def test_nist_ignores_segments_without_references_but_counts_them():
    # R / N = 1 / 2, so the ratio is 3 * (1 / 2) / 2 = 0.75; a and b carry 1 bit each, of 3 words; "a b" 0 bits
    penalty = 0.5 ** ((math.log(0.75) / math.log(1.5)) ** 2)
    assert score(nist.METRIC, ["a b", "c"], [["a b"], []]) == pytest.approx(penalty * 2 / 3)


def test_nist_takes_a_lone_zero_for_no_history_as_perl_does():
    # 6 words: "0" log2(6/2), a and b log2(6/1) each, together 6.754888 of 3. "0 a" would carry log2(2/1) = 1 bit, but
    # has log2(6/1) = 2.584963 as if it had no history; "a b" 0, of 2. "0 a b" log2(1/1). 2.251629 + 1.292481.
    assert score(nist.METRIC, ["0 a b"], [["0 a b", "0 c d"]]) == pytest.approx(3.5441104177484006)


def test_rouge_l_by_hand():
    # longest common subsequence 2: precision 2/2, recall 2/4, F with beta 1.2
    assert score(rouge_l.METRIC, ["a c"], [["a b c d"]]) == pytest.approx(2.44 * 0.5 / (0.5 + 1.44))


def test_rouge_l_takes_recall_and_precision_from_different_references():
    # "a b" has recall 1 against "a", precision 1 against "a b c d"
    assert score(rouge_l.METRIC, ["a b"], [["a b c d", "a"]]) == pytest.approx(1)


def test_rouge_l_without_words():
    # COCO takes a text without words for one empty word: it is the same as another such text and unlike every other
    assert rouge_l.METRIC.statistics(["", ".", "", "a", ""], [["!"], ["a", "..."], ["a b"], ["."], []])[
        :, 0
    ].tolist() == [
        *(1, 1, 0, 0),
        0,  # no reference at all
    ]


def test_common_subsequence_equals_the_textbook_table():
    generator = random.Random(1)
    for _ in range(200):
        a, b = (tuple(generator.choices("abcd", k=generator.randint(0, 90))) for _ in range(2))
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, left in enumerate(a):
            for j, right in enumerate(b):
                table[i + 1][j + 1] = table[i][j] + 1 if left == right else max(table[i][j + 1], table[i + 1][j])
        assert rouge_l.common_subsequence(a, b) == table[-1][-1]


def test_cider_of_the_references_themselves_is_ten():
    texts = ["a b c d", "e f g h"]
    assert score(cider.METRIC, texts, [[text] for text in texts]) == pytest.approx(10)


def test_cider_by_hand():
    # Two segments, so an n-gram of one of them has idf log 2 and one of both has 0. "a b" against "a c":
    # unigram cosine log2² / (sqrt(2) log2)² = 1/2, no common bigram, no longer n-grams: 10 * (1/2) / 4, nothing else.
    assert score(cider.METRIC, ["a b", "zz"], [["a c"], ["e f"]]) == pytest.approx(10 * 0.5 / 4 / 2)


def test_cider_punishes_length():
    # Six words said twice, so 11 bigrams against 5: exp(-(6²) / (2 * 6²)); counts are clipped to the reference's
    rows = cider.METRIC.statistics(["a b c d e f a b c d e f", "x"], [["a b c d e f"], ["u v"]])
    unigrams = 0.5  # min(2, 1) * 1 * 6 / (sqrt(6 * 4) * sqrt(6))
    longer = [5 / math.sqrt(21) / math.sqrt(5), 4 / math.sqrt(18) / 2, 3 / math.sqrt(15) / math.sqrt(3)]
    assert rows[0, 0] == pytest.approx(10 * math.exp(-0.5) * (unigrams + sum(longer)) / 4)


def test_cider_is_the_mean_over_references_not_the_best():
    # "a" is one of 2 segments' words (log 2) and equals the first reference; the second has no word of it: (1 + 0) / 2,
    # one order of four, times 10
    assert cider.METRIC.statistics(["a", "x"], [["a", "b c"], ["y"]])[:, 0].tolist() == [pytest.approx(1.25), 0]


def test_cider_of_one_segment_is_zero():
    # every n-gram is in every document, so idf = log(1/1) = 0 and all vectors are null
    assert score(cider.METRIC, ["a b c"], [["a b c"]]) == 0


def test_cider_weighs_words_of_all_segments_with_nothing():
    # "a" is in both segments: idf 0. "b" is the rest of the first: cosine 1 in unigrams; "a b" in pairs: 10 * 2 / 4.
    # The second says "a" alone: null against "a c"; the length differs by one pair, which does not matter then.
    assert cider.METRIC.statistics(["a b", "a"], [["a b"], ["a c"]])[:, 0].tolist() == [pytest.approx(5), 0]


def test_cider_has_no_cap_on_an_order_that_one_side_lacks():
    # "a" against "a b": one word, no pair, against one pair: unigrams log2 / (sqrt(2) log2), penalty exp(-1 / 72)
    expected = 10 / 4 * math.sqrt(0.5) * math.exp(-1 / 72)
    assert cider.METRIC.statistics(["a", "x"], [["a b"], ["y"]])[0, 0] == pytest.approx(expected)


def test_rouge_of_empty_texts_and_ties():
    for metric in rouge.METRICS:
        assert metric.statistics(["", "a b c", "a b c"], [["a"], ["", "a b c"], [""]])[:, 0].tolist() == [0, 1, 0]
    # precision 2/2 and recall 2/4 of the first, 2/2 and 2/3 of the second: the better F, 0.8
    rows = rouge.METRICS[0].statistics(["x y"], [["x y v w", "x y z"]])
    assert rows[0, 0] == pytest.approx(0.8)


def test_rouge_stems_and_takes_the_best_reference():
    values = {m.name: score(m, ["police killed the gunman"], [["x", "police kill the gunman"]]) for m in rouge.METRICS}
    assert values == {"ROUGE-1": 100, "ROUGE-2": 100, "ROUGE-L": 100}
    # Lin 2004, section 3: "the gunman kill police" shares 4 words, 1 of 3 bigrams and a subsequence of 2 of 4
    values = {m.name: score(m, ["the gunman kill police"], [["police kill the gunman"]]) for m in rouge.METRICS}
    assert values == {"ROUGE-1": 100, "ROUGE-2": pytest.approx(100 / 3), "ROUGE-L": 50}


@pytest.mark.parametrize("metric", [bleu.MULTI, bleu.MTEVAL, nist.METRIC, rouge_l.METRIC, cider.METRIC, *rouge.METRICS])
def test_empty_texts_are_scored_as_empty(metric):
    references = [["f g"], ["a b c d e"]]
    assert score(metric, ["", "a b c d e"], references) < score(metric, ["f g", "a b c d e"], references)
    assert score(metric, [""], [["a b"]]) == 0
    assert score(metric, ["a"], [[]]) == 0
