"""The training loop on transformers.Trainer: objectives, distillation, checkpoints that a kill cannot break, logging.

Legend: B batch, T tokens, S scored tokens of the batch (labels that count), N matched positions, V vocabulary.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from gpt2.callbacks import ExactResume, LogLines, diverged
from gpt2.dataset import IGNORED
from gpt2.frozen_lm import max_positions
from gpt2.train_control import FAMILY
from prefixlib.base_model.load import freeze, load_model
from prefixlib.checkpoints import checkpoint, folder, original
from prefixlib.compute.accumulation import OncePerStep
from prefixlib.system import files
from prefixlib.system.errors import UserError

logger = logging.getLogger(__name__)

SUMS = "loss_sums.json"  # in a checkpoint: what the next logged training loss is made of


def row_losses(nll: Tensor, rows: Tensor, labels: Tensor, text_lengths: Tensor, mode: int) -> Tensor:
    """The original's five objectives; the loss of a batch is the mean of what is returned.

    Args:
        nll: (S,) negative log-likelihood of every scored token.
        rows: (S,) the row of the batch each belongs to.
        labels: (B, T) with IGNORED where nothing is scored.
        text_lengths: (B,) tokens of the row that are neither separator, eos nor padding (mode 4).
        mode: 0 mean over tokens -> (1,); else per row (B,): 1 sum, 2 sum / (T - 1), 3 sum / longest scored row,
            4 sum / text length.
    """
    if mode == 0:
        return nll.sum().unsqueeze(0) / max(len(nll), 1)
    sums = nll.new_zeros(labels.shape[0]).index_add(0, rows, nll)
    if mode == 1:
        return sums
    if mode == 2:
        return sums / (labels.shape[1] - 1)
    if mode == 3:
        return sums / labels[:, 1:].ne(IGNORED).sum(dim=1).max()
    return sums / text_lengths


def is_exhausted(losses: Sequence[float], patience: int) -> bool:
    """True where the last `patience` of the dev losses brought no lower one; never for a negative patience."""
    return 0 < patience < len(losses) and min(losses[-patience:]) >= min(losses[:-patience])


@dataclass(frozen=True)
class Distillation:
    """The model to learn from (the original's --distill yes), frozen and in eval mode, and how it is matched.

    It is no part of the model that is trained, so it is neither saved nor moved.
    """

    teacher: nn.Module
    objective: str  # "kl" or "logits"
    positions: str  # "all", "text" or "target"
    top_k: int = 0  # kl: over the teacher's most probable tokens; 0 for all

    def row_losses(self, student: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Loss (B,) of the student's logits (B, T, V) on a batch from `collate`; the training loss is its mean.

        The teacher reads the same ids without the prefix.
        """
        with torch.no_grad():
            teacher = self.teacher(input_ids=inputs["input_ids"], use_cache=False).logits
        positions = matched_positions(inputs["labels"], inputs["attention_mask"], self.positions)
        return matching_losses(student, teacher, positions, self.objective, self.top_k)


def matched_positions(labels: Tensor, attention_mask: Tensor, which: str) -> Tensor:
    """Where student and teacher are compared, bool (B, T): position t stands for the distribution of token t + 1.

    which: "all" every position, source, separator and padding included (the original's); "text" all but padding;
        "target" those whose next token is scored (`labels`, (B, T)).
    Under "all" a row's loss depends on its neighbours: a row is padded to the longest one beside it, and its padding
    counts. That repeats for the same batches, so a run and its resumption agree, but two processes each pad their own
    half of a batch. Under "text" and "target" a row's loss is the row's alone.
    """
    if which == "all":
        return torch.ones_like(attention_mask, dtype=torch.bool)
    if which == "text":
        return attention_mask.bool()
    if which != "target":
        raise ValueError(f"positions {which!r}: 'all', 'text' or 'target'")
    return torch.cat([labels[:, 1:].ne(IGNORED), labels.new_zeros(len(labels), 1, dtype=torch.bool)], dim=1)


def matching_losses(student: Tensor, teacher: Tensor, positions: Tensor, objective: str, top_k: int = 0) -> Tensor:
    """Distance of the student from the teacher, summed over the matched positions of each row: (B,).

    Args:
        student, teacher: logits (B, T, V), compared in float32.
        positions: (B, T) bool, see `matched_positions`.
        objective: "kl": sum over the vocabulary of p_T (log p_T - log p_S); "logits": L2 norm of the difference.
        top_k: kl: sum over the teacher's K most probable tokens alone (Eyuboglu et al. 2025); 0 for all.
    """
    student, teacher = student[positions].float(), teacher[positions].float()  # (N, V)
    if objective == "kl":
        log_teacher, log_student = teacher.log_softmax(dim=-1), student.log_softmax(dim=-1)
        if top_k:
            log_teacher, tokens = log_teacher.topk(min(top_k, log_teacher.shape[-1]), dim=-1)
            log_student = log_student.gather(-1, tokens)
        distances = (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1)
    elif objective == "logits":
        distances = torch.linalg.vector_norm(student - teacher, dim=-1)
    else:
        raise ValueError(f"objective {objective!r}: 'kl' or 'logits'")
    rows = positions.nonzero()[:, 0]
    return distances.new_zeros(len(positions)).index_add(0, rows, distances)


def load_teacher(directory: Path, mode: str, student: nn.Module, longest: int, dtype: torch.dtype) -> nn.Module:
    """The fine-tuned model in `directory`. Raises UserError where the student cannot learn from it.

    student: the base model behind the prefix, whose tokens the teacher must share. longest: tokens of the longest text.
    """
    flag = f"--finetuned_model_path {directory}"
    if not (directory / "config.json").is_file() or original.is_prefix(directory):
        raise UserError(f"{flag}: no fine-tuned model there (a folder that --tuning_mode finetune has written)")
    task = checkpoint.load_task(directory)
    if task.get("tuning_mode") not in (None, "finetune", "finetune-top"):
        raise UserError(f"{flag} holds a model of --tuning_mode {task['tuning_mode']}; a teacher is a fine-tuned one")
    checkpoint.check_agrees({"mode": mode}, {"mode": task.get("mode") or mode}, directory)
    teacher = load_model(str(directory), FAMILY, dtype=dtype)
    sizes = [model.get_input_embeddings().num_embeddings for model in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise UserError(f"{flag} has a vocabulary of {sizes[0]} tokens, the model to train one of {sizes[1]}")
    if max_positions(teacher.config) < longest:
        raise UserError(f"{flag} has {max_positions(teacher.config)} positions, the texts may have {longest} tokens")
    return freeze(teacher)


class PrefixTrainer(Trainer):
    """Trainer of a PrefixLM under an objective mode; fine-tuning takes mode 0, the mean over tokens.

    With `distillation` it is trained to match the teacher alone; its dev loss stays the objective mode's.
    `save_model_to(directory)` writes the model in its own format; `load_model_from(directory)` reads it back on resume.
    """

    def __init__(
        self,
        *args,
        objective_mode: int,
        separator_id: int,
        save_model_to: Callable[[Path], None],
        load_model_from: Callable[[Path], None],
        keep_best: bool = False,
        patience: int = -1,
        distillation: Distillation | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.objective_mode = objective_mode
        self.separator_id = separator_id
        self.save_model_to = save_model_to
        self.load_model_from = load_model_from
        self.keep_best = keep_best
        self.patience = patience
        self.distillation = distillation
        self.once_per_step, prefix = None, self.model.prefix
        if hasattr(prefix, "flat"):
            OncePerStep.remove(prefix)  # an earlier trainer's
            if self.args.gradient_accumulation_steps > 1:
                self.once_per_step = OncePerStep(prefix)
        if distillation is not None:
            distillation.teacher.to(self.args.device)
        self.model_accepts_loss_kwargs = True  # or the losses below would be divided by the number of micro-batches
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.add_callback(LogLines(bar=not self.args.disable_tqdm))
        self.add_callback(ExactResume(self))
        self.dev_sums = torch.zeros(2)  # of an evaluation so far: the tokens' losses, and their number
        self.resumed_from: Path | None = None

    def training_step(self, model, *args, **kwargs):
        """A micro-batch forward and backward; with the last one of a step, through the prefix network too."""
        loss = super().training_step(model, *args, **kwargs)
        if self.once_per_step is not None and self.accelerator.sync_gradients:
            self.once_per_step.backward()
        return loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of one optimiser step, and what its loss is a mean over: the tokens or texts of all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and self.accelerator.gradient_state.end_of_dataloader:
            batches[-1] = self._without_fillers(batches[-1])
        counts = [self._counted(batch["labels"]).sum() for batch in batches]
        return batches, self.accelerator.reduce(sum(counts).to(device), reduction="sum") if counts else None

    def _without_fillers(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """An epoch's last batch without the texts that give every process as many rows, which count for nothing.

        A process that has fillers alone keeps one without labels: every process takes part in the backward pass.
        """
        size = self.args.per_device_train_batch_size
        left = len(self.train_dataset) % (size * self.args.world_size) or size * self.args.world_size
        mine = left - size * self.args.process_index
        batch = {name: tensor[: max(mine, 1)] for name, tensor in batch.items()}
        return batch if mine > 0 else {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}

    def _counted(self, labels: Tensor) -> Tensor:
        """What the loss of a batch is a mean over: its scored tokens (B, T - 1) or, per text, its texts (B,)."""
        scored = labels[:, 1:].ne(IGNORED)
        return scored if self.over_tokens else scored.any(dim=1)

    @property
    def over_tokens(self) -> bool:
        """Whether the training loss is a mean over tokens; otherwise it is one over texts."""
        return self.objective_mode == 0 and self.distillation is None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Scalar loss of a batch from `collate`; in training its part of the loss of the whole optimiser step.

        The parts of a step's batches add up to the mean over its tokens or texts. DDP averages the processes' parts, so
        each is multiplied by the number of processes.
        """
        losses = self._losses(model, inputs)
        if num_items_in_batch is None or not model.training:
            loss = losses.mean()
        else:
            counted = losses if self.over_tokens else losses[self._counted(inputs["labels"])]
            loss = counted.sum() * self.accelerator.num_processes / num_items_in_batch
        return (loss, {"loss": loss}) if return_outputs else loss

    def _losses(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """The losses (S,) of the scored tokens in objective mode 0, else (B,) of the texts."""
        input_ids, labels = inputs["input_ids"], inputs["labels"]
        if self.distillation is not None and model.training:
            return self.distillation.row_losses(model(input_ids), inputs)
        source = inputs.get("source"), inputs.get("source_mask")
        nll, rows = model(input_ids, labels, *source, attention_mask=inputs["attention_mask"])
        if self.objective_mode == 0:
            return nll
        is_text = inputs["attention_mask"].bool() & input_ids.ne(self.separator_id)
        return row_losses(nll, rows, labels, is_text.sum(dim=1), self.objective_mode)

    def prediction_step(self, model, inputs, *args, **kwargs):
        """As Trainer does it, without the texts that fill up the processes' last batches a second time.

        One row stays in any case: every process takes part in a forward pass whose layers are sharded.
        """
        state, mine = self.accelerator.gradient_state, 1
        if state.end_of_dataloader and state.remainder > 0:
            mine = state.remainder - self.args.process_index * self.args.per_device_eval_batch_size
            inputs = {name: tensor[: max(mine, 1)] for name, tensor in inputs.items()}
        found = super().prediction_step(model, inputs, *args, **kwargs)
        if mine > 0:
            tokens = inputs["labels"][:, 1:].ne(IGNORED).sum().double()
            self.dev_sums += torch.stack([found[0].double() * tokens, tokens])
        return found

    def evaluation_loop(self, *args, **kwargs):
        """As Trainer, but a mean over tokens is one over the tokens of the whole dev set, not over its batches."""
        self.dev_sums = torch.zeros(2, dtype=torch.double, device=self.args.device)
        output = super().evaluation_loop(*args, **kwargs)
        if self.objective_mode == 0:
            total, count = self.accelerator.reduce(self.dev_sums, reduction="sum").tolist()
            output.metrics["eval_loss"] = total / count
        return output

    def evaluate(self, *args, **kwargs):
        """Evaluate; with `keep_best`, a lower dev loss than any before replaces the checkpoint in OUTPUT/best."""
        earlier = [row["eval_loss"] for row in self.state.log_history if "eval_loss" in row]  # of a resumed run too
        with torch.random.fork_rng(devices=[]):  # evaluating must not change later dropout: resumed runs would differ
            metrics = super().evaluate(*args, **kwargs)
        is_best = metrics["eval_loss"] < min(earlier, default=math.inf)
        if self.keep_best and is_best and self.args.should_save:
            folder.replace_folder(Path(self.args.output_dir) / "best", self.save_model_to)
        if self.is_in_train and is_exhausted([*earlier, metrics["eval_loss"]], self.patience):
            logger.info("no better dev loss in %d evaluations: training stops here", self.patience)
            self.control.should_training_stop = True
        return metrics

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        if self.args.should_save:
            self.save_model_to(Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self.resumed_from = Path(resume_from_checkpoint)
        self.load_model_from(self.resumed_from)

    def load_loss_sums(self) -> None:
        """Restore the loss sums of the checkpoint that is resumed: over all steps, and since the last log."""
        path = self.resumed_from and self.resumed_from / SUMS
        if path and path.is_file():  # earlier versions wrote none
            sums = json.loads(path.read_text(encoding="utf-8"))
            self._total_loss_scalar, self._globalstep_last_logged = sums["logged"], sums["logged_step"]
            if len(sums["since"]) == self.args.world_size:
                self._tr_loss = self._tr_loss + sums["since"][self.args.process_index]

    def restore_end(self, directory: Path, state: TrainerState) -> float | None:
        """Restore the state after the last step from that step's checkpoint; returns the mean training loss."""
        self._load_from_checkpoint(str(directory))
        self.state, self._tr_loss, self._total_loss_scalar = state, torch.zeros((), device=self.args.device), 0.0
        self.load_loss_sums()
        mean = (self._total_loss_scalar + self._tr_loss.item()) / max(state.global_step, 1)
        last = {"total_flos": state.total_flos, "train_loss": mean, "epoch": state.epoch, "step": state.global_step}
        state.log_history.append({**last, "num_input_tokens_seen": state.num_input_tokens_seen})
        return mean if (directory / SUMS).is_file() else None

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As Trainer does, but the final mean training loss is that of all steps, in a resumed run too."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, *args, **kwargs)

    def _get_output_dir(self, trial) -> str:
        """Where Trainer puts `checkpoint-N`: a side folder, from which `_save_checkpoint` moves it once it is whole."""
        return os.path.join(self.args.output_dir, files.CHECKPOINTS)

    def _save_checkpoint(self, model, trial) -> None:
        """Write checkpoint-N aside, sync it, rename it: a killed run leaves the last good one."""
        broken = [name for name, p in model.named_parameters() if p.requires_grad and not p.isfinite().all()]
        if broken:
            raise diverged(self.state.global_step, f"{broken[0]} is not finite")
        side, output = Path(self._get_output_dir(trial)), Path(self.args.output_dir)
        if self.args.should_save:
            files.clear_checkpoints(side)
        self.accelerator.wait_for_everyone()
        with files.writing(output / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)
        since = self.accelerator.gather(self._tr_loss.reshape(1)).tolist()
        if self.args.should_save:
            name = f"checkpoint-{self.state.global_step}"
            sums = {"since": since, "logged": self._total_loss_scalar, "logged_step": self._globalstep_last_logged}
            files.write_json(side / name / SUMS, sums)
            files.move_whole(side / name, output / name)
            files.clear_checkpoints(side)
            if self.args.save_total_limit:
                keep_newest(output)


def keep_newest(output: Path) -> None:
    """Remove every checkpoint-N in `output` but the newest: its own files, and the folder where it holds no others."""
    newest = get_last_checkpoint(str(output))
    for earlier in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if newest is not None and earlier != Path(newest) and earlier.name.rpartition("-")[2].isdecimal():
            folder.clear_checkpoint(earlier)
