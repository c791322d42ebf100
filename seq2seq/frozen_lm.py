"""The frozen encoder-decoder: its shape and positions, its attention at three sites, the keys and values of a text.

The sites: "self" and "cross", the decoder's self-attention and cross-attention, and "encoder", the encoder's
self-attention. What transformers may rename or rearrange is used here alone.

Legend: B batch, T tokens, L layers, H heads, P prefix length, D head size.
"""

import contextlib
import inspect
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from prefixlib import attention
from prefixlib.errors import UserError

Layers = list[tuple[Tensor, Tensor]]  # per layer: keys, values, each (B, H, P, D), or (1, H, P, D) for all rows


def shape_of(config: PreTrainedConfig) -> dict[str, int]:
    """The sizes of a base model that a prefix depends on, under their names in PrefixConfig."""
    return {
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "encoder_heads": config.encoder_attention_heads,
        "decoder_heads": config.decoder_attention_heads,
        "d_model": config.d_model,
    }


def max_positions(config: PreTrainedConfig) -> int:
    """Most tokens that the encoder reads, and the decoder writes; prefixes take no positions."""
    return config.max_position_embeddings


def attention_sites(base: nn.Module) -> dict[str, list[nn.Module]]:
    """Site -> the attention module of each layer. Raises UserError for an encoder-decoder that is built otherwise."""
    encoder, decoder = base.get_encoder(), base.get_decoder()
    try:
        if "position_ids" not in inspect.signature(decoder.embed_positions.forward).parameters:
            raise AttributeError("its decoder takes no positions from outside, which beams need")
        return {
            "self": [layer.self_attn for layer in decoder.layers],
            "cross": [layer.encoder_attn for layer in decoder.layers],
            "encoder": [layer.self_attn for layer in encoder.layers],
        }
    except AttributeError as error:
        raise UserError(
            f"{type(base).__name__} is not built like BART ({error}); use a BART, mBART or Pegasus"
        ) from error


@contextlib.contextmanager
def attend_to(base: nn.Module, prefix: Mapping[str, Layers]) -> Iterator[None]:
    """While open, the base model attends to the prefix of each site in `prefix`."""
    sites = attention_sites(base) if prefix else {}
    prefixes = {}
    for site, layers in prefix.items():
        prefixes.update(zip(sites[site], layers, strict=True))
    with attention.prefix_attention(prefixes):
        yield


@contextlib.contextmanager
def at_positions(embedding: nn.Module, positions: Tensor) -> Iterator[None]:
    """While open, a position table returns the vectors of `positions` (B, T), whatever positions are looked up."""

    def look_up(_module, args, kwargs):
        return args, {**kwargs, "position_ids": positions.flatten()}

    def unflatten(_module, _args, vectors: Tensor) -> Tensor:
        return vectors.view(*positions.shape, -1)

    hooks = embedding.register_forward_pre_hook(look_up, with_kwargs=True), embedding.register_forward_hook(unflatten)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def key_values_of_text(base: nn.Module, ids: list[int]) -> dict[str, Tensor]:
    """The keys and values that a text of P tokens gives at the three sites, each flat (P, 2*L*H*D).

    The encoder reads the text and so does the decoder: its cross-attention sees the encoded text, its self-attention
    the text itself, all at positions 0..P-1 without special tokens, as the original does it for GPT-2.
    """
    text = torch.tensor([ids], device=base.get_input_embeddings().weight.device)
    was_training = base.training
    base.eval()
    sites = attention_sites(base)
    with attention.record_key_values([module for modules in sites.values() for module in modules]) as seen:
        base(input_ids=text, decoder_input_ids=text, use_cache=False)
    base.train(was_training)
    flat = {}
    for site, modules in sites.items():
        states = torch.cat([state for module in modules for state in seen[module]])  # (2L, H, P, D)
        flat[site] = states.permute(2, 0, 1, 3).flatten(1)
    return flat
