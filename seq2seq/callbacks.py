"""Callbacks of training: log lines and curves, resumable and best checkpoints, early stopping."""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from prefixlib.checkpoints import best, folder
from prefixlib.system.errors import UserError

logger = logging.getLogger(__name__)

RESUME = "resume.ckpt"


class LogLines(Callback):
    """One readable line per `every` steps: loss, learning rate, tokens per second; the same to --report_to.

    Stops the run on a NaN or infinite loss. `curves` keeps (step, loss) of training ("train") and validation ("dev").
    """

    def __init__(self, every: int):
        self.every = every
        self.curves: dict[str, list[tuple[int, float]]] = {"train": [], "dev": []}
        self.losses: list[torch.Tensor] = []
        self.tokens = self.cut = self.last_step = 0
        self.since = self.paused = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        return {"curves": self.curves, "losses": [loss.cpu() for loss in self.losses], "cut": int(self.cut)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        curves = state["curves"]
        self.curves = {
            "train": curves["train"],
            "dev": curves.get("dev") or curves.get("validation", []),
        }  # former name
        self.losses, self.cut = state.get("losses", []), state.get("cut", 0)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.since, self.last_step = time.perf_counter(), trainer.global_step
        self.losses = [loss.to(module.device) for loss in self.losses]  # those of a resumed run

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if outputs["mean"] is not None:
            self.losses.append(outputs["mean"])
        self.tokens += outputs["tokens"]
        self.cut += batch["cut"]
        step = trainer.global_step
        if step == self.last_step or (step % self.every and step != module.total_steps):
            return
        loss = torch.stack(self.losses).mean().item()
        seconds = time.perf_counter() - self.since
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        if not math.isfinite(loss):
            raise diverged(step, "the loss is not a number")
        figures = {"loss": loss, "lr": rate, "tokens_per_second": int(self.tokens) / seconds}
        self.curves["train"].append((step, loss))
        report(trainer, figures)
        logger.info(
            "step %d/%d  epoch %d  loss %.4f  lr %.3g  tokens/s %s",
            *(step, module.total_steps, trainer.current_epoch + 1, loss, rate),
            f"{figures['tokens_per_second']:,.0f}",
        )
        self.losses, self.tokens, self.last_step, self.since = [], 0, step, time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.cut:
            logger.warning("%d sources were longer than --max_source_length in this epoch and were cut", int(self.cut))
            self.cut = 0

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        result = module.validation_result
        self.curves["dev"].append((trainer.global_step, result["loss"]))
        report(trainer, {f"val_{name}": value for name, value in result.items()})
        logger.info("validation at step %d: %s", trainer.global_step, _figures(result))
        self.since += time.perf_counter() - self.paused  # tokens/s are those of training


def report(trainer: Trainer, figures: dict[str, float]) -> None:
    """Hand figures of the present step to the run's logger, if it has one (--report_to)."""
    if trainer.logger is not None:
        trainer.logger.log_metrics(figures, trainer.global_step)


def _figures(result: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in result.items())


def diverged(step: int, what: str) -> UserError:
    return UserError(
        f"training stopped at step {step}: {what}; try a lower --learning_rate, --max_grad_norm 1, or --bf16 instead "
        "of --fp16 (earlier checkpoints are kept)"
    )


class Checkpoints(Callback):
    """OUTPUT/resume.ckpt every `every` steps and after each epoch; OUTPUT/best whenever validation improves.

    `metric` is a name in the module's validation_result; see `best.is_better`. `patience` validations without
    improvement end the training; -1 never does. `save_best` writes the model into a folder, with the result.
    """

    def __init__(self, output: Path, every: int, metric: str, patience: int, save_best: Callable[[Path, dict], None]):
        self.output, self.every, self.metric, self.patience, self.save_best = output, every, metric, patience, save_best
        self.best: dict[str, float] = {}
        self.values: list[float] = []  # of the metric, one per validation
        self.worse = self.saved_step = 0
        self.due = self.ends_epoch = False

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "worse": self.worse, "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.worse, self.values = state["best"], state["worse"], state.get("values", [])

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.saved_step = trainer.global_step
        # killed after the last step, or after it had decided to stop
        trainer.should_stop = self.saved_step >= module.total_steps or self._is_exhausted()

    def _is_exhausted(self) -> bool:
        return 0 <= self.patience <= self.worse

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            stopped = self._is_exhausted() and trainer.global_step < module.total_steps
            best.warn_if_constant(self.metric, self.values, stopped)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if due; if a validation comes next, only after it, or a resumed run would skip that validation."""
        step = trainer.global_step
        if step == module.total_steps:
            trainer.should_stop = True  # with it comes a validation, wherever in the epoch this is
        self.ends_epoch = batch_idx + 1 == trainer.num_training_batches  # then validation and on_train_epoch_end follow
        self.due = trainer.should_stop or (step != self.saved_step and step % self.every == 0)
        by_steps = trainer.check_val_every_n_epoch is None
        validates = by_steps and (trainer.fit_loop.total_batch_idx + 1) % trainer.val_check_batch == 0
        if self.due and not (self.ends_epoch or validates or trainer.should_stop):
            self._save(trainer, module)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.ends_epoch:
            trainer.train_dataloader.position = (trainer.current_epoch + 1, 0)
            self._save(trainer, module)

    def _save(self, trainer: Trainer, module: LightningModule) -> None:
        broken = [name for name, parameter in module.trainable().items() if not parameter.isfinite().all()]
        if broken:
            raise diverged(trainer.global_step, f"{broken[0]} is not finite")
        self.saved_step, self.due = trainer.global_step, False
        trainer.save_checkpoint(self.output / RESUME)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._keep_best(trainer, module.validation_result)
        if (self.due or trainer.should_stop) and not self.ends_epoch:
            self._save(trainer, module)

    def _keep_best(self, trainer: Trainer, result: dict[str, float]) -> None:
        self.values.append(result[self.metric])
        if best.is_better(result, self.best, self.metric):
            self.best, self.worse = {**result, "step": trainer.global_step}, 0
            if trainer.is_global_zero:
                folder.replace_folder(self.output / "best", lambda folder: self.save_best(folder, self.best))
            return
        self.worse += 1
        if self._is_exhausted():
            logger.info("stopping: %d validations without a better %s", self.worse, self.metric)
            trainer.should_stop = True
