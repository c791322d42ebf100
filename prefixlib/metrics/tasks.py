"""The metrics of each task, the text they compare, and their computation over whole files."""

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from prefixlib.metrics import accuracy, bleu, chrf, cider, learned, meteor, nist, normalise, ptb, rouge, rouge_l, ter
from prefixlib.metrics.base import Metric, Unavailable
from prefixlib.system.errors import UserError

logger = logging.getLogger(__name__)

# The ten categories of the WebNLG 2017 training data; its test set adds five unseen ones
SEEN_CATEGORIES = frozenset(
    {"Airport", "Astronaut", "Building", "City", "ComicsCharacter"}
    | {"Food", "Monument", "SportsTeam", "University", "WrittenWork"}
)
UNSEEN_CATEGORIES = frozenset({"Artist", "Athlete", "CelestialBody", "MeanOfTransportation", "Politician"})


@dataclass(frozen=True)
class Task:
    """The metrics a task's papers print, in their order."""

    metrics: tuple[Metric, ...]
    mode: str  # the name of the data in prefixlib.data.readers
    prepare: Callable | None = None  # (hypotheses, references) -> both, prepared as in the official scripts
    on_request: tuple[Metric, ...] = ()  # computed only if asked for by name
    by_category: bool = False  # seen / unseen / all
    note: str = ""  # printed under the table


def _on_coco_tokens(metric: Metric) -> Metric:
    """METEOR as in the E2E scorer: on the text tokenised for ROUGE-L and CIDEr, in percent."""

    def statistics(hypotheses, references):
        tokenised = [[" ".join(ptb.tokens(text)) for text in texts] for texts in references]
        return metric.statistics([" ".join(ptb.tokens(text)) for text in hypotheses], tokenised)

    return replace(metric, statistics=statistics, scale=100, span="0-100")


_E2E = (
    bleu.MTEVAL,
    nist.METRIC,
    _on_coco_tokens(meteor.METRIC),
    replace(rouge_l.METRIC, scale=100, span="0-100"),
    cider.METRIC,
)
_TRIPLES = (bleu.MULTI, meteor.METRIC, ter.METRIC)
TASKS = {
    "e2e": Task(_E2E, "data2text", normalise.e2e, on_request=(_on_coco_tokens(meteor.JAR),)),
    "webnlg": Task(_TRIPLES, "webnlg", normalise.webnlg, on_request=(meteor.JAR,), by_category=True),
    "dart": Task(_TRIPLES + learned.METRICS, "triples", normalise.dart, on_request=(meteor.JAR,)),
    "xsum": Task(rouge.METRICS, "xsum", note=rouge.DISTANCE),
    "cnn_dm": Task(rouge.METRICS, "cnndm", note=rouge.DISTANCE),
    "classify-sentiment": Task((accuracy.METRIC,), "classify-sentiment"),
    "classify-topic": Task((accuracy.METRIC,), "classify-topic"),
    "text": Task((bleu.SACREBLEU, rouge.ANY_LANGUAGE, chrf.METRIC, accuracy.EXACT), "text"),
}
ALIASES = {"data2text": "e2e", "triples": "dart", "cnndm": "cnn_dm"}  # data modes -> tasks


def find_task(name: str) -> Task:
    """The task's row; UserError that lists the tasks for any other name."""
    task = TASKS.get(ALIASES.get(name, name))
    if task is None:
        raise UserError(f"task {name!r}: unknown; one of {', '.join([*TASKS, *ALIASES])}")
    return task


@dataclass(frozen=True)
class Measured:
    """One figure of the table: a metric on all segments or on some."""

    name: str
    metric: Metric
    rows: Any  # (segments, S) statistics, None if the metric is not available
    unavailable: str = ""  # what to install

    def score(self, sums=None):
        """The value on the papers' scale, or for `sums` (..., S) the values (...); None if it is not available."""
        if self.rows is None:
            return None
        if sums is not None:
            return self.metric.scale * self.metric.combine(sums)
        return float(self.metric.scale * self.metric.combine(self.rows.sum(axis=0)))


def choose_metrics(task: Task, wanted: Collection[str] | None) -> list[Metric]:
    """The task's metrics, or only the wanted ones; raises UserError for any other name."""
    if wanted is None:
        return list(task.metrics)
    metrics = (*task.metrics, *task.on_request)
    names = {metric.name.lower() for metric in metrics}
    for name in wanted:
        if name.lower() not in names:
            raise UserError(f"metric {name!r}: this task has {', '.join(metric.name for metric in metrics)}")
    return [metric for metric in metrics if metric.name.lower() in {name.lower() for name in wanted}]


def segment_groups(task: Task, count: int, categories, seen_categories) -> list[tuple[str, Any]]:
    """(suffix of the metric's name, index of the segments) of each figure that the task prints per metric."""
    import numpy as np

    everything = np.arange(count)
    if not task.by_category or categories is None or not any(categories):
        return [("", everything)]
    if len(categories) != count:
        raise UserError(f"{count} hypotheses but {len(categories)} categories: give one category per hypothesis")
    seen_names = SEEN_CATEGORIES if seen_categories is None else set(seen_categories)
    seen = np.array([category in seen_names for category in categories])
    groups = [(" seen", everything[seen]), (" unseen", everything[~seen]), (" all", everything)]
    return [group for group in groups if len(group[1])]


def measure(
    name: str,
    hypotheses: list[str],
    references: list[list[str]],
    categories: list[str] | None = None,
    seen_categories: Collection[str] | None = None,
    metrics: Collection[str] | None = None,
) -> list[Measured]:
    """Statistics of every figure that the task prints, in the table's order. Raises UserError as score_task."""
    task = find_task(name)
    if len(hypotheses) != len(references):
        raise UserError(
            f"{len(hypotheses)} hypotheses but {len(references)} groups of references: one hypothesis per input"
        )
    if not hypotheses:
        raise UserError("0 hypotheses: there is nothing to score")
    chosen = choose_metrics(task, metrics)
    groups = segment_groups(task, len(hypotheses), categories, seen_categories)
    references = [list(texts) for texts in references]
    if task.prepare:
        hypotheses, references = task.prepare(hypotheses, references)
    table = []
    for metric in chosen:
        try:
            rows, reason = metric.statistics(hypotheses, references), ""
        except Unavailable as error:
            rows, reason = None, str(error)
            logger.warning("%s: n/a; to have it: %s", metric.name, reason)
        for suffix, index in groups:
            table.append(Measured(metric.name + suffix, metric, None if rows is None else rows[index], reason))
    return table
