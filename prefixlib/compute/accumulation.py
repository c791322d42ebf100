"""The prefix network once per optimiser step, however many micro-batches the step accumulates."""

import torch
from torch import Tensor, nn

Made = Tensor | dict[str, Tensor]


class OncePerStep:
    """Takes the place of `module.flat()`: all micro-batches of an optimiser step share one run of it.

    The first micro-batch runs the network; every one gets the same leaves, in which the gradients add up; `backward`
    then takes the sums through the network in one go. By the chain rule that is what a run per micro-batch gives.
    """

    def __init__(self, module: nn.Module):
        self.compute = type(module).flat.__get__(module)
        self.made: dict[str, Tensor] = {}
        self.leaves: dict[str, Tensor] = {}
        module.flat = self

    @staticmethod
    def remove(module: nn.Module) -> None:
        """Give `module` its own `flat()` back."""
        module.__dict__.pop("flat", None)

    def __call__(self) -> Made:
        """What the module's own `flat` returns, computed once until the next `backward`; anew without gradients."""
        if not torch.is_grad_enabled():
            return self.compute()
        if not self.leaves:
            made = self.compute()
            self.made = made if isinstance(made, dict) else {"": made}
            # float32 under autocast too: many micro-batches' gradients add up here
            self.leaves = {name: _wide(tensor).requires_grad_() for name, tensor in self.made.items()}
        return self.leaves.get("", self.leaves)

    def backward(self) -> None:
        """Pass the gradients so far to the network, and forget them. To be called before the optimiser's step."""
        reached = [name for name, leaf in self.leaves.items() if leaf.grad is not None]
        if reached:
            made = [self.made[name] for name in reached]
            sums = [self.leaves[name].grad.to(self.made[name].dtype) for name in reached]
            torch.autograd.backward(made, sums)
        self.made, self.leaves = {}, {}


def _wide(tensor: Tensor) -> Tensor:
    """Without its history, in at least float32."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
