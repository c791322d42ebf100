"""Linear layers on the CPU through oneDNN, where it is faster than MKL, torch's library for matrix products.

    install(model)      # all linear layers of a model, in place; does nothing where it would not be faster

MKL uses AVX2 alone on processors that are not Intel's. oneDNN, also part of torch, uses what the processor has: on two
AMD cores with AVX-512 (Zen 5) it reaches 480 instead of 215 GFLOP/s in float32, with the same sums in another order. A
training step takes 0.55 of the time (GPT-2 small, SmolLM2's shape; BART base 0.58). With AVX2 (Zen 3) both take
equally long for large square matrices, but oneDNN needs down to half the time for few rows or many outputs. A training
step then takes 0.81 of the time (GPT-2 small; decoding 0.77), 0.98 (SmolLM2's shape) and 0.91 (BART base).

Legend: M rows, K inputs, N outputs.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

WORTH = 2**19  # fewest multiplications for which a call pays: oneDNN takes 10 µs to prepare one


@cache
def is_faster() -> bool:
    """Whether this processor has AVX2 or AVX-512 and is not Intel's."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    processor = Path("/proc/cpuinfo")
    return processor.is_file() and "GenuineIntel" not in processor.read_text(errors="replace")


@cache
def takes_transposed() -> bool:
    """Whether oneDNN is also faster for transposed weights, whose inputs are not contiguous. With AVX2 MKL is."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def install(model: nn.Module) -> None:
    """Let the linear layers of `model`, GPT-2's transposed ones included, compute through `linear`.

    Parameters, names, shapes and types do not change: a layer gets a subclass of its own class. With AVX2 the frozen
    weights of GPT-2's widening layers are stored anew (`_move`): MKL is slow at many outputs, so oneDNN computes their
    forward pass, and the backward pass of layers that narrow.
    """
    if not is_faster():
        return
    for module in model.modules():
        module.__class__ = FASTER.get(type(module), type(module))
        if isinstance(module, TransposedLinear) and not takes_transposed():
            inputs, outputs = module.weight.shape
            if outputs > inputs:
                _move(module)


def prepare_to_decode(model: nn.Module) -> None:
    """Lay out the frozen weights of all of GPT-2's layers anew, after `install`.

    This is faster forward and as much slower backward. Nothing is done in a run of several processes, which may share
    the layers out among themselves.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return
    for module in model.modules():
        if isinstance(module, TransposedLinear):
            _move(module)


def _move(layer: "TransposedLinear") -> None:
    """Store the layer's frozen weight as a linear layer does; its shape and values do not change.

    A weight that was mapped from a file then counts as the process's own memory.
    """
    if not layer.weight.requires_grad and _is_plain(layer.weight):
        layer.weight.data = layer.weight.data.t().contiguous().t()


def trains_attention_faster_in_float32(query: Tensor) -> bool:
    """Whether torch's attention is slower backward for the bfloat16 `query` than for the same values in float32.

    Attention multiplies with MKL, which has no fast bfloat16 product for these processors.
    """
    if query.device.type != "cpu" or not query.requires_grad:
        return False
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else query.dtype
    return dtype == torch.bfloat16 and is_faster()


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear: inputs (..., K), weight (N, K) of any strides, bias (N,) -> (..., N)."""
    if not _fits(inputs, weight):
        return nn.functional.linear(inputs, weight, bias)
    if not torch.is_grad_enabled():
        return _multiply(inputs, weight, bias)
    rows = inputs.reshape(-1, inputs.shape[-1])  # (M, K)
    # reshaped out here: Gemma 3n changes the result in place, which is forbidden for a view made inside the function
    return _Linear.apply(rows, weight, bias).view(*inputs.shape[:-1], len(weight))


def _fits(inputs: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN accepts these tensors and may be faster: plain float32 on the CPU, and large enough."""
    return (
        inputs.dtype == torch.float32
        and inputs.device.type == "cpu"
        and _is_plain(weight)
        and inputs.numel() * weight.shape[0] >= WORTH
        and not torch.is_autocast_enabled("cpu")
        and is_faster()
    )


def _is_plain(weight: Tensor) -> bool:
    """Whether the tensor is float32 on the CPU, neither quantised nor sharded."""
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and type(weight) in (Tensor, nn.Parameter)


def _multiply(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `linear` without a gradient, with the faster of the two libraries."""
    faster = _product if weight.stride(-1) == 1 or takes_transposed() else nn.functional.linear
    return faster(inputs, weight, bias)


def _product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """The operator has no derivative of its own."""

    @staticmethod
    def forward(ctx, inputs, weight, bias):
        ctx.save_for_backward(inputs if ctx.needs_input_grad[1] else None, weight)
        return _multiply(inputs, weight, bias)

    @staticmethod
    def backward(ctx, upstream):
        inputs, weight = ctx.saved_tensors
        of_inputs, of_weight, of_bias = ctx.needs_input_grad
        return (
            _multiply(upstream, weight.t()) if of_inputs else None,
            _multiply(upstream.t(), inputs.t()) if of_weight else None,
            upstream.sum(dim=0) if of_bias else None,
        )


class Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class TransposedLinear(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.t(), self.bias)


FASTER = {nn.Linear: Linear, Conv1D: TransposedLinear}
