"""ROUGE-L (Lin 2004) as in the COCO caption scorer, which the E2E scorer uses: a mean over segments.

Best recall and best precision over the references (not necessarily of the same one), F with beta 1.2.
"""

from prefixlib.metrics.base import Metric, mean, progress
from prefixlib.metrics.ptb import tokens

BETA = 1.2


def common_subsequence(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """Length of the longest common subsequence, by bit vectors (Hyyrö 2004): a bit of `rows` falls to 0 per match."""
    where = {}
    for i, word in enumerate(a):
        where[word] = where.get(word, 0) | 1 << i
    everything = (1 << len(a)) - 1
    rows = everything
    for word in b:
        matches = rows & where.get(word, 0)
        rows = (rows + matches | rows - matches) & everything
    return len(a) - rows.bit_count()


def segment_score(hypothesis: tuple[str, ...], references: list[tuple[str, ...]]) -> float:
    """F of the best recall and the best precision, 0..1; all arguments tokenised. 0 without references."""
    # COCO splits at single spaces, so that a text without words is one (empty) word, which matches another such text
    hypothesis, references = hypothesis or ("",), [reference or ("",) for reference in references]
    common = [common_subsequence(reference, hypothesis) for reference in references]
    precision = max(common, default=0) / len(hypothesis)
    recall = max((c / len(reference) for c, reference in zip(common, references, strict=True)), default=0)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def statistics(hypotheses: list[str], references: list[list[str]]):
    """(N, 2) array: score, 1."""
    import numpy as np

    rows = np.ones((len(hypotheses), 2))
    for i in progress(range(len(hypotheses)), "ROUGE-L"):
        rows[i, 0] = segment_score(tokens(hypotheses[i]), [tokens(text) for text in references[i]])
    return rows


METRIC = Metric("ROUGE-L", statistics, mean)
