"""Where a run goes on: the checkpoint in its folder, read and checked against the settings; what a run leaves there."""

import glob
import logging
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from transformers import TrainerState
from transformers.trainer import safe_globals
from transformers.trainer_utils import get_last_checkpoint

from gpt2 import building
from gpt2.flags import Settings
from gpt2.train_control import PrefixConfig
from gpt2.trainer_prefix import is_exhausted
from prefixlib.checkpoints import checkpoint, folder
from prefixlib.runs import schedule
from prefixlib.system import schema
from prefixlib.system.errors import UserError, first_line

logger = logging.getLogger(__name__)


class State(TypedDict):
    """What is read of trainer_state.json; the rest is transformers'."""

    global_step: int
    max_steps: int
    log_history: list[dict[str, Any]]


class Optimizer(TypedDict):
    """What is read of optimizer.pt."""

    state: dict[Any, Any]
    param_groups: list[Any]


class RandomState(TypedDict):
    """What is read of rng_state.pth, and of every process's rng_state_N.pth."""

    python: Any
    numpy: Any
    cpu: Any


STATES = {"optimizer": Optimizer, "scheduler": dict[str, Any], "rng_state": RandomState}


def own_files(output: Path) -> tuple[str, ...]:
    """What a run of this tree leaves in `output` beside folder.RUN_FILES and its logs, as patterns."""
    outputs = (f"{glob.escape(output.name)}_{split}_*" for split in ("valid", "test"))
    return ("checkpoint-[0-9]*", "trainer_state.json", *outputs)


@dataclass(frozen=True)
class Resumption:
    """Where a run goes on."""

    directory: Path  # the checkpoint
    state: TrainerState
    ended: bool  # training is complete; only the steps after it may be missing
    earlier: list[dict[str, Any]]  # schedules that ended before: see prefixlib/runs/schedule.py
    task: dict[str, Any]  # the checkpoint's


def find_resume(settings: Settings, output: Path) -> Resumption | None:
    """The checkpoint to go on from, if any. Raises UserError where a result would be overwritten or does not fit."""
    last = get_last_checkpoint(str(output)) if output.is_dir() else None
    if not settings.resume:
        earlier = folder.earlier_run(output, own_files(output))
        if earlier and not settings.overwrite_output_dir:
            raise UserError(
                f"{output} holds an earlier run: --resume yes goes on with it, --overwrite_output_dir yes replaces it, "
                f"--notes or --output_dir keep both (there: {', '.join(earlier[:3])}{', …' * (len(earlier) > 3)})"
            )
        return None
    if last is None:
        logger.info("nothing to resume in %s: starting from the beginning", output)
        return None
    check_resumable(Path(last))
    given = settings.training_settings()
    if checkpoint.is_checkpoint(last):
        saved = checkpoint.read_config(last)
        task = saved["task"]
        prefix = checkpoint.rebuild(PrefixConfig, saved["prefix"], Path(last) / checkpoint.CONFIG)
        loaded = settings.prefix_model_path is not None
        building.check_same_prefix(settings.prefix_settings(), prefix, last, loaded=loaded)
    else:
        task = checkpoint.load_task(last)
        given["lowdata_token"] = settings.source_word()
    state = TrainerState.load_from_json(str(Path(last) / "trainer_state.json"))
    earlier, complete = task.get(schedule.EARLIER, []), state.global_step >= state.max_steps
    wanted = {name: given.get(name) for name in schedule.LENGTH}
    longer = settings.max_steps > state.global_step or (settings.max_steps < 0 and settings.epoch > (state.epoch or 0))
    prolonged = complete and longer and any(task.get(name) != value for name, value in wanted.items())
    if prolonged:
        earlier = schedule.prolong(output, earlier, task, wanted, state.global_step)
        given = {name: value for name, value in given.items() if name not in schedule.LENGTH}
    checkpoint.check_agrees(given, task, last)
    losses = [row["eval_loss"] for row in state.log_history if "eval_loss" in row]
    ended = not prolonged and (complete or is_exhausted(losses, settings.early_stopping_patience))
    return Resumption(Path(last), state, ended, earlier, task)


def check_resumable(folder: Path) -> None:
    """Raise UserError for a checkpoint-N whose own files of the loop are damaged, before a model is loaded."""
    remedy = f"remove {folder.name}, and --resume yes goes on from an earlier one or from the beginning"
    schema.read(folder / "trainer_state.json", State, remedy)
    for path in sorted([*folder.glob("*.pt"), *folder.glob("*.pth")]):
        try:
            with zipfile.ZipFile(path) as archive:  # what torch.save writes; the hashes inside are compared
                wrong = archive.testzip()
            wrong = wrong or misfit_of_state(path)
        except Exception as error:  # torch.load raises several exception types, for forbidden pickles too
            wrong = first_line(error)
        if wrong:
            raise UserError(f"{path} is damaged ({wrong}); {remedy}")


def misfit_of_state(path: Path) -> str | None:
    """What is wrong with a file of the loop's state, None if nothing is; no code of it is run, no array is read."""
    kind = next((shape for name, shape in STATES.items() if path.name.startswith(name)), Any)
    with safe_globals(), warnings.catch_warnings(action="ignore"):  # as the Trainer reads it
        return schema.misfit(torch.load(path, map_location="cpu", weights_only=True, mmap=True), kind)
