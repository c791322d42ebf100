"""The frozen encoder-decoder: where its attention is, what it attends to, where its tokens stand.

Legend: B batch, T tokens, H heads, P prefix length, D head size.
"""

import contextlib
import inspect
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from prefixlib import attention
from prefixlib.errors import UserError

Layers = list[tuple[Tensor, Tensor]]  # per layer: keys, values, each (B, H, P, D)


def attention_sites(base: nn.Module) -> dict[str, list[nn.Module]]:
    """Site -> the attention module of each layer. Raises UserError for an encoder-decoder built otherwise."""
    encoder, decoder = base.get_encoder(), base.get_decoder()
    try:
        if "position_ids" not in inspect.signature(decoder.embed_positions.forward).parameters:
            raise AttributeError("its decoder cannot be told the positions of the beams")
        return {
            "self": [layer.self_attn for layer in decoder.layers],
            "encoder_decoder": [layer.encoder_attn for layer in decoder.layers],
            "encoder": [layer.self_attn for layer in encoder.layers],
        }
    except AttributeError as error:
        raise UserError(
            f"{type(base).__name__} is not built like BART ({error}); use a BART, mBART or Pegasus"
        ) from error


@contextlib.contextmanager
def attend_to(base: nn.Module, prefix: Mapping[str, Layers]) -> Iterator[None]:
    """While open, the base model attends to the prefix of each site given."""
    sites = attention_sites(base) if prefix else {}
    modules = {
        module: pair for site, layers in prefix.items() for module, pair in zip(sites[site], layers, strict=True)
    }
    with attention.prefix_attention(modules):
        yield


@contextlib.contextmanager
def at_positions(embedding: nn.Module, positions: Tensor) -> Iterator[None]:
    """While open, a model's position table gives the vectors of `positions` (B, T), whatever it is asked for."""

    def ask(_module, args, kwargs):
        return args, {**kwargs, "position_ids": positions.flatten()}

    def answer(_module, _args, vectors: Tensor) -> Tensor:
        return vectors.view(*positions.shape, -1)

    hooks = embedding.register_forward_pre_hook(ask, with_kwargs=True), embedding.register_forward_hook(answer)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
