"""The best validation of a run: which one it is, and the weights that the run decodes and returns.

A run keeps its best checkpoint in OUTPUT/best and its last one in OUTPUT. Where there is a best one it is decoded.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixlib.checkpoints import checkpoint

logger = logging.getLogger(__name__)

BEST = "best"


def is_better(result: Mapping[str, float], kept: Mapping[str, float], metric: str) -> bool:
    """Whether a validation's result is better than the earlier best one, `kept`, which is empty at first.

    metric: "loss", the lower the better, or a score, the higher the better; a tie goes to the lower loss.
    """
    if not kept:
        return True
    if metric == "loss" or result[metric] == kept[metric]:
        return result["loss"] < kept["loss"]
    return result[metric] > kept[metric]


def warn_if_constant(metric: str, values: Sequence[float], stopped: bool) -> None:
    """Warn that `metric` was equal at all validations, so it chose nothing; stopped: the run ended by patience."""
    if len(values) < 2 or len(set(values)) > 1:
        return
    if metric == "loss":
        result = "so the first one counts as the best" + ", and the run ended early" * stopped
        remedy = "try a higher --learning_rate"
    else:
        result = "so the lowest dev loss chose the best one" + " and ended the run early" * stopped
        remedy = "--val_metric loss looks at the dev loss alone"
    same = f"{metric} was {values[0]:.4g} at each of the {len(values)} validations"
    logger.warning("%s, %s; %s", same, result, remedy)


def save(model: Any, directory: Path, step: int, scores: Mapping[str, Any] | None = None) -> None:
    """Save a checkpoint that names the step of its weights; scores: for a prefix's model card."""
    model.task = {**model.task, "step": step}
    model.save(directory, scores)


def kept_step(output: Path) -> int | None:
    """The step of the weights in OUTPUT/best; None if there are none, or the step is not recorded."""
    return checkpoint.saved_task(output / BEST).get("step") if (output / BEST).is_dir() else None


def chosen(output: Path, training: Mapping[str, Any]) -> Path:
    """The checkpoint that a run decodes: the best one if it was kept, else the last.

    training: the run's entry in results.json.
    """
    return output / BEST if training.get("best") and (output / BEST).is_dir() else output


def restore(model: Any, output: Path, training: Mapping[str, Any]) -> None:
    """Load the weights of the checkpoint `chosen` into a run's model, which holds its last weights."""
    step = training["steps"]
    if chosen(output, training) != output:
        step = training["best"]["step"]
        model.load_weights(output / BEST)
    model.task = {**model.task, "step": step}
