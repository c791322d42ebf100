"""Data of this tree."""
from torch import Tensor, nn


def sequence_loss(logits: Tensor, labels: Tensor, padding: int, smoothing: float = 0.0) -> tuple[Tensor, int]:
    real = labels.ne(padding)
    loss = nn.functional.cross_entropy(
        logits[real].float(), labels[real], reduction="sum", label_smoothing=smoothing
    )
    return loss, int(real.sum())
