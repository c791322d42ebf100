"""BERTScore, MoverScore and BLEURT through their own libraries, if installed (DART's table has them)."""

import os

from prefixlib.metrics.base import Metric, Unavailable, mean


def _rows(scores):
    import numpy as np

    return np.stack([np.asarray(scores, dtype=float), np.ones(len(scores))], axis=1)


def _filled(references: list[list[str]]) -> list[list[str]]:
    return [[text for text in texts if text.strip()] or [""] for texts in references]


def _best_of(score_pairs, hypotheses: list[str], references: list[list[str]]) -> list[float]:
    """Best score over each hypothesis's references; `score_pairs` takes two equally long lists of texts."""
    filled = _filled(references)
    pairs = [(text, hypothesis) for hypothesis, texts in zip(hypotheses, filled, strict=True) for text in texts]
    scores = iter(score_pairs([text for text, _ in pairs], [hypothesis for _, hypothesis in pairs]))
    return [max(float(next(scores)) for _ in texts) for texts in filled]


def bertscore(hypotheses: list[str], references: list[list[str]]):
    """(N, 2) array: F1 of the bert-score package's English default model against the best reference, 1."""
    try:
        from bert_score import score
    except ImportError as error:
        raise Unavailable("pip install bert-score") from error
    try:
        _, _, f1 = score(hypotheses, _filled(references), lang="en")
    except OSError as error:  # the model is on the hub
        raise Unavailable("bert-score could not load its model (is the hub reachable?)") from error
    return _rows(f1)


def moverscore(hypotheses: list[str], references: list[list[str]]):
    """(N, 2) array: MoverScore (moverscore_v2, unigrams, idf of either side), best reference, 1."""
    try:
        from moverscore_v2 import get_idf_dict, word_mover_score
    except ImportError as error:
        raise Unavailable("pip install moverscore") from error
    except OSError as error:  # it loads its model at import
        raise Unavailable("moverscore could not load its model (is the hub reachable?)") from error

    def score_pairs(texts, candidates):
        return word_mover_score(
            texts, candidates, get_idf_dict(texts), get_idf_dict(candidates), stop_words=[], n_gram=1
        )

    return _rows(_best_of(score_pairs, hypotheses, references))


def bleurt(hypotheses: list[str], references: list[list[str]]):
    """(N, 2) array: BLEURT with the checkpoint folder named in BLEURT_CHECKPOINT, best reference, 1."""
    try:
        from bleurt.score import BleurtScorer
    except ImportError as error:
        raise Unavailable("install google-research/bleurt and set BLEURT_CHECKPOINT") from error
    checkpoint = os.environ.get("BLEURT_CHECKPOINT", "")
    if not os.path.isdir(checkpoint):
        raise Unavailable("set BLEURT_CHECKPOINT to a BLEURT checkpoint folder (the paper: bleurt-base-128)")
    scorer = BleurtScorer(checkpoint)

    def score_pairs(texts, candidates):
        return scorer.score(references=texts, candidates=candidates)

    return _rows(_best_of(score_pairs, hypotheses, references))


METRICS = (
    Metric("MoverScore", moverscore, mean),
    Metric("BERTScore", bertscore, mean),
    Metric("BLEURT", bleurt, mean),
)
