"""What the paper compares prefixes with (section 5.2): tuning the top layers alone, and bottleneck adapters.

Adapters (Houlsby et al. 2019) are small networks inside a frozen model.

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

from prefixlib.errors import UserError

NAME = "adapter_block"  # the original trains, and names, exactly the parameters that have this in their name
DESIGN, BOTTLENECK = "adapter_design", "adapter_bottleneck"  # in the model's config
INITIAL_STD = 0.02  # the original's, which is transformers' own: not the near-identity of later adapters
EPSILONS = ("layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps")  # of the model's own norms; BART's is torch's 1e-5
FEED_FORWARD = ("mlp", "feed_forward", "ffn", "fc2")  # fc2: BART's and OPT's second linear layer, where no module is


class Adapter(nn.Module):
    """(..., E) -> (..., E): x + Up(ReLU(Down(x))), with a LayerNorm in front of Down in design 1."""

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


def insert(model: nn.Module, design: int, bottleneck: int) -> None:
    """Put new adapters into every layer of a transformers model and note them in its config; freezes nothing.

    Raises UserError if the model has adapters already, or is built so that they find no place.
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
    # BLOOM's modules add the residual themselves: behind them is too late
    found = [*attentions, feed_forward]
    if not attentions or feed_forward is None or any("residual" in signature(m.forward).parameters for m in found):
        raise UserError(f"--adapter_design 2: {type(layer).__name__} has no place for it; take --adapter_design 1")
    return found


def _adapt(module: nn.Module, _inputs: tuple, output: Tensor | tuple) -> Tensor | tuple:
    """Forward hook: the module's output, or the first of its outputs, through the module's own adapter."""
    adapter = getattr(module, NAME)
    return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)


def train_only_adapters(model: nn.Module) -> list[str]:
    """Freeze everything but the adapters; returns the names of what is trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(NAME in name)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def has_adapters(config: PreTrainedConfig) -> bool:
    """True where the config of a model says that it was saved with adapters."""
    return getattr(config, DESIGN, None) is not None and getattr(config, BOTTLENECK, None) is not None


def model_class(config: PreTrainedConfig) -> type:
    """The model's own class, made to put its adapters in as it is built: from_pretrained then loads theirs too."""
    plain = getattr(transformers, config.architectures[0])

    def build(self, config, *args, **kwargs):
        plain.__init__(self, config, *args, **kwargs)
        insert(self, getattr(config, DESIGN), getattr(config, BOTTLENECK))

    return type(plain.__name__, (plain,), {"__init__": build, "__module__": plain.__module__})


# ---- the layers of a model, and tuning the last ones only ---------------------------------------------------------


def find_stacks(model: nn.Module) -> list[tuple[nn.Module, nn.ModuleList]]:
    """Each stack of layers with the module that holds it: [decoder], or [encoder, decoder] of an encoder-decoder.

    Raises UserError for a model that is not built of attention layers in a list.
    """
    if model.config.is_encoder_decoder:
        return [_find_stack(model.get_encoder()), _find_stack(model.get_decoder())]
    # of a multimodal model (Gemma 3), the language model
    return [_find_stack(model.get_decoder() if model.config.sub_configs else model.base_model)]


def _find_stack(body: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    for holder in body.modules():  # from the outside in, so that no list within a layer comes first
        for child in holder.children():
            if isinstance(child, nn.ModuleList) and len(child) and all(map(_attends, child)):
                return holder, child
    raise UserError(f"{type(body).__name__} has no list of attention layers: it can be trained as a whole, or prefixed")


def _attends(layer: nn.Module) -> bool:
    return any(is_attention(module) for module in layer.modules())


def is_attention(module: nn.Module) -> bool:
    """True for a module that its class names an attention (GPT2Attention, BartAttention, LlamaAttention, ...)."""
    return type(module).__name__.endswith("Attention")


def train_top(model: nn.Module, count: int, embeddings: bool) -> list[str]:
    """Freeze everything but the last `count` layers of the decoder, its final norm and, if asked, the word embeddings.

    The embeddings are those of the input and of the head, which are one matrix in most models. Returns the names of
    what is trained. Raises UserError if there are fewer layers, or nothing is left to train.
    """
    holder, layers = find_stacks(model)[-1]
    if count > len(layers):
        part = "decoder" if model.config.is_encoder_decoder else "model"
        raise UserError(f"--top_layers {count}: the {part} has {len(layers)} layers")
    model.requires_grad_(False)
    chosen = [*layers[len(layers) - count :], *_final_norms(holder)]
    if embeddings:
        chosen += [model.get_input_embeddings(), model.get_output_embeddings()]
    for module in chosen:
        module.requires_grad_(True)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not names:
        raise UserError(
            "--top_layers 0 and --top_embeddings no do not go together: this model has no final norm, nothing is left"
        )
    return names


def _final_norms(holder: nn.Module) -> list[nn.Module]:
    """The norm behind the last layer, called ln_f, norm, final_layer_norm, ...; BART has none.

    Norms of the embeddings (BART's layernorm_embedding, BLOOM's word_embeddings_layernorm) stand beside it.
    """
    return [m for name, m in holder.named_children() if type(m).__name__.endswith("Norm") and "embedding" not in name]
