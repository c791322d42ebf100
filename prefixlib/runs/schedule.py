"""The learning-rate schedule of a resumed run, and the record of a finished run that is prolonged."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from prefixlib.settings.training import LENGTH

logger = logging.getLogger(__name__)

EARLIER = "earlier_schedules"  # in a checkpoint: one entry per completed schedule, oldest first


def prolong(
    where: Any, earlier: Sequence[Mapping[str, Any]], old: Mapping[str, Any], new: Mapping[str, Any], step: int
) -> list[dict[str, Any]]:
    """Log that the finished run in `where` resumes from `step`; returns the new value of EARLIER.

    old, new: the settings of LENGTH before and now.
    """
    was, now = (" ".join(f"--{name} {values.get(name)}" for name in LENGTH) for values in (old, new))
    logger.info(
        "the run in %s ended at step %d (%s); it is prolonged (%s): from here the learning rate follows a new schedule",
        *(where, step, was, now),
    )
    return [*map(dict, earlier), {"last_step": step, **{name: old.get(name) for name in LENGTH}}]


def set_rates(optimizer: Optimizer, schedule: LambdaLR) -> None:
    """Set the optimizer's rates to the schedule's: a checkpoint of another schedule has loaded its own."""
    both = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    rates = [base * factor(schedule.last_epoch) for base, factor in both]
    schedule.load_state_dict({**schedule.state_dict(), "_last_lr": rates})
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
