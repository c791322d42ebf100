"""The prefix network once per optimiser step, however many micro-batches the step accumulates."""

import torch
from torch import Tensor, nn

Made = Tensor | dict[str, Tensor]


class OncePerStep:
    """Replaces `module.flat()`: all micro-batches of an optimiser step share one run of it.

    The first micro-batch runs the network; every one gets the same leaves, in which the gradients add up; `backward`
    then passes the sums through the network once. By the chain rule the result equals one run per micro-batch.
    """

    def __init__(self, module: nn.Module):
        self.compute = type(module).flat.__get__(module)
        self.outputs: dict[str, Tensor] = {}
        self.leaves: dict[str, Tensor] = {}
        module.flat = self

    @staticmethod
    def remove(module: nn.Module) -> None:
        """Restore the module's own `flat()`."""
        module.__dict__.pop("flat", None)

    def __call__(self) -> Made:
        """The result of the module's own `flat`, computed once per `backward`, or anew when gradients are off."""
        if not torch.is_grad_enabled():
            return self.compute()
        if not self.leaves:
            computed = self.compute()
            self.outputs = computed if isinstance(computed, dict) else {"": computed}
            # float32 under autocast too: many micro-batches' gradients add up here
            self.leaves = {name: _wide(tensor).requires_grad_() for name, tensor in self.outputs.items()}
        return self.leaves.get("", self.leaves)

    def backward(self) -> None:
        """Pass the gradients so far to the network, and forget them. Call this before the optimiser's step."""
        reached = [name for name, leaf in self.leaves.items() if leaf.grad is not None]
        if reached:
            outputs = [self.outputs[name] for name in reached]
            sums = [self.leaves[name].grad.to(self.outputs[name].dtype) for name in reached]
            torch.autograd.backward(outputs, sums)
        self.outputs, self.leaves = {}, {}


def _wide(tensor: Tensor) -> Tensor:
    """The tensor detached from the graph, in at least float32."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
