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


def test_nist_takes_the_mean_reference_length():
    assert nist.METRIC.statistics(["a"], [["a b", "a b c d"]])[0, :2].tolist() == [1, 3]


def test_rouge_l_by_hand():
    # longest common subsequence 2: precision 2/2, recall 2/4, F with beta 1.2
    assert score(rouge_l.METRIC, ["a c"], [["a b c d"]]) == pytest.approx(2.44 * 0.5 / (0.5 + 1.44))


def test_rouge_l_takes_recall_and_precision_from_different_references():
    # "a b" has recall 1 against "a", precision 1 against "a b c d"
    assert score(rouge_l.METRIC, ["a b"], [["a b c d", "a"]]) == pytest.approx(1)


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
