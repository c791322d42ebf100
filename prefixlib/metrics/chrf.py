"""chrF (Popović 2015) as sacrebleu computes it by default: n-grams of 1 to 6 characters without white space, beta 2.

The reference with the best score counts, per segment; the corpus score is that of the summed counts.
"""

from collections import Counter

from prefixlib.metrics.base import Metric, progress

ORDER, BETA = 6, 2


def counts(hypothesis: str, reference: str) -> list[int]:
    """Numbers of n-grams of the hypothesis, of the reference, and in common, for each length in turn (3 * ORDER)."""
    found = []
    texts = ["".join(text.split()) for text in (hypothesis, reference)]
    for size in range(1, ORDER + 1):
        ours, theirs = (Counter(text[n : n + size] for n in range(len(text) - size + 1)) for text in texts)
        # an order that a reference is too short for does not count
        found += [ours.total() if theirs else 0, theirs.total(), (ours & theirs).total()]
    return found


def combine(sums):
    """F averaged over the orders that both sides have: (..., 3 * ORDER) -> (...), 0 to 100."""
    import numpy as np

    parts = np.asarray(sums, dtype=float).reshape(*np.shape(sums)[:-1], ORDER, 3)
    ours, theirs, matches = parts[..., 0], parts[..., 1], parts[..., 2]
    both = (ours > 0) & (theirs > 0)
    orders = np.maximum(both.sum(-1), 1)
    precision = np.where(both, matches / np.maximum(ours, 1), 0).sum(-1) / orders
    recall = np.where(both, matches / np.maximum(theirs, 1), 0).sum(-1) / orders
    weighted = BETA**2 * precision + recall
    return 100 * (1 + BETA**2) * precision * recall / np.where(weighted > 0, weighted, 1)


def statistics(hypotheses: list[str], references: list[list[str]]):
    """(N, 3 * ORDER) array: the counts against the best reference."""
    import numpy as np

    rows = []
    for i in progress(range(len(hypotheses)), "chrF"):
        candidates = [counts(hypotheses[i], text) for text in references[i] or [""]]
        rows.append(max(candidates, key=lambda row: float(combine(row))))
    return np.array(rows, dtype=float).reshape(-1, 3 * ORDER)


METRIC = Metric("chrF", statistics, combine, span="0-100")
