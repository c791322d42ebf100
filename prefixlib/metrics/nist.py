"""NIST (Doddington 2002) as mteval-v13a computes it: n-grams up to 5, weighted by their information, lower-cased."""

import math
from collections import Counter

from prefixlib.metrics.base import Metric, progress

ORDER = 5
# The length penalty is 0.5 where the hypotheses have 2/3 of the references' words (mteval-v13a's beta)
BETA = -math.log(0.5) / math.log(1.5) ** 2


def ngrams(words: list[str]) -> Counter:
    """Counts of all n-grams, n = 1..ORDER."""
    return Counter(tuple(words[i : i + n]) for n in range(1, ORDER + 1) for i in range(len(words) - n + 1))


def information(references: list[list[list[str]]]) -> dict[tuple[str, ...], float]:
    """Bits each n-gram of the references carries: log2 of (count of it without its last word / its count)."""
    counts = Counter()
    for texts in references:
        for words in texts:
            counts.update(ngrams(words))
            counts[()] += len(words)
    return {gram: math.log2(counts[gram[:-1]] / count) for gram, count in counts.items() if gram}


def statistics(hypotheses: list[str], references: list[list[str]]):
    """(N, 2 + 2 * ORDER) array: hypothesis length, mean reference length, matched information and n-grams for n = 1..5.

    The information weights come from all N segments' references, as in mteval.
    """
    import numpy as np
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenizer = Tokenizer13a()
    tokenised = [[tokenizer(text).lower().split() for text in texts or [""]] for texts in references]
    bits = information(tokenised)
    rows = np.zeros((len(hypotheses), 2 + 2 * ORDER))
    for i in progress(range(len(hypotheses)), "NIST"):
        words = tokenizer(hypotheses[i]).lower().split()
        allowed = Counter()
        for reference in tokenised[i]:
            allowed |= ngrams(reference)
        rows[i, :2] = len(words), sum(map(len, tokenised[i])) / len(tokenised[i])
        for gram, count in ngrams(words).items():
            rows[i, 1 + len(gram)] += bits.get(gram, 0.0) * min(count, allowed[gram])
            rows[i, 1 + ORDER + len(gram)] += count
    return rows


def combine(sums):
    """Sum over n of information per n-gram, times the length penalty: (..., 2 + 2 * ORDER) -> (...)."""
    import numpy as np

    length, reference_length = sums[..., 0], np.maximum(sums[..., 1], 1e-9)
    matched, total = sums[..., 2 : 2 + ORDER], np.maximum(sums[..., 2 + ORDER :], 1)
    ratio = np.clip(length / reference_length, 1e-9, 1)
    return np.exp(-BETA * np.log(ratio) ** 2) * (matched / total).sum(axis=-1)


METRIC = Metric("NIST", statistics, combine)
