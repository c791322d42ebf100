"""BLEU (Papineni et al. 2002) as two official scorers and sacrebleu itself compute it, counted by sacrebleu.

`SACREBLEU`: sacrebleu's default, for the user's own texts: 13a tokenisation, case kept, mteval's smoothing; in scripts
without spaces (Chinese, Japanese, Thai, ...) letters are counted.
`MTEVAL`: mteval-v13a as the E2E scorer adapted it (its tokenisation, A-Z lower-cased). An order without a match counts
as half a match, the next such order as a quarter, and so on.
`MULTI`: multi-bleu.perl -lc of the WebNLG and DART scorers (split at spaces, lower-cased). An order without a match
makes the score 0. An empty line in a reference file is a reference of length 0, which can be the nearest one to a
short output: keep the "" in the references to get the official brevity penalty.

Both take the reference length nearest to the hypothesis's, the shorter of two equally near ones.
"""

from collections.abc import Callable
from functools import partial

from prefixlib.metrics.base import Metric, apart, mteval_tokens, progress, words_13a

ORDER = 4  # longest n-gram


def lower_words(text: str) -> list[str]:
    """The words that multi-bleu.perl -lc compares."""
    return text.lower().split()


def statistics(hypotheses: list[str], references: list[list[str]], words: Callable[[str], list[str]]):
    """(N, 2 + 2 * ORDER) array: hypothesis length, reference length, clipped matches and n-grams for n = 1..4."""
    import numpy as np
    from sacrebleu.metrics import BLEU

    scorer = BLEU(tokenize="none", smooth_method="none", max_ngram_order=ORDER)
    scorer.effective_order = True  # silences a warning about single sentences; the counts do not depend on it
    rows = []
    for i in progress(range(len(hypotheses)), "BLEU"):
        texts = [" ".join(words(text)) for text in references[i] or [""]]
        counted = scorer.sentence_score(" ".join(words(hypotheses[i])), texts)
        rows.append([counted.sys_len, counted.ref_len, *counted.counts, *counted.totals])
    return np.array(rows, dtype=float).reshape(-1, 2 + 2 * ORDER)


def _split(sums):
    """(brevity penalty (...), matches (..., ORDER), n-grams (..., ORDER)) of sums (..., 2 + 2 * ORDER)."""
    import numpy as np

    length, reference_length = sums[..., 0], sums[..., 1]
    penalty = np.exp(np.minimum(0, 1 - reference_length / np.maximum(length, 1)))
    return penalty, sums[..., 2 : 2 + ORDER], sums[..., 2 + ORDER :]


def combine(sums):
    """100 * brevity penalty * geometric mean of the precisions, unsmoothed: (..., 2 + 2 * ORDER) -> (...)."""
    import numpy as np

    penalty, matches, total = _split(sums)
    precisions = np.where(matches > 0, matches, 1) / np.maximum(total, 1)
    return np.where((matches > 0).all(axis=-1), 100 * penalty * np.exp(np.log(precisions).mean(axis=-1)), 0.0)


def combine_smoothed(sums):
    """BLEU with mteval's smoothing; an order that no hypothesis is long enough for has precision 1.

    The score is 0 if the hypotheses or the references have no word at all.
    """
    import numpy as np

    penalty, matches, total = _split(sums)
    missed = (matches == 0) & (total > 0)
    halves = 0.5 ** np.cumsum(missed, axis=-1)  # 1/2 at the first order without a match, 1/4 at the second ...
    precisions = np.where(missed, halves, matches) / np.maximum(total, 1)
    scored = np.exp(np.log(np.where(total > 0, precisions, 1)).mean(axis=-1))
    return np.where((sums[..., :2] > 0).all(axis=-1), 100 * penalty * scored, 0.0)


def combine_sacrebleu(sums):
    """BLEU as sacrebleu computes it: 0 if nothing matches, or if no hypothesis has ORDER words."""
    import numpy as np

    _, matches, total = _split(sums)
    return np.where((matches > 0).any(axis=-1) & (total > 0).all(axis=-1), combine_smoothed(sums), 0.0)


def words_of_any_script(text: str) -> list[str]:
    """sacrebleu's default words; in scripts without spaces every letter is a word."""
    return words_13a(apart(text))


SACREBLEU = Metric("BLEU", partial(statistics, words=words_of_any_script), combine_sacrebleu, span="0-100")
MTEVAL = Metric("BLEU", partial(statistics, words=mteval_tokens), combine_smoothed, span="0-100")
MULTI = Metric("BLEU", partial(statistics, words=lower_words), combine, span="0-100")
