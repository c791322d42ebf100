"""Distinct-n (Li et al. 2016): the variety of a set of texts. It says nothing about their quality."""

from collections.abc import Sequence


def distinct(texts: Sequence[str], orders: Sequence[int] = (1, 2)) -> dict[str, float]:
    """{"distinct-n": distinct n-grams / all n-grams of the texts together}, split at white space; 0 for none."""
    scores = {}
    for order in orders:
        grams = []
        for text in texts:
            words = text.split()
            grams += [tuple(words[i : i + order]) for i in range(len(words) - order + 1)]
        scores[f"distinct-{order}"] = len(set(grams)) / len(grams) if grams else 0.0
    return scores
