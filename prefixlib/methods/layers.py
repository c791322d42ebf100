"""The stacks of layers that a transformers model is built of."""

from torch import nn

from prefixlib.system.errors import UserError


def find_stacks(model: nn.Module) -> list[tuple[nn.Module, nn.ModuleList]]:
    """Each stack of layers with the module that holds it: [decoder], or [encoder, decoder] of an encoder-decoder.

    Raises UserError for a model without a list of attention layers.
    """
    if model.config.is_encoder_decoder:
        return [_find_stack(model.get_encoder()), _find_stack(model.get_decoder())]
    # a multimodal model (Gemma 3): take its language model
    return [_find_stack(model.get_decoder() if model.config.sub_configs else model.base_model)]


def _find_stack(body: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    for holder in body.modules():  # outermost first: a layer may contain lists, too
        for child in holder.children():
            if isinstance(child, nn.ModuleList) and len(child) and all(map(_attends, child)):
                return holder, child
    raise UserError(f"{type(body).__name__} has no list of attention layers: it can be trained as a whole, or prefixed")


def _attends(layer: nn.Module) -> bool:
    return any(is_attention(module) for module in layer.modules())


def is_attention(module: nn.Module) -> bool:
    """True for a module that its class names an attention (GPT2Attention, BartAttention, LlamaAttention, ...)."""
    return type(module).__name__.endswith("Attention")
