"""The prefix network once per optimiser step, however many micro-batches the step accumulates."""

from collections.abc import Callable

import torch
from torch import Tensor


class OncePerStep:
    """Tensors that all micro-batches of an optimiser step share.

    The first micro-batch has them made; every one is given the same leaves, in which their gradients add up; `backward`
    then takes the sums through the network in one go. By the chain rule that is what a run per micro-batch gives.
    """

    def __init__(self):
        self.made: dict[str, Tensor] = {}
        self.leaves: dict[str, Tensor] = {}

    def __call__(self, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `make` returns, computed once until the next `backward`; anew where no gradient is taken."""
        if not torch.is_grad_enabled():
            return make()
        if not self.leaves:
            self.made = make()
            # float32 under autocast too: many micro-batches' gradients add up here
            self.leaves = {name: _wide(tensor).requires_grad_() for name, tensor in self.made.items()}
        return self.leaves

    def backward(self) -> None:
        """Hand the gradients so far on to what made the tensors, and forget them. To be called before the step."""
        reached = [name for name, leaf in self.leaves.items() if leaf.grad is not None]
        if reached:
            made = [self.made[name] for name in reached]
            sums = [self.leaves[name].grad.to(self.made[name].dtype) for name in reached]
            torch.autograd.backward(made, sums)
        self.made, self.leaves = {}, {}


def _wide(tensor: Tensor) -> Tensor:
    """Without its history, in at least float32."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
