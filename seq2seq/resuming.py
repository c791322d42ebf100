"""Where a run is resumed: its resume.ckpt, read and checked against the settings; what a run leaves in its folder."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from torch import Tensor

from prefixlib.checkpoints.checkpoint import CONFIG, unpickled
from prefixlib.checkpoints.folder import earlier_run
from prefixlib.data.data_digests import Digests, EarlierData
from prefixlib.runs import schedule
from prefixlib.settings.flags import spelled
from prefixlib.system import schema
from prefixlib.system.errors import UserError, first_line
from seq2seq.callbacks import RESUME
from seq2seq.flags import Settings

logger = logging.getLogger(__name__)

# What a run of this tree leaves in its folder beside folder.RUN_FILES and its logs, as patterns.
OUTPUTS = (
    RESUME,
    *(f"{split}_{kind}" for split in ("valid", "test") for kind in ("beam_*", "greedy", "nucleus")),
    *(f"*_{split}_{kind}.jsonl" for split in ("valid", "test") for kind in ("beam", "greedy", "nucleus")),
)
# Settings that shape the weights: a resumed run must repeat them, so the checkpoint has them.
TRAINING_SETTINGS = (
    *("mode", "tuning_mode", "preseqlen", "mid_dim", "use_deep", "dropout", "use_dropout", "init_shallow"),
    "init_text",
    *("use_encoder_prefix", "use_cross_prefix", "use_self_prefix", "bsz", "gradient_accumulation_steps", "epoch"),
    *("max_steps", "learning_rate", "lr_scheduler", "warmup_steps", "weight_decay", "max_grad_norm", "n_train"),
    *("group_by_length", "label_smoothing", "seed", "bf16", "fp16", "max_source_length", "max_target_length"),
    *("source_column", "target_column", "source_template"),
    *("top_layers", "top_embeddings", "adapter_design", "adapter_bottleneck", "quantization"),
)


class Position(TypedDict):
    """How far training has come."""

    epoch: int
    batches: int


class Validated(TypedDict):
    """The last validation."""

    step: int
    result: dict[str, Any]


class Resumable(TypedDict):
    """What is read of resume.ckpt; the rest is Lightning's."""

    settings: dict[str, Any]
    position: Position
    validated: Validated
    state_dict: dict[str, Tensor]
    total_steps: NotRequired[int]
    data: NotRequired[Digests]
    earlier_data: NotRequired[list[EarlierData]]


@dataclass(frozen=True)
class Resumption:
    """Where a run is resumed."""

    path: Path
    state: Mapping[str, Any]  # the checkpoint's content
    earlier: list[dict[str, Any]]  # schedules that ended before: see prefixlib/runs/schedule.py


def find_resume(settings: Settings, output: Path) -> Resumption | None:
    """The checkpoint to resume from; None without --resume, or where there is none yet.

    Raises UserError if it is damaged or was made with other settings, but for those that prolong a finished run; or
    if, without --resume, the folder holds an earlier result.
    """
    path = output / RESUME
    earlier = [name for name in (RESUME, CONFIG, "config.json", "model") if (output / name).exists()]
    if not settings.resume:
        earlier = earlier_run(output, OUTPUTS)
        if earlier and not settings.overwrite_output_dir:
            raise UserError(
                f"{output} holds {earlier[0]} of an earlier run: --resume yes, --overwrite_output_dir yes, or "
                "another --output_dir"
            )
        return None
    if not path.is_file():
        if earlier:
            raise UserError(f"{output} holds {earlier[0]} but no {RESUME}, so its run cannot go on: train anew")
        logger.info("nothing to resume in %s: starting from the beginning", output)
        return None
    try:
        state = unpickled(path)
        wrong = schema.misfit(state, Resumable)
    except Exception as error:  # torch.load raises several exception types for a damaged file
        wrong = first_line(error)
    if wrong:
        raise UserError(f"{path} is damaged ({wrong}); train anew")
    saved, earlier = state["settings"], state.get(schedule.EARLIER, [])
    changed = {name: value for name, value in saved.items() if spelled(getattr(settings, name, None)) != value}
    wanted = settings.run_length()
    if changed and changed.keys() <= wanted.keys() and _goes_beyond(wanted, saved, state):
        return Resumption(path, state, schedule.prolong(output, earlier, saved, wanted, state["global_step"]))
    for name, value in changed.items():
        given = spelled(getattr(settings, name, None))
        raise UserError(f"--{name} {given} contradicts {path}, which was made with {value}")
    return Resumption(path, state, earlier)


def _goes_beyond(wanted: Mapping[str, Any], saved: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    """Whether the length `wanted` of a run is more than that of the finished run with the settings `saved`."""
    epochs, step = state["position"]["epoch"], state["global_step"]

    def is_over(epoch: int, max_steps: int) -> bool:
        return epochs >= epoch or 0 < max_steps <= step

    finished = state.get("total_steps") == step or is_over(saved["epoch"], saved["max_steps"])
    return finished and not is_over(wanted["epoch"], wanted["max_steps"])
