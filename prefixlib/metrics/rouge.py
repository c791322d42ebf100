"""ROUGE-1, ROUGE-2 and ROUGE-L F1 of summaries, with stemming, by the rouge-score package (Lin 2004).

The values are rouge-score's own. The paper used ROUGE-1.5.5 (Perl), whose values are 0.02-0.43 points higher.
With several references the best F1 counts, per metric. rouge-score's own words are the letters A to Z and digits alone:
texts whose references are in another script are compared by the words of `_Words`, and so are all of `ANY_LANGUAGE`.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

from prefixlib.metrics.base import Metric, apart, mean, progress

KINDS = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL"}
DISTANCE = "rouge-score with stemming; ROUGE-1.5.5, which the paper used, reads 0.02-0.43 points higher"


def _statistics(kind: str, any_language: bool = False):
    def statistics(hypotheses: list[str], references: list[list[str]]):
        """(N, 2) array: F1, 1."""
        import numpy as np

        rows = np.ones((len(hypotheses), 2))
        for i in progress(range(len(hypotheses)), kind):
            rows[i, 0] = _f1((kind,), hypotheses[i], references[i], any_language)[kind]
        return rows

    return statistics


def in_another_script(references: Sequence[str]) -> bool:
    """Whether most letters of the references are not among rouge-score's, A to Z."""
    letters = [letter for text in references for letter in text if letter.isalpha()]
    return 2 * sum(map(str.isascii, letters)) < len(letters)


def _f1(kinds: tuple[str, ...], hypothesis: str, references: Sequence[str], any_language: bool) -> dict[str, float]:
    """F1 of one output, the best over its references, per kind."""
    scorer = _scorer(kinds, any_language or in_another_script(references))
    scores = scorer.score_multi(list(references) or [""], hypothesis)
    return {kind: scores[kind].fmeasure for kind in kinds}


@lru_cache(maxsize=8)
def _scorer(kinds: tuple[str, ...], any_language: bool):
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(kinds, tokenizer=_Words()) if any_language else RougeScorer(kinds, use_stemmer=True)


class _Words:
    """Runs of letters and digits of any script, lower-cased: for English, rouge-score's words without stemming.

    In scripts that are written without spaces every letter is a word.
    """

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", apart(text.lower()))


ANY_LANGUAGE = Metric("ROUGE-L", _statistics("rougeL", any_language=True), mean, scale=100, span="0-100")
METRICS = tuple(Metric(name, _statistics(kind), mean, scale=100, span="0-100") for name, kind in KINDS.items())


# ---- one text at a time, while training; and the original's own figures --------------------------------------------


def sentence_scores(hypothesis: str, references: Sequence[str], any_language: bool = False) -> dict[str, float]:
    """F1 x 100 of one output, the best over its references: rouge1, rouge2, rougeL.

    any_language: over words of any script, without stemming.
    """
    scores = _f1(tuple(KINDS.values()), hypothesis, references, any_language)
    return {kind: 100 * score for kind, score in scores.items()}


def rouge_lsum(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus mean of summary-level ROUGE-L F1 x 100: nltk's Punkt splits texts into sentences."""
    split = _sentence_splitter()
    total = 0.0
    for hypothesis, texts in zip(hypotheses, references, strict=True):
        texts = ["\n".join(split(text)) for text in texts] or [""]
        total += 100 * _f1(("rougeLsum",), "\n".join(split(hypothesis)), texts, any_language=False)["rougeLsum"]
    return total / max(len(hypotheses), 1)


def _sentence_splitter():
    """nltk's English Punkt model if it is installed, else Punkt without a model (which knows no abbreviations)."""
    from nltk.tokenize import PunktSentenceTokenizer, sent_tokenize

    try:
        sent_tokenize("One. Two.")
        return sent_tokenize
    except LookupError:
        return PunktSentenceTokenizer().tokenize


def original_way(hypotheses: Sequence[str], cut_references: Sequence[str], batch_size: int) -> dict[str, float]:
    """The number the original printed: the mean over batches of each batch's mean F1 x 100, a short last batch counting
    as much as a full one, against references cut to the model's length limit.

    The original took the median of 1000 bootstrap samples as a batch's mean, which is random; this is the mean itself.
    """
    rows = [sentence_scores(h, [r]) for h, r in zip(hypotheses, cut_references, strict=True)]
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return {
        kind: sum(sum(row[kind] for row in batch) / len(batch) for batch in batches) / max(len(batches), 1)
        for kind in KINDS.values()
    }
