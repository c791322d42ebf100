"""The training loop on Lightning: the module, optimiser and schedule, processes, what a checkpoint holds."""

import logging
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor
from transformers import get_scheduler

from prefixlib.base_model import sharding
from prefixlib.checkpoints.checkpoint import check_numbers
from prefixlib.checkpoints.folder import clear_run
from prefixlib.compute.accumulation import OncePerStep
from prefixlib.data.tasks import OWN_DATA
from prefixlib.decoding.search import DecodingRule
from prefixlib.metrics import accuracy, rouge
from prefixlib.runs import record, schedule
from prefixlib.settings.flags import spelled
from prefixlib.system import files, processes
from prefixlib.system.errors import Terminated, UserError
from seq2seq import decoding
from seq2seq.callbacks import RESUME
from seq2seq.flags import Settings
from seq2seq.prefix_lm import PrefixLM
from seq2seq.resuming import OUTPUTS, TRAINING_SETTINGS, Resumption
from seq2seq.utils import INPUTS, ResumableLoader

logger = logging.getLogger(__name__)


class BaseModule(LightningModule):
    """What does not depend on the task: optimiser, random numbers, checkpoints. `total_steps`: of the optimiser."""

    def __init__(self, lm: PrefixLM, settings: Settings, total_steps: int):
        super().__init__()
        self.lm, self.settings, self.total_steps = lm, settings, total_steps
        self.earlier: list[dict[str, Any]] = []  # the schedules before this one, see prefixlib/runs/schedule.py
        self.data: dict[str, Any] = {}  # what is trained on, see prefixlib/data/data_digests.py
        self.on_sigterm = signal.getsignal(signal.SIGTERM)
        self.validated_step = -1  # the optimiser step after which the last validation came
        self.validation_result: dict[str, float] = {}
        accumulates = settings.gradient_accumulation_steps > 1
        self.once_per_step = OncePerStep(lm.prefix) if accumulates and lm.prefix is not None else None
        self.step_sums: list[Tensor] = []  # per batch of the optimiser step so far: its loss, its tokens

    @property
    def world(self) -> int:
        return self.trainer.world_size

    def trainable(self) -> dict[str, Tensor]:
        return {name: parameter for name, parameter in self.lm.named_parameters() if parameter.requires_grad}

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW as in the original: no weight decay on biases and LayerNorm weights, linear decay to 0.

        One pass over the parameters, a prefix network being as large as a small model (fused).
        """
        parameters = self.trainable()
        plain = {name for name in parameters if "bias" in name or "LayerNorm.weight" in name}
        decayed = [p for name, p in parameters.items() if name not in plain]
        others = [p for name, p in parameters.items() if name in plain]
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": self.settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=self.settings.learning_rate,
            betas=(0.9, 0.999),
            eps=1e-8,
            fused=self._may_fuse(),
        )
        schedule = get_scheduler(self.settings.lr_scheduler, optimizer, self.settings.warmup_steps, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _may_fuse(self) -> bool:
        """Not where Lightning refuses to clip: in mixed precision, under an optimiser that could unscale by itself."""
        return not self.settings.fp16 and not (self.settings.bf16 and self.settings.max_grad_norm)

    def configure_model(self) -> None:
        if self.settings.shard_base:
            sharding.shard(self, self.lm.base, self.trainer.strategy.root_device.type)

    def on_fit_start(self) -> None:
        # Lightning keeps the modes that it finds, and from_pretrained leaves eval mode: without this the frozen model's
        # dropout, which the original had on, would silently be off.
        self.train()

    def on_train_start(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.on_sigterm)  # Lightning's own waits for the other processes
        schedule.set_rates(self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler)

    def on_fit_end(self) -> None:
        if self.once_per_step is not None:
            OncePerStep.remove(self.lm.prefix)

    def on_train_epoch_start(self) -> None:
        self.trainer.train_dataloader.batch_sampler.epoch = self.current_epoch

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Dropout depends on seed, batch and process alone, so a resumed run draws what an uninterrupted one draws."""
        number = self.current_epoch * self.trainer.num_training_batches + batch_idx
        torch.manual_seed((self.settings.seed * 1_000_003 + number * self.world + self.global_rank) % 2**63)
        self.trainer.train_dataloader.position = (self.current_epoch, batch_idx + 1)

    def ends_step(self, batch_idx: int) -> bool:
        """Whether the optimiser steps after this batch of an epoch."""
        batch, of_step = batch_idx + 1, self.settings.gradient_accumulation_steps
        return batch % of_step == 0 or batch == self.trainer.num_training_batches

    def on_after_backward(self) -> None:
        """Complete a step's gradients, while they are still scaled for float16 and not clipped."""
        if not self.ends_step(self.trainer.fit_loop.batch_idx):
            return
        if self.once_per_step is not None:
            self.once_per_step.backward()
        of_step = self.settings.gradient_accumulation_steps
        if of_step > 1:
            # Lightning divided each loss by `of_step`, `training_step` by the tokens of the step's first batch, because
            # those of the whole step were not counted yet
            factor = of_step * self.step_sums[0][1] / sum(self.step_sums)[1]
            for parameter in self.trainable().values():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        self.step_sums = []

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        """The trained tensors alone: the frozen model is no part of a checkpoint."""
        return {name: parameter.detach() for name, parameter in self.trainable().items()}

    def load_state_dict(self, state_dict: dict[str, Tensor], *args, **kwargs) -> None:
        parameters = self.trainable()
        if state_dict.keys() != parameters.keys():
            raise UserError(
                f"{RESUME} holds other parameters than this run trains: {_difference(state_dict, parameters)}"
            )
        check_numbers(state_dict, RESUME)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state_dict[name])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["position"] = self.trainer.train_dataloader.state_dict()
        checkpoint["validated"] = {"step": self.validated_step, "result": self.validation_result}
        checkpoint[schedule.EARLIER] = self.earlier
        checkpoint["total_steps"] = self.total_steps
        checkpoint.update(self.data)
        checkpoint["settings"] = {name: spelled(getattr(self.settings, name)) for name in TRAINING_SETTINGS}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        validated = checkpoint["validated"]
        self.validated_step, self.validation_result = validated["step"], validated["result"]


def _difference(one: Mapping, other: Mapping) -> str:
    return ", ".join(sorted(one.keys() ^ other.keys())[:4])


class SummarizationModule(BaseModule):
    """Training and validation of a PrefixLM on batches of Collator."""

    def __init__(self, lm: PrefixLM, settings: Settings, total_steps: int, tokenizer: Any, rule: DecodingRule):
        super().__init__(lm, settings, total_steps)
        self.tokenizer, self.rule = tokenizer, rule

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """The mean over the tokens of the optimiser step, all processes' and batches'; see `on_after_backward`.

        "mean" is that of the whole step, with its last batch; None before.
        """
        total, count = self.lm.loss(*(batch[name] for name in INPUTS), smoothing=self.settings.label_smoothing)
        self.step_sums.append(self._over_processes(torch.stack([total.detach(), count.to(total.dtype)])))
        # DDP divides the sum of the processes' gradients by their number
        loss = total * self.world / self.step_sums[0][1]
        losses, counts = sum(self.step_sums)
        mean = losses / counts if self.ends_step(batch_idx) else None
        tokens = batch["attention_mask"].sum() + count
        return {"loss": loss, "mean": mean, "tokens": tokens.detach() * self.world}

    def on_validation_start(self) -> None:
        sharding.gather(self.lm.base)  # the processes' texts have different lengths
        with torch.no_grad():
            self.prefix = self.lm.layers()  # one run of the network for all batches
        self.own_data = self.settings.mode in OWN_DATA
        self.figures = (*rouge.KINDS.values(), *(("exact_match",) if self.own_data else ()), "length")
        self.sums = torch.zeros(2 + len(self.figures) + 1, dtype=torch.float64)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        total, count = self.lm.loss(*(batch[name] for name in INPUTS))
        texts, past = (batch["input_ids"], batch["attention_mask"]), decoding.Past(self.prefix)
        found = decoding.decode_batch(self.lm.base, *texts, self.rule, past, self.lm.head)
        self.sums[:2] += torch.tensor([total.item(), count.item()])
        for references, hypotheses in zip(batch["references"], found, strict=True):
            if references is not None:  # None: a filler
                tokens = hypotheses[0].tokens
                text = decoding.to_text(self.tokenizer, tokens, verbatim=self.own_data)
                scores = [*rouge.sentence_scores(text, references, self.own_data).values()]
                scores += [100 * accuracy.statistics([text], [references])[0, 0]] if self.own_data else []
                self.sums[2:] += torch.tensor([*scores, len(tokens), 1])

    def on_validation_epoch_end(self) -> None:
        del self.prefix  # the next steps change it
        sharding.scatter(self.lm.base)
        loss, tokens, *sums, examples = self._over_processes(self.sums.float().to(self.device)).tolist()
        self.validated_step = self.trainer.global_step
        self.validation_result = {"loss": loss / tokens}
        for name, value in zip(self.figures, sums, strict=True):
            self.validation_result[name] = value / examples

    def _over_processes(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over the processes."""
        if self.world > 1:
            torch.distributed.all_reduce(values)
        return values


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the file, syncs, renames: a killed run leaves the last good checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        name = f".{Path(path).name}.partial"
        # Lightning's own writing goes by way of a temporary folder; torch.save hides why a file of its own fails
        with files.replacing(path, name) as partial, open(partial, "xb") as file:
            torch.save(checkpoint, file)


def make_logger(report_to: str, output: Path, step: int) -> Logger | None:
    """Who gets the curves. In TensorBoard a run resumed at `step` hides what was logged after it.

    A logger that fails ends with a warning, not with the run.
    """

    def guarded(kind: type[Logger]) -> type[Logger]:
        return record.guarded(kind, ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize"))

    if report_to == "wandb":
        return guarded(WandbLogger)(name=output.name, save_dir=output, project=os.environ["WANDB_PROJECT"])
    if report_to == "mlflow":
        import mlflow  # here: it is an extra

        where = mlflow.get_tracking_uri()  # Lightning would choose a folder of its own
        return guarded(MLFlowLogger)(os.environ["MLFLOW_EXPERIMENT_NAME"], run_name=output.name, tracking_uri=where)
    if report_to == "none":
        return None
    record.quiet_event_writers()
    found = guarded(TensorBoardLogger)(output, name="tensorboard", version="", purge_step=step + 1)
    with record.noting("TensorBoard's curves"):
        _ = found.experiment  # makes the folder
        return found
    return None


def generic_train(
    module: BaseModule,
    settings: Settings,
    output: Path,
    loaders: tuple[ResumableLoader, ResumableLoader],
    callbacks: Sequence[Callback],
    resumption: Resumption | None,
) -> Trainer:
    """Fit `module`; one process, or those that torchrun started. Returns the trainer with the trained module."""
    world, local = processes.world_size(), processes.local_world_size()
    step = resumption.state["global_step"] if resumption else 0
    trainer = Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=local,
        num_nodes=world // local,
        strategy="ddp" if world > 1 else "auto",
        precision="16-mixed" if settings.fp16 else "bf16-mixed" if settings.bf16 else "32-true",
        max_epochs=settings.epoch,  # Checkpoints heeds --max_steps: Lightning's own is resumed wrongly between epochs
        accumulate_grad_batches=settings.gradient_accumulation_steps,
        gradient_clip_val=settings.max_grad_norm or None,
        val_check_interval=settings.eval_steps * settings.gradient_accumulation_steps or None,
        check_val_every_n_epoch=None if settings.eval_steps else 1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # EpochBatches gives every process its part
        logger=make_logger(settings.report_to, output, step) or False,
        log_every_n_steps=settings.logging_steps,
        callbacks=list(callbacks),
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=False,  # the callback Checkpoints does it
        enable_model_summary=False,
        enable_progress_bar=not settings.disable_tqdm,
        default_root_dir=output,
    )
    if resumption is not None:  # Lightning hands a loader its state in the middle of an epoch only
        loaders[0].load_state_dict(resumption.state["position"])
        module.earlier = resumption.earlier
    elif settings.overwrite_output_dir and trainer.is_global_zero:
        clear_run(output, (*OUTPUTS, "tensorboard"))
    try:
        trainer.fit(module, *loaders, ckpt_path=resumption and resumption.path)
    except SystemExit as end:  # what Lightning makes of Ctrl-C
        if not trainer.interrupted:
            raise
        last = f"--resume yes goes on from {output / RESUME}" if (output / RESUME).is_file() else "nothing to resume"
        logger.warning("interrupted; %s", last)
        raise (Terminated if isinstance(end.__context__, Terminated) else KeyboardInterrupt) from end
    return trainer
