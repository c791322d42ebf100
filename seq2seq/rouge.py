"""ROUGE while training and, for summaries, beside the corpus score: ROUGE-Lsum and the original's way of averaging."""

from collections.abc import Sequence
from functools import lru_cache

from rouge_score.rouge_scorer import RougeScorer

KINDS = ("rouge1", "rouge2", "rougeL")


@lru_cache(maxsize=1)
def _scorer() -> RougeScorer:
    return RougeScorer([*KINDS, "rougeLsum"], use_stemmer=True)


def sentence_scores(hypothesis: str, references: Sequence[str]) -> dict[str, float]:
    """F1 x 100 of one output, the best over its references, per kind."""
    scores = _scorer().score_multi(list(references) or [""], hypothesis)
    return {kind: 100 * scores[kind].fmeasure for kind in KINDS}


def rouge_lsum(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus mean of summary-level ROUGE-L F1 x 100: texts are split into sentences by nltk's Punkt."""
    split = _sentence_splitter()
    total = 0.0
    for hypothesis, texts in zip(hypotheses, references, strict=True):
        texts = ["\n".join(split(text)) for text in texts] or [""]
        total += 100 * _scorer().score_multi(texts, "\n".join(split(hypothesis)))["rougeLsum"].fmeasure
    return total / max(len(hypotheses), 1)


def _sentence_splitter():
    """nltk's English Punkt model where it is installed, else Punkt without a model (which knows no abbreviations)."""
    from nltk.tokenize import PunktSentenceTokenizer, sent_tokenize

    try:
        sent_tokenize("One. Two.")
        return sent_tokenize
    except LookupError:
        return PunktSentenceTokenizer().tokenize


def original_way(hypotheses: Sequence[str], cut_references: Sequence[str], batch_size: int) -> dict[str, float]:
    """The number the original printed: the mean over batches of each batch's mean F1 x 100, a short last batch counting
    as much as a full one, against references cut to the length that the model may see.

    The original took the median of 1000 bootstrap samples as a batch's mean, which is random; this is the mean itself.
    """
    rows = [sentence_scores(h, [r]) for h, r in zip(hypotheses, cut_references, strict=True)]
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return {
        kind: sum(sum(row[kind] for row in batch) / len(batch) for batch in batches) / max(len(batches), 1)
        for kind in KINDS
    }
