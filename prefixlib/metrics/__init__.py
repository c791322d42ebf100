"""The paper's metrics as the official scorers compute them, in Python.

    from prefixlib.metrics import score_task
    score_task("e2e", ["The Mill is a pub ."], [["The Mill is a pub.", "There is a pub, The Mill."]])

Nothing heavy is imported before a task is scored.
"""

from collections.abc import Collection


def score_task(
    task: str,
    hypotheses: list[str],
    references: list[list[str]],
    *,
    categories: list[str] | None = None,
    seen_categories: Collection[str] | None = None,
    metrics: Collection[str] | None = None,
) -> dict[str, float | str | None]:
    """Score system outputs with the metrics that the task's papers print, on the papers' scale.

    task: e2e, webnlg, dart, xsum, cnn_dm, classify-sentiment, classify-topic or text (the data modes data2text,
        triples and cnndm name their tasks too).
    references: all reference texts of each hypothesis, raw. As in the official scorers, WebNLG and DART use the first
        three, and E2E those that are not empty.
    categories: one per hypothesis; WebNLG's figures are then given as "BLEU seen", "BLEU unseen" and "BLEU all" (as far
        as there are such segments), `seen_categories` naming the seen ones (default: those of the 2017 training data).
    metrics: names of the metrics to compute (default: all of the task's).

    Returns name -> value, None for a metric that is not available here. All scores, also printed ones, have the scale
    of the paper's tables for the task:

        e2e              BLEU 0-100, NIST from 0, METEOR 0-100, ROUGE-L 0-100, CIDEr 0-10
        webnlg, dart     BLEU 0-100, METEOR 0-1, TER from 0 (lower is better; above 1 if there are more edits than
                         words in the references), MoverScore and BERTScore 0-1, BLEURT about 0-1
        xsum, cnn_dm     ROUGE-1, ROUGE-2, ROUGE-L 0-100
        classify-*       accuracy 0-100
        text             BLEU, ROUGE-L, chrF, exact match 0-100

    Raises UserError for an unknown task or metric, and for counts that do not match (naming both).
    """
    from prefixlib.metrics.tasks import measure

    table = measure(task, hypotheses, references, categories, seen_categories, metrics)
    return {figure.name: figure.score() for figure in table}


def shown(score: object) -> str:
    """A score in its printed form: four significant digits, "n/a" for None, several with their names."""
    if isinstance(score, dict):
        return "  ".join(f"{name} {shown(part)}" for name, part in score.items())
    return "n/a" if score is None else score if isinstance(score, str) else f"{score:.4g}"
