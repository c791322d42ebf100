"""Distillation: a prefix learns a fine-tuned model's distributions instead of the texts (the original's --distill yes).

Legend: B batch, T tokens of the longest row, N matched positions of the batch, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gpt2.dataset import IGNORED
from gpt2.prefix_config import max_positions
from gpt2.train_control import FAMILY
from prefixlib import checkpoint
from prefixlib.base_model import freeze, load_model
from prefixlib.errors import UserError


@dataclass(frozen=True)
class Distillation:
    """The model to learn from, frozen and in eval mode, and how its distributions are matched.

    It is no part of the model that is trained, so it is neither saved nor moved.
    """

    teacher: nn.Module
    objective: str  # "kl" or "logits"
    positions: str  # "all", "text" or "target"

    def row_losses(self, student: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Loss (B,) of the student's logits (B, T, V) on a batch from `collate`; the training loss is its mean.

        The teacher reads the same ids without a prefix, so its positions start at 0.
        """
        with torch.no_grad():
            teacher = self.teacher(input_ids=inputs["input_ids"], use_cache=False).logits
        positions = matched_positions(inputs["labels"], inputs["attention_mask"], self.positions)
        return matching_losses(student, teacher, positions, self.objective)


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


def matching_losses(student: Tensor, teacher: Tensor, positions: Tensor, objective: str) -> Tensor:
    """Distance of the student from the teacher, summed over the matched positions of each row: (B,).

    Args:
        student, teacher: logits (B, T, V), compared in float32.
        positions: (B, T) bool, see `matched_positions`.
        objective: "kl": sum over the vocabulary of p_T (log p_T - log p_S); "logits": L2 norm of the difference.
    """
    student, teacher = student[positions].float(), teacher[positions].float()  # (N, V)
    if objective == "kl":
        log_teacher = teacher.log_softmax(dim=-1)
        distances = (log_teacher.exp() * (log_teacher - student.log_softmax(dim=-1))).sum(dim=-1)
    elif objective == "logits":
        distances = torch.linalg.vector_norm(student - teacher, dim=-1)
    else:
        raise ValueError(f"objective {objective!r}: 'kl' or 'logits'")
    rows = positions.nonzero()[:, 0]
    return distances.new_zeros(len(positions)).index_add(0, rows, distances)


def load_teacher(directory: Path, mode: str, student: nn.Module, room: int, dtype: torch.dtype) -> nn.Module:
    """The fine-tuned model in `directory`. Raises UserError where the student cannot learn from it.

    student: the base model behind the prefix, whose tokens the teacher must share. room: the longest text's tokens.
    """
    flag = f"--finetuned_model_path {directory}"
    if not (directory / "config.json").is_file() or checkpoint.is_prefix(directory):
        raise UserError(f"{flag}: no fine-tuned model there (a folder that --tuning_mode finetune has written)")
    task = checkpoint.load_task(directory)
    if task.get("tuning_mode") not in (None, "finetune", "finetune-top"):
        raise UserError(f"{flag} holds a model of --tuning_mode {task['tuning_mode']}; a teacher is a fine-tuned one")
    checkpoint.check_agrees({"mode": mode}, {"mode": task.get("mode") or mode}, directory)
    teacher = load_model(str(directory), FAMILY, dtype=dtype)
    sizes = [model.get_input_embeddings().num_embeddings for model in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise UserError(f"{flag} has a vocabulary of {sizes[0]} tokens, the model to train one of {sizes[1]}")
    if max_positions(teacher.config) < room:
        raise UserError(f"{flag} has {max_positions(teacher.config)} positions, the texts may have {room} tokens")
    return freeze(teacher)
