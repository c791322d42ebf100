"""CIDEr (Vedantam et al. 2015) as in the COCO caption scorer, which the E2E scorer uses (its "CIDEr-D").

Cosine of tf-idf vectors of n-grams, n = 1..4, with clipped counts and a Gaussian penalty on the length difference;
mean over n, references and segments, times 10. A segment's references are one document of the idf.
"""

import math
from collections import Counter

from prefixlib.metrics.base import Metric, mean, progress
from prefixlib.metrics.ptb import tokens

ORDER = 4
SIGMA = 6.0  # width of the length penalty, in bigrams


def ngrams(words: tuple[str, ...]) -> Counter:
    """Counts of all n-grams, n = 1..ORDER."""
    return Counter(words[i : i + n] for n in range(1, ORDER + 1) for i in range(len(words) - n + 1))


class TfIdf:
    """Vectors of n-gram weights under the document frequencies of all segments' references."""

    def __init__(self, references: list[list[Counter]]):
        documents = Counter()
        for counts in references:
            documents.update(set().union(*counts))
        most = math.log(len(references)) if references else 0.0
        self.idf = {gram: most - math.log(count) for gram, count in documents.items()}
        self.unseen = most  # an n-gram in no reference counts as if it were in one document

    def vector(self, counts: Counter):
        """The weight of each n-gram, the norm of each order's vector, and the length in bigrams (COCO's measure)."""
        weights = {gram: count * self.idf.get(gram, self.unseen) for gram, count in counts.items()}
        squares = [0.0] * ORDER
        for gram, weight in weights.items():
            squares[len(gram) - 1] += weight * weight
        return (
            weights,
            [math.sqrt(square) for square in squares],
            sum(c for gram, c in counts.items() if len(gram) == 2),
        )


def similarity(hypothesis, reference) -> float:
    """Sum over n of the clipped cosine of two vectors, with the length penalty."""
    weights, norms, length = hypothesis
    reference_weights, reference_norms, reference_length = reference
    products = [0.0] * ORDER
    for gram, weight in weights.items():
        other = reference_weights.get(gram)
        if other is not None:
            products[len(gram) - 1] += min(weight, other) * other
    cosine = sum(p / (a * b) if a and b else p for p, a, b in zip(products, norms, reference_norms, strict=True))
    return cosine * math.exp(-((length - reference_length) ** 2) / (2 * SIGMA**2))


def statistics(hypotheses: list[str], references: list[list[str]]):
    """(N, 2) array: score, 1. The document frequencies come from all N segments."""
    import numpy as np

    counts = [[ngrams(tokens(text)) for text in texts or [""]] for texts in references]
    space = TfIdf(counts)
    rows = np.ones((len(hypotheses), 2))
    for i in progress(range(len(hypotheses)), "CIDEr"):
        hypothesis = space.vector(ngrams(tokens(hypotheses[i])))
        total = sum(similarity(hypothesis, space.vector(reference)) for reference in counts[i])
        rows[i, 0] = 10 * total / ORDER / len(counts[i])
    return rows


METRIC = Metric("CIDEr", statistics, mean, span="0-10")
