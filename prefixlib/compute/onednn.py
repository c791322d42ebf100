"""Linear layers on the CPU through oneDNN, where it is faster than MKL, which torch multiplies matrices with.

    install(model)      # all linear layers of a model, in place; nothing where it would not be faster

MKL keeps to AVX2 on processors that are not Intel's. oneDNN, also in torch, takes what the processor has: on two AMD
cores with AVX-512 (Zen 5) 480 instead of 215 GFLOP/s in float32, for the same sums in another order. A training step
takes 0.55 of the time (GPT-2 small, SmolLM2's shape; BART base 0.58). With AVX2 (Zen 3) large square matrices take
equally long, but few rows or many outputs take oneDNN down to half of it: of GPT-2 small a training step takes 0.81 of
the time, decoding 0.77; of SmolLM2's shape and BART base a step takes 0.98 and 0.91.

Legend: M rows, K inputs, N outputs.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

WORTH = 2**19  # multiplications from which on a call pays: oneDNN's take 10 µs to prepare


@cache
def is_faster() -> bool:
    """Whether this processor has AVX2 or AVX-512 and is not Intel's."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    processor = Path("/proc/cpuinfo")
    return processor.is_file() and "GenuineIntel" not in processor.read_text(errors="replace")


@cache
def takes_transposed() -> bool:
    """Whether oneDNN is faster for weights whose inputs do not lie side by side in memory too. With AVX2 MKL is."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def install(model: nn.Module) -> None:
    """Let the linear layers of `model`, and GPT-2's, which hold their weights transposed, compute through `linear`.

    Parameters, names, shapes and types stay: a layer gets a subclass of its own class. With AVX2 the frozen weights of
    GPT-2's widening layers are moved (`_move`): MKL is slow at many outputs, so oneDNN computes those forward, as it
    does backward where a layer narrows.
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
    """Move the frozen weights of all of GPT-2's layers, if they came through `install`.

    That is faster forward and as much slower backward. Not where several processes run: layers may be spread over them.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return
    for module in model.modules():
        if isinstance(module, TransposedLinear):
            _move(module)


def _move(layer: "TransposedLinear") -> None:
    """Lay the layer's frozen weight down in memory as a linear layer's; its shape and values stay.

    A weight that was mapped from a file counts as memory of the process from then on.
    """
    if not layer.weight.requires_grad and _is_plain(layer.weight):
        layer.weight.data = layer.weight.data.t().contiguous().t()


def trains_attention_faster_in_float32(query: Tensor) -> bool:
    """Whether torch's attention of bfloat16 `query` is slower backward than that of the same numbers in float32.

    It multiplies with MKL, which has no fast bfloat16 product for these processors.
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
    # reshaped out here: what is a view inside of the function could not be changed in place (Gemma 3n does that)
    return _Linear.apply(rows, weight, bias).view(*inputs.shape[:-1], len(weight))


def _fits(inputs: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN takes these and could be the faster: plain float32 on the CPU, and enough of it."""
    return (
        inputs.dtype == torch.float32
        and inputs.device.type == "cpu"
        and _is_plain(weight)
        and inputs.numel() * weight.shape[0] >= WORTH
        and not torch.is_autocast_enabled("cpu")
        and is_faster()
    )


def _is_plain(weight: Tensor) -> bool:
    """Whether it is float32 on the CPU, neither quantised nor sharded."""
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and type(weight) in (Tensor, nn.Parameter)


def _multiply(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` without a gradient, by the faster of the two libraries."""
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
