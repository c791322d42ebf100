"""Bottleneck adapters (Houlsby et al. 2019): small trained networks inside a frozen model (the paper's section 5.2).

Design 1: one adapter per layer, on its output:            x + Up(ReLU(Down(LayerNorm(x))))
Design 2: one per sub-layer, before its residual add:      y + Up(ReLU(Down(y)))
          y is the output of an attention (of both, in an encoder-decoder's decoder) or of the feed-forward network.

An adapter is a child, `adapter_block`, of the module whose output it changes, and runs in that module's forward hook:
saving, deepcopy, activation checkpointing and DDP see ordinary modules. The model's config says that it has adapters.

Legend: E hidden size, b bottleneck.
"""

from inspect import signature
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig

from prefixlib.methods.layers import find_stacks, is_attention
from prefixlib.system.errors import UserError

NAME = "adapter_block"  # part of the parameters' names; the original trains exactly the parameters with this name
DESIGN, BOTTLENECK = "adapter_design", "adapter_bottleneck"  # in the model's config
INITIAL_STD = 0.02  # the original's value, transformers' default: not the near-identity of later adapters
EPSILONS = ("layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps")  # of the model's own norms; BART's is torch's 1e-5
FEED_FORWARD = ("mlp", "feed_forward", "ffn", "fc2")  # fc2: BART's and OPT's last layer of it


class Adapter(nn.Module):
    """(..., E) -> (..., E): x + Up(ReLU(Down(x))), with a LayerNorm before Down in design 1."""

    def __init__(self, width: int, bottleneck: int, *, norm_eps: float | None = None, **factory: Any):
        super().__init__()
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(width, eps=norm_eps, **factory)
        self.down = nn.Linear(width, bottleneck, **factory)
        self.up = nn.Linear(bottleneck, width, **factory)
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=INITIAL_STD)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(torch.relu(self.down(self.norm(x))))


def apply(model: nn.Module, adapter_design: int, adapter_bottleneck: int) -> None:
    """Insert adapters into a model and train nothing else: --tuning_mode adaptertune."""
    insert(model, adapter_design, adapter_bottleneck)
    train_only_adapters(model)


def insert(model: nn.Module, design: int, bottleneck: int) -> None:
    """Put new adapters into every layer of a transformers model and note them in its config; freezes nothing.

    Raises UserError if the model has adapters already, or has no place for them.
    """
    if any(NAME in name for name, _ in model.named_parameters()):
        raise UserError("--tuning_mode adaptertune: the base model has adapters already; take one without")
    text = model.config.get_text_config(decoder=True)
    eps = next((getattr(text, key) for key in EPSILONS if hasattr(text, key)), 1e-5)
    places = [
        (getattr(holder, "config", text).hidden_size, place)  # T5Gemma's encoder can be wider than its decoder
        for holder, layers in find_stacks(model)
        for layer in layers
        for place in _places(layer, design)
    ]
    for width, module in places:
        parameter = next(module.parameters())
        adapter = Adapter(
            width,
            bottleneck,
            norm_eps=eps if design == 1 else None,
            device=parameter.device,
            dtype=parameter.dtype,
        )
        setattr(module, NAME, adapter)
        module.register_forward_hook(_adapt)
    setattr(model.config, DESIGN, design)
    setattr(model.config, BOTTLENECK, bottleneck)


def _places(layer: nn.Module, design: int) -> list[nn.Module]:
    """The modules of a layer whose outputs are adapted."""
    if design == 1:
        return [layer]
    attentions = [child for child in layer.children() if is_attention(child)]
    feed_forward = next((getattr(layer, name) for name in FEED_FORWARD if hasattr(layer, name)), None)
    # BLOOM's modules add the residual themselves, so their output is too late
    places = [*attentions, feed_forward]
    if not attentions or feed_forward is None or any("residual" in signature(m.forward).parameters for m in places):
        raise UserError(f"--adapter_design 2: {type(layer).__name__} has no place for it; take --adapter_design 1")
    return places


def _adapt(module: nn.Module, _inputs: tuple, output: Tensor | tuple) -> Tensor | tuple:
    """Forward hook: pass the module's output, or the first of its outputs, through the module's adapter."""
    adapter = getattr(module, NAME)
    return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)


def train_only_adapters(model: nn.Module) -> list[str]:
    """Freeze everything but the adapters; returns the names of the trained parameters."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(NAME in name)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def has_adapters(config: PreTrainedConfig) -> bool:
    """True where the config of a model says that it was saved with adapters."""
    return getattr(config, DESIGN, None) is not None and getattr(config, BOTTLENECK, None) is not None


def model_class(config: PreTrainedConfig) -> type:
    """A subclass of the model's class that inserts adapters when built, so that from_pretrained loads their weights."""
    plain = getattr(transformers, config.architectures[0])

    def build(self, config, *args, **kwargs):
        plain.__init__(self, config, *args, **kwargs)
        insert(self, getattr(config, DESIGN), getattr(config, BOTTLENECK))

    return type(plain.__name__, (plain,), {"__init__": build, "__module__": plain.__module__})
