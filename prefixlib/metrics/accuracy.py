"""Accuracy of generated labels: a label is right if it equals one of its references exactly."""

from dataclasses import replace

from prefixlib.metrics.base import Metric, mean


def statistics(hypotheses: list[str], references: list[list[str]]):
    """(N, 2) array: 1 for a right label, else 0; and 1 for every label. White space around it is ignored."""
    import numpy as np

    right = [
        hypothesis.strip() in {text.strip() for text in texts}
        for hypothesis, texts in zip(hypotheses, references, strict=True)
    ]
    return np.array([[float(hit), 1.0] for hit in right])


METRIC = Metric("accuracy", statistics, mean, scale=100, span="0-100")
EXACT = replace(METRIC, name="exact match")
