"""LightningModule base and trainer: optimiser, schedule, precision, processes, what a checkpoint holds, resuming."""

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor
from transformers import get_scheduler

from prefixlib import files
from prefixlib.accumulation import OncePerStep
from prefixlib.checkpoint import RUN_FILES
from prefixlib.errors import UserError
from seq2seq.prefixTuning import PrefixLM
from seq2seq.utils import ResumableLoader

logger = logging.getLogger(__name__)

RESUME = "resume.ckpt"
# Settings that shape the weights: a resumed run must repeat them, so they stand in the checkpoint.
TRAINING_SETTINGS = (
    *("mode", "tuning_mode", "preseqlen", "mid_dim", "use_deep", "dropout", "use_dropout", "init_shallow"),
    "init_text",
    *("use_encoder_prefix", "use_cross_prefix", "use_self_prefix", "bsz", "gradient_accumulation_steps", "epoch"),
    *("max_steps", "learning_rate", "lr_scheduler", "warmup_steps", "weight_decay", "max_grad_norm", "n_train"),
    *("group_by_length", "label_smoothing", "seed", "bf16", "fp16", "max_source_length", "max_target_length"),
    *("top_layers", "top_embeddings", "adapter_design", "adapter_bottleneck"),
)


class BaseModule(LightningModule):
    """What does not depend on the task. `args`: the flags of flags.py; `total_steps`: the optimiser's steps in all."""

    def __init__(self, lm: PrefixLM, args: argparse.Namespace, total_steps: int):
        super().__init__()
        self.lm, self.args, self.total_steps = lm, args, total_steps
        self.validated_step = -1  # the optimiser step that the last validation was of
        self.validation_result: dict[str, float] = {}
        if lm.prefix is not None:
            lm.prefix.once_per_step = OncePerStep() if args.gradient_accumulation_steps > 1 else None

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
        optimizer = torch.optim.AdamW(
            [
                {
                    "params": [p for name, p in parameters.items() if name not in plain],
                    "weight_decay": self.args.weight_decay,
                },
                {"params": [p for name, p in parameters.items() if name in plain], "weight_decay": 0.0},
            ],
            lr=self.args.learning_rate,
            betas=(0.9, 0.999),
            eps=1e-8,
            fused=self._may_fuse(),
        )
        schedule = get_scheduler(self.args.lr_scheduler, optimizer, self.args.warmup_steps, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _may_fuse(self) -> bool:
        """Not where Lightning refuses to clip: in mixed precision, under an optimiser that could unscale by itself."""
        return self.args.fp16 == "no" and not (self.args.bf16 == "yes" and self.args.max_grad_norm)

    def on_fit_start(self) -> None:
        # Lightning keeps the modes that it finds, and from_pretrained leaves eval mode: without this the frozen model's
        # dropout, which the original had on, would silently be off.
        self.train()

    def on_train_epoch_start(self) -> None:
        self.trainer.train_dataloader.batch_sampler.epoch = self.current_epoch

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Dropout depends on seed, batch and process alone, so a resumed run draws what the whole run drew."""
        number = self.current_epoch * self.trainer.num_training_batches + batch_idx
        torch.manual_seed((self.args.seed * 1_000_003 + number * self.world + self.global_rank) % 2**63)
        self.trainer.train_dataloader.position = (self.current_epoch, batch_idx + 1)

    def on_after_backward(self) -> None:
        """Before the step, and before gradients are unscaled or clipped: through the prefix network at once."""
        once, batch = getattr(self.lm.prefix, "once_per_step", None), self.trainer.fit_loop.batch_idx + 1
        if once is not None and (
            batch % self.args.gradient_accumulation_steps == 0 or batch == self.trainer.num_training_batches
        ):
            once.backward()

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        """The trained tensors alone: the frozen model is no part of a checkpoint."""
        return {name: parameter.detach() for name, parameter in self.trainable().items()}

    def load_state_dict(self, state_dict: dict[str, Tensor], *args, **kwargs) -> None:
        parameters = self.trainable()
        if state_dict.keys() != parameters.keys():
            raise UserError(
                f"{RESUME} holds other parameters than this run trains: {_difference(state_dict, parameters)}"
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state_dict[name])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["position"] = self.trainer.train_dataloader.state_dict()
        checkpoint["validated"] = {"step": self.validated_step, "result": self.validation_result}
        checkpoint["settings"] = {name: getattr(self.args, name) for name in TRAINING_SETTINGS}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.validated_step, self.validation_result = checkpoint["validated"].values()


def _difference(one, other) -> str:
    return ", ".join(sorted(one.keys() ^ other.keys())[:4])


def find_resume(output: Path, args: argparse.Namespace) -> Path | None:
    """The resumable checkpoint to go on from, or None without --resume.

    Raises UserError if there is none, it is damaged or was made with other settings; or if, without --resume, the
    folder holds an earlier result.
    """
    path = output / RESUME
    if args.resume == "no":
        earlier = [name for name in (RESUME, "prefix_config.json", "model") if (output / name).exists()]
        if earlier and args.overwrite_output_dir == "no":
            raise UserError(
                f"{output} holds {earlier[0]} of an earlier run: --resume yes, --overwrite_output_dir yes, or "
                "another --output_dir"
            )
        return None
    if not path.is_file():
        if (output / "results.json").is_file():
            raise UserError(f"--resume yes: the run in {output} has finished; nothing is left to train")
        raise UserError(f"--resume yes: {path} is missing: no checkpoint was written yet; train without --resume")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)["settings"]
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}); train anew") from error
    for name, value in saved.items():
        if getattr(args, name) != value:
            raise UserError(f"--{name} {getattr(args, name)} contradicts {path}, which was made with {value}")
    return path


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the file, syncs, renames: a killed run leaves the last good checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        super().save_checkpoint(checkpoint, partial, storage_options)
        files.sync_file(partial)
        os.replace(partial, path)
        files.sync_directory(path.parent)


def precision(args: argparse.Namespace) -> str:
    """Lightning's name for the precision asked for."""
    return "16-mixed" if args.fp16 == "yes" else "bf16-mixed" if args.bf16 == "yes" else "32-true"


def generic_train(
    module: BaseModule,
    args: argparse.Namespace,
    output: Path,
    loaders: tuple[ResumableLoader, torch.utils.data.DataLoader],
    callbacks: Sequence[Callback],
    resume_from: Path | None,
) -> Trainer:
    """Fit `module`; one process, or those that torchrun started. Returns the trainer, with the module at its end."""
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    trainer = Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=local,
        num_nodes=world // local,
        strategy="ddp" if world > 1 else "auto",
        precision=precision(args),
        max_epochs=args.epoch,
        max_steps=args.max_steps,
        accumulate_grad_batches=args.gradient_accumulation_steps,
        gradient_clip_val=args.max_grad_norm or None,
        val_check_interval=args.eval_steps * args.gradient_accumulation_steps or None,
        check_val_every_n_epoch=None if args.eval_steps else 1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # EpochBatches gives every process its part
        logger=TensorBoardLogger(output, name="tensorboard", version=""),
        log_every_n_steps=args.logging_steps,
        callbacks=list(callbacks),
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=False,  # the callback Checkpoints does it
        enable_model_summary=False,
        enable_progress_bar=args.disable_tqdm == "no",
        default_root_dir=output,
    )
    if resume_from is not None:  # Lightning hands a loader its state in the middle of an epoch only
        loaders[0].load_state_dict(torch.load(resume_from, map_location="cpu", weights_only=True)["position"])
    elif args.overwrite_output_dir == "yes" and trainer.is_global_zero:
        files.clear_run(output, (*RUN_FILES, RESUME, "tensorboard", "test_beam_*"))
    try:
        trainer.fit(module, *loaders, ckpt_path=resume_from)
        if module.validated_step != trainer.global_step:  # --max_steps in the middle of an epoch
            trainer.validate(module, loaders[1], verbose=False)
    except SystemExit as end:  # what Lightning makes of Ctrl-C
        if not trainer.interrupted:
            raise
        last = f"--resume yes goes on from {output / RESUME}" if (output / RESUME).is_file() else "nothing to resume"
        logger.warning("interrupted; %s", last)
        raise KeyboardInterrupt from end
    return trainer
