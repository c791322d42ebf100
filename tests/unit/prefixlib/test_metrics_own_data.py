"""The scores of the user's own pairs: sacrebleu's BLEU and chrF, rouge-score's ROUGE-L, exact match of answers."""

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from prefixlib.metrics import rouge, score_task
from prefixlib.metrics.tasks import measure

HYPOTHESES = [
    "The mill is by the river, and it is old.",
    "Prices start at £10;\nno - breakfast.",
    "Die Mühle steht am Fluß.",
    "",
    "a",
    "the the the the",
]
REFERENCES = [
    ["The mill stands by the river and is old.", "By the river there is an old mill."],
    ["Prices start at £10.\nNo breakfast."],
    ["Die alte Mühle steht am Fluss.", "Am Fluß steht die Mühle.", "Eine Mühle."],
    ["nothing here"],
    ["a"],
    ["the cat"],
]


def padded():
    """sacrebleu wants as many references for every text; it skips None."""
    most = max(map(len, REFERENCES))
    return [[texts[n] if n < len(texts) else None for texts in REFERENCES] for n in range(most)]


def test_bleu_and_chrf_are_sacrebleus():
    scores = score_task("text", HYPOTHESES, REFERENCES)
    assert scores["BLEU"] == pytest.approx(sacrebleu.corpus_bleu(HYPOTHESES, padded()).score, abs=1e-9)
    assert scores["chrF"] == pytest.approx(sacrebleu.corpus_chrf(HYPOTHESES, padded()).score, abs=1e-9)
    assert 20 < scores["BLEU"] < scores["chrF"] < 80


@pytest.mark.parametrize(
    ("hypotheses", "references"),
    [
        (["a b"], [["a b"]]),
        (["x y z u v"], [["a b c d e"]]),
        ([""], [["a"]]),
        (["a b c d e f", "a b"], [["a b c d q"], ["z"]]),
        (["A b c D"], [["a b c d"]]),
    ],
)
def test_odd_texts_are_scored_as_sacrebleu_scores_them(hypotheses, references):
    scores = score_task("text", hypotheses, references)
    columns = [[texts[0] for texts in references]]
    assert scores["BLEU"] == pytest.approx(sacrebleu.corpus_bleu(hypotheses, columns).score, abs=1e-9)
    assert scores["chrF"] == pytest.approx(sacrebleu.corpus_chrf(hypotheses, columns).score, abs=1e-9)


def test_rouge_l_is_rouge_scores_on_english_and_counts_other_scripts():
    pairs = [(HYPOTHESES[n], REFERENCES[n]) for n in (0, 1, 3, 4, 5)]
    scorer = RougeScorer(["rougeL"])
    expected = [100 * scorer.score_multi(references, text)["rougeL"].fmeasure for text, references in pairs]
    found = score_task("text", [text for text, _ in pairs], [references for _, references in pairs])["ROUGE-L"]
    assert found == pytest.approx(sum(expected) / len(expected))
    assert score_task("text", ["мельница у реки"], [["мельница на реке"]])["ROUGE-L"] == pytest.approx(100 / 3)


def test_exact_match_is_scored_whatever_the_length_of_the_texts():
    scores = score_task("text", ["yes", " no ", "No"], [["yes", "yeah"], ["no"], ["no"]])
    assert scores["exact match"] == pytest.approx(200 / 3)
    long = [["yes"], ["a text that is longer than what one would call an answer"]]
    assert score_task("text", ["yes", "a"], long)["exact match"] == 50
    assert [figure.name for figure in measure("text", ["yes", "a"], long, metrics=["exact match"])] == ["exact match"]


CHINESE = ["你的订单已经发货。", "请在五天内付款，谢谢"]


def test_texts_without_spaces_are_counted_by_letters():
    """Equal texts have the full score, and BLEU is sacrebleu's own for Chinese."""
    worse = ["你的订单没有发货。", "请在五天内付款"]
    references = [[text] for text in CHINESE]
    assert score_task("text", CHINESE, references)["BLEU"] == pytest.approx(100)
    found = score_task("text", worse, references)
    assert found["BLEU"] == pytest.approx(sacrebleu.corpus_bleu(worse, [CHINESE], tokenize="zh").score, abs=1e-6)
    assert 50 < found["ROUGE-L"] < 100


@pytest.mark.parametrize("text", ["Ваш заказ номер пять отправлен", CHINESE[0], "your order has been sent"])
@pytest.mark.parametrize("any_language", [True, False])
def test_validation_sees_any_script(text, any_language):
    assert rouge.sentence_scores(text, [text], any_language)["rouge2"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("hypothesis", "reference", "rouge_1", "rouge_2", "rouge_l"),
    [  # by hand: two of three words and one of two pairs; one of four words; half of the letters, in their order
        ("мельница у реки", "мельница у речки", 200 / 3, 50, 200 / 3),
        ("Der Müller Καλημέρα x", "Καλημέρα σε όλους σας", 25, 0, 25),
        ("你的订单 now", "你的订单已经发货", 800 / 13, 600 / 11, 800 / 13),
    ],
)
def test_rouge_of_summaries_in_other_scripts_counts_the_tokens_of_mode_text(
    hypothesis, reference, rouge_1, rouge_2, rouge_l
):
    found = score_task("xsum", [hypothesis], [[reference]])
    assert found == pytest.approx({"ROUGE-1": rouge_1, "ROUGE-2": rouge_2, "ROUGE-L": rouge_l})
    assert found["ROUGE-L"] == pytest.approx(score_task("text", [hypothesis], [[reference]])["ROUGE-L"])
    assert list(rouge.sentence_scores(hypothesis, [reference]).values()) == pytest.approx([rouge_1, rouge_2, rouge_l])
    assert rouge.original_way([hypothesis], [reference], 1)["rouge1"] == pytest.approx(rouge_1)
    assert rouge.rouge_lsum([hypothesis], [[reference]]) == pytest.approx(rouge_l)


@pytest.mark.parametrize(
    "reference", ["the café's naïve owners", "Nhà hàng tốt nhất ở đây", "They only say добрый день"]
)
def test_rouge_of_latin_texts_stays_rouge_scores(reference):
    scorer = RougeScorer(["rouge1"], use_stemmer=True)
    hypothesis = "the cafe owner says hang"
    wanted = 100 * scorer.score(reference, hypothesis)["rouge1"].fmeasure
    assert score_task("xsum", [hypothesis], [[reference]])["ROUGE-1"] == pytest.approx(wanted)
