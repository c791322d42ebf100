"""ROUGE-1, ROUGE-2 and ROUGE-L F1 of summaries, with stemming, by the rouge-score package (Lin 2004).

The values are rouge-score's own. The paper's were given by ROUGE-1.5.5 (Perl), which reads 0.02-0.43 points higher.
With several references the best F1 counts, per metric.
"""

from prefixlib.metrics.base import Metric, mean, progress

KINDS = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL"}
DISTANCE = "rouge-score with stemming; ROUGE-1.5.5, which the paper used, reads 0.02-0.43 points higher"


def _statistics(kind: str):
    def statistics(hypotheses: list[str], references: list[list[str]]):
        """(N, 2) array: F1, 1."""
        import numpy as np
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind], use_stemmer=True)
        rows = np.ones((len(hypotheses), 2))
        for i in progress(range(len(hypotheses)), kind):
            rows[i, 0] = scorer.score_multi(references[i] or [""], hypotheses[i])[kind].fmeasure
        return rows

    return statistics


METRICS = tuple(Metric(name, _statistics(kind), mean, scale=100, span="0-100") for name, kind in KINDS.items())
