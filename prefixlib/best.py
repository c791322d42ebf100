"""The best validation of a run: which one it is, and a warning where the figure that chooses never changed."""

import logging
from collections.abc import Mapping, Sequence

logger = logging.getLogger(__name__)


def is_better(result: Mapping[str, float], kept: Mapping[str, float], metric: str) -> bool:
    """Whether a validation's result is better than the best one before it, `kept`, which is empty at first.

    metric: "loss", the lower the better, or a score, the higher the better; a tie goes to the lower loss.
    """
    if not kept:
        return True
    if metric == "loss" or result[metric] == kept[metric]:
        return result["loss"] < kept["loss"]
    return result[metric] > kept[metric]


def warn_if_constant(metric: str, values: Sequence[float], stopped: bool) -> None:
    """Say that `metric` had one value at all validations of a run, so that it chose nothing; stopped: by patience."""
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
