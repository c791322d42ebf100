"""BLEU (Papineni et al. 2002) as two official scorers compute it, counted by sacrebleu.

`MTEVAL`: mteval-v13a, the E2E scorer's (its tokenisation, lower-cased). `MULTI`: multi-bleu.perl -lc, the WebNLG and
DART scorers' (split at spaces, lower-cased). Both take the reference length nearest to the hypothesis's, the shorter of
two equally near ones. In multi-bleu an empty line in a reference file is a reference of length 0, and a short output
can be nearest to it: keep the "" in the references to get the official brevity penalty.
"""

from functools import partial

from prefixlib.metrics.base import Metric, progress

ORDER = 4  # longest n-gram


def statistics(hypotheses: list[str], references: list[list[str]], tokenize: str):
    """(N, 2 + 2 * ORDER) array: hypothesis length, reference length, clipped matches and n-grams for n = 1..4."""
    import numpy as np
    from sacrebleu.metrics import BLEU

    scorer = BLEU(tokenize=tokenize, lowercase=True, smooth_method="none", max_ngram_order=ORDER)
    scorer.effective_order = True  # silences a warning about single sentences; the counts do not depend on it
    rows = []
    for i in progress(range(len(hypotheses)), "BLEU"):
        counted = scorer.sentence_score(hypotheses[i], references[i] or [""])
        rows.append([counted.sys_len, counted.ref_len, *counted.counts, *counted.totals])
    return np.array(rows, dtype=float).reshape(-1, 2 + 2 * ORDER)


def combine(sums):
    """100 * brevity penalty * geometric mean of the precisions, unsmoothed: (..., 2 + 2 * ORDER) -> (...)."""
    import numpy as np

    length, reference_length = sums[..., 0], sums[..., 1]
    matches, total = sums[..., 2 : 2 + ORDER], sums[..., 2 + ORDER :]
    scored = (matches > 0).all(axis=-1)
    precisions = np.where(matches > 0, matches, 1) / np.maximum(total, 1)
    penalty = np.exp(np.minimum(0, 1 - reference_length / np.maximum(length, 1)))
    return np.where(scored, 100 * penalty * np.exp(np.log(precisions).mean(axis=-1)), 0.0)


MTEVAL = Metric("BLEU", partial(statistics, tokenize="13a"), combine)
MULTI = Metric("BLEU", partial(statistics, tokenize="none"), combine)
