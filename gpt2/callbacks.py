"""Callbacks of training: exact resuming, log lines, curves in TensorBoard."""

import logging
import math
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks
from transformers.trainer_callback import ProgressCallback, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from prefixlib.runs import record
from prefixlib.runs.schedule import set_rates
from prefixlib.system.errors import UserError

logger = logging.getLogger(__name__)


class ExactResume(TrainerCallback):
    """Makes a resumed run identical to an uninterrupted one, its curves and evaluations included."""

    def __init__(self, trainer: Any):
        self.trainer = trainer  # a PrefixTrainer
        self.after_evaluation = False

    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        if state.global_step:
            self.trainer.load_loss_sums()
            set_rates(optimizer, lr_scheduler)
            state.compute_steps(args, state.max_steps)  # the checkpoint has its own --save_steps ...

    def on_step_end(self, args, state, control, **kwargs):
        """A checkpoint of an epoch's last step waits for the evaluation that follows, or resuming would skip it."""
        ends = state.epoch == int(state.epoch) or control.should_training_stop
        if control.should_save and ends and args.eval_strategy == IntervalStrategy.EPOCH:
            control.should_save, self.after_evaluation = False, True

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save |= self.after_evaluation
        self.after_evaluation = False


class _TensorBoard(TensorBoardCallback):
    """Trainer's logs in `directory`; a resumed run hides what was logged after the checkpoint it starts from."""

    def __init__(self, directory: Path):
        super().__init__()
        self.directory = directory

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.tb_writer = SummaryWriter(str(self.directory), purge_step=state.global_step + 1)
        super().on_train_begin(args, state, control, **kwargs)


EVENTS = ("on_train_begin", "on_log", "on_save", "on_train_end")
TensorBoard = record.guarded(_TensorBoard, EVENTS)


def recorders(report_to: str, output: Path) -> list[TrainerCallback]:
    """Who gets the curves. A recorder that fails ends with a warning, not with the run."""
    if report_to == "tensorboard":
        record.quiet_event_writers()
        return [TensorBoard(output / "runs")]  # Trainer's own folder is one for the whole process
    if report_to == "none":
        return []
    return [record.guarded(kind, EVENTS)() for kind in get_reporting_integration_callbacks([report_to])]


class LogLines(ProgressCallback):
    """Trainer's progress bar with one readable line per logging step; stops the run on a NaN or infinite loss."""

    def __init__(self, bar: bool = True):
        super().__init__()
        self.bar = bar
        self.started = self.tokens_before = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.tokens_before = time.perf_counter(), state.num_input_tokens_seen
        if self.bar:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self.bar:
            super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            line = f"loss {logs['loss']:.4f}  lr {logs['learning_rate']:.3g}  grad_norm {logs['grad_norm']:.3g}"
            tokens = state.num_input_tokens_seen - self.tokens_before
            line += f"  tokens/s {tokens / (time.perf_counter() - self.started):,.0f}"
        elif "eval_loss" in logs:
            line = f"dev loss {logs['eval_loss']:.4f}"
        else:
            return
        if state.is_world_process_zero:
            logger.info("step %d/%d  epoch %.2f  %s", state.global_step, state.max_steps, state.epoch or 0, line)
        if not math.isfinite(logs.get("loss", logs.get("eval_loss"))):
            raise diverged(state.global_step, "the loss is not a number")

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar:
            super().on_train_end(args, state, control, **kwargs)


def diverged(step: int, what: str) -> UserError:
    return UserError(
        f"training stopped at step {step}: {what}; try a lower --learning_rate, or --bf16 instead of --fp16 "
        "(earlier checkpoints are kept)"
    )
