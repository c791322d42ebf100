"""A split's outputs, in both families: their files, their scores, their entry in results.json.

outputs = Outputs("webnlg", groups, texts, values, seconds)
outputs.write(OUTPUT / "test_beam", OUTPUT / "test_beam.jsonl")
scores = outputs.scores(seen_categories(model.task, groups, "webnlg", data_dir))
record.record_split(OUTPUT, "test", outputs.entry(path, scores, strategy="beam", step=model.task.get("step")))
"""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from prefixlib.data import tables
from prefixlib.data.tasks import find_task, training_categories
from prefixlib.metrics import score_task
from prefixlib.metrics.distinct import distinct
from prefixlib.system import files

logger = logging.getLogger(__name__)

Scores = dict[str, Any]


class Input(Protocol):
    """An input with its references: a Group or an Example."""

    source: Any
    references: Sequence[str]
    category: str


@dataclass(frozen=True)
class Outputs:
    """The texts that were decoded for the inputs of a file, in their order."""

    mode: str
    inputs: Sequence[Input]
    texts: Sequence[Sequence[str]]  # per input: the best text alone, or the samples
    values: Sequence[Sequence[float]]  # the search's score of every text
    seconds: float

    def flat(self) -> list[str]:
        """All texts in one list; the samples of an input are adjacent."""
        return [text for texts in self.texts for text in texts]

    def write(self, path: Path, table: Path) -> None:
        """Write one text a line to `path`, and for the user's own data also the rows of `tables.write` to `table`."""
        texts = self.flat()
        files.write_text(path, as_lines(texts))
        if find_task(self.mode).verbatim:
            inputs = [item for item, its in zip(self.inputs, self.texts, strict=True) for _ in its]
            tables.write(table, inputs, texts, [value for values in self.values for value in values])

    def scores(self, seen: Collection[str] | None) -> Scores:
        """The task's metrics over the first text of each input; texts without a right answer are described."""
        if not find_task(self.mode).metrics:
            return distinct(self.flat())
        return score(self.mode, [texts[0] for texts in self.texts], self.inputs, seen)

    def entry(self, data_file: Path, scores: Scores, *, cut: int, strategy: str, step: int | None, **how: Any) -> dict:
        """The split's entry in results.json. cut: sources that lost tokens; step: the step of the weights, if known."""
        return {
            "data_file": str(data_file),
            "strategy": strategy,
            **how,
            "sentences": len(self.flat()),
            "sources_cut": cut,
            "seconds": round(self.seconds, 2),
            **({} if step is None else {"step": step}),
            "scores": scores,
        }

    def log(self, path: Path, step: int | None) -> None:
        """Log how many texts were written where, and the step of the weights."""
        count, weights = len(self.flat()), "" if step is None else f", weights of step {step}"
        logger.info("%d texts in %.1f s (%.2f/s) -> %s%s", count, self.seconds, count / self.seconds, path, weights)


def as_lines(texts: Iterable[str]) -> str:
    """The texts as one string, a text a line: line breaks inside a text become spaces."""
    return "".join(text.replace("\n", " ") + "\n" for text in texts)


def score(mode: str, texts: Sequence[str], inputs: Sequence[Input], seen: Collection[str] | None) -> Scores:
    """The task's metrics over the inputs that have references; {} where none has (a blind test set).

    seen: the categories of the training data, see `seen_categories`; None for WebNLG 2017's.
    """
    pairs = with_references(texts, inputs)
    if len(pairs) < len(inputs):
        logger.warning("%d of %d inputs have no reference: they are not scored", len(inputs) - len(pairs), len(inputs))
    if not pairs:
        return {}
    categories = [item.category for _, item in pairs]
    return score_task(
        find_task(mode).metrics,
        [text for text, _ in pairs],
        [list(item.references) for _, item in pairs],
        categories=categories if any(categories) else None,
        seen_categories=seen,
    )


def with_references(texts: Sequence[str], inputs: Sequence[Input]) -> list[tuple[str, Input]]:
    """The pairs of text and input whose input has references."""
    return [(text, item) for text, item in zip(texts, inputs, strict=True) if item.references]


def seen_categories(
    task: Mapping[str, Any], inputs: Sequence[Input], mode: str, data_dir: str | Path | None
) -> Collection[str] | None:
    """The categories that training saw, from the checkpoint's `task`, else from the training file.

    None if the inputs have no categories, or if neither the checkpoint nor a training file names any.
    """
    if task.get("categories"):
        return task["categories"]
    return (training_categories(mode, data_dir) or None) if any(item.category for item in inputs) else None
