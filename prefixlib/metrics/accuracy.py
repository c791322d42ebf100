"""Accuracy of generated labels: a label counts where it is, to the letter, one of its references."""

from dataclasses import replace

from prefixlib.metrics.base import Metric, mean


def statistics(hypotheses: list[str], references: list[list[str]]):
    """(N, 2): 1 where the label is right, else 0; and 1 for every label. White space around it does not count."""
    import numpy as np

    right = [
        hypothesis.strip() in {text.strip() for text in texts}
        for hypothesis, texts in zip(hypotheses, references, strict=True)
    ]
    return np.array([[float(hit), 1.0] for hit in right])


METRIC = Metric("accuracy", statistics, mean, scale=100, span="0-100")
EXACT = replace(METRIC, name="exact match")
