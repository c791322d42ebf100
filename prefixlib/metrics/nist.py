"""NIST (Doddington 2002) as the E2E scorer's mteval-v13a computes it: n-grams up to 5, weighted by their information.

    NIST = penalty(ratio) * sum over n of (information of the matched n-grams / n-grams of the hypotheses)
    penalty(ratio) = 1 where ratio >= 1, else exp(-BETA * ln(ratio)^2)
    ratio = H * (R / N) / L

H tokens of all hypotheses, L tokens of all references, R references that are not empty, N segments. The E2E scorer,
whose inputs have unequal numbers of references, uses R / N instead of mteval's fixed number of references. H is
compared with L / (R / N), which is not a mean per segment: inputs with many references weigh more.
"""

import math
from collections import Counter

from prefixlib.metrics.base import Metric, mteval_tokens, progress

ORDER = 5
COUNTS = 4  # columns of the statistics before those per n
# The length penalty is 0.5 if the hypotheses have 2/3 of the references' words (mteval-v13a's beta)
BETA = -math.log(0.5) / math.log(1.5) ** 2


def ngrams(words: list[str]) -> Counter:
    """Counts of all n-grams, n = 1..ORDER."""
    return Counter(tuple(words[i : i + n]) for n in range(1, ORDER + 1) for i in range(len(words) - n + 1))


def information(references: list[list[list[str]]]) -> dict[tuple[str, ...], float]:
    """Information of each n-gram of the references in bits: log2(count of it without its last word / its count)."""
    counts = Counter()
    for texts in references:
        for words in texts:
            counts.update(ngrams(words))
            counts[()] += len(words)
    return {gram: math.log2(counts[_history(gram)] / count) for gram, count in counts.items() if gram}


def _history(gram: tuple[str, ...]) -> tuple[str, ...]:
    """The n-gram without its last word. mteval is Perl, where the text "0" is false: it ignores a lone 0 as history."""
    return () if gram[:-1] == ("0",) else gram[:-1]


def statistics(hypotheses: list[str], references: list[list[str]]):
    """(N, 4 + 2 * ORDER) array: hypothesis length, length of all its references together, how many of them are not
    empty, 1, matched information and n-grams for n = 1..5.

    The information weights come from all N segments' references, as in mteval.
    """
    import numpy as np

    tokenised = [[mteval_tokens(text) for text in texts] for texts in references]
    bits = information(tokenised)
    rows = np.zeros((len(hypotheses), COUNTS + 2 * ORDER))
    for i in progress(range(len(hypotheses)), "NIST"):
        words = mteval_tokens(hypotheses[i])
        allowed = Counter()
        for reference in tokenised[i]:
            allowed |= ngrams(reference)
        rows[i, :COUNTS] = len(words), sum(map(len, tokenised[i])), sum(map(bool, tokenised[i])), 1
        for gram, count in ngrams(words).items():
            rows[i, COUNTS - 1 + len(gram)] += bits.get(gram, 0.0) * min(count, allowed[gram])
            rows[i, COUNTS - 1 + ORDER + len(gram)] += count
    return rows


def combine(sums):
    """Sum over n of information per n-gram, times the length penalty: (..., 4 + 2 * ORDER) -> (...)."""
    import numpy as np

    length, reference_length, texts, segments = (sums[..., i] for i in range(COUNTS))
    matched, total = sums[..., COUNTS : COUNTS + ORDER], np.maximum(sums[..., COUNTS + ORDER :], 1)
    ratio = length * (texts / np.maximum(segments, 1)) / np.maximum(reference_length, 1e-9)
    return np.exp(-BETA * np.log(np.clip(ratio, 1e-9, 1)) ** 2) * (matched / total).sum(axis=-1)


METRIC = Metric("NIST", statistics, combine, span="from 0")
