"""The certainty of a score: bootstrap intervals (Koehn 2004), a paired randomisation test (Riezler & Maxwell 2005).

Both resample segments' statistics, never text, so a thousand resamples of a corpus are one matrix product.
"""

from prefixlib.metrics.tasks import Measured

LEVEL = 0.95
ROWS_AT_ONCE = 64  # resamples computed together: bounds the memory for large corpora


def _sums(draw, rows, samples: int):
    """`draw(count)` -> (count, N) weights of the segments; the weighted sums of `rows` (N, S): (samples, S)."""
    import numpy as np

    parts = [draw(min(ROWS_AT_ONCE, samples - done)) @ rows for done in range(0, samples, ROWS_AT_ONCE)]
    return np.concatenate(parts)


def _resampled(rows, samples: int, seed: int):
    """Sums over `samples` corpora of N segments sampled with replacement; equal N and seed give equal samples."""
    import numpy as np

    generator = np.random.default_rng(seed)
    segments = len(rows)

    def draw(count):
        picked = generator.integers(segments, size=(count, segments))
        return np.stack([np.bincount(each, minlength=segments) for each in picked]).astype(float)

    return _sums(draw, rows, samples)


def interval(figure: Measured, samples: int, seed: int = 0) -> tuple[float, float] | None:
    """Bounds of the figure's 95 % bootstrap interval (percentiles); None if the metric is not available."""
    import numpy as np

    if figure.rows is None:
        return None
    scores = figure.score(_resampled(figure.rows, samples, seed))
    low, high = np.quantile(scores, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def paired(a: Measured, b: Measured, samples: int, seed: int = 0) -> dict[str, float] | None:
    """Compare two systems on the same segments; None if the metric is not available.

    Returns `difference` (b - a), its 95 % bootstrap interval `low`, `high`, and `p`: how often a difference at least as
    large arises when each segment's two outputs are swapped by coin toss (two-sided, with the usual + 1).
    """
    import numpy as np

    if a.rows is None or b.rows is None:
        return None
    difference = b.score() - a.score()
    drawn = b.score(_resampled(b.rows, samples, seed)) - a.score(_resampled(a.rows, samples, seed))
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    generator = np.random.default_rng(seed + 1)
    swap = _sums(lambda count: generator.integers(2, size=(count, len(a.rows))).astype(float), b.rows - a.rows, samples)
    swapped = b.score(b.rows.sum(axis=0) - swap) - a.score(a.rows.sum(axis=0) + swap)
    as_large = np.abs(swapped) >= abs(difference) - 1e-12  # equal up to rounding counts as reached
    p = (np.count_nonzero(as_large) + 1) / (samples + 1)
    return {"difference": difference, "low": float(low), "high": float(high), "p": float(p)}
