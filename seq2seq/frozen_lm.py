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

from prefixlib.base_model.load import evaluating
from prefixlib.compute import attention
from prefixlib.system.errors import UserError

Layers = list[tuple[Tensor, Tensor]]  # per layer: keys, values, each (B, H, P, D), or (1, H, P, D) for all rows


def shape_of(config: PreTrainedConfig) -> dict[str, int | None]:
    """The sizes of a base model that a prefix depends on, under their names in PrefixConfig.

    Heads are those of keys and values. The size of a head is None where it is E / H.
    """
    if config.sub_configs:  # T5Gemma: two models of their own
        encoder, decoder = config.encoder, config.decoder
        return {
            "encoder_layers": encoder.num_hidden_layers,
            "decoder_layers": decoder.num_hidden_layers,
            "encoder_heads": encoder.num_key_value_heads,
            "decoder_heads": decoder.num_key_value_heads,
            "d_model": decoder.hidden_size,
            "encoder_head_dim": encoder.head_dim,
            "decoder_head_dim": decoder.head_dim,
        }
    if hasattr(config, "d_kv"):  # T5 and its relatives
        return {
            "encoder_layers": config.num_layers,
            "decoder_layers": config.num_decoder_layers,
            "encoder_heads": config.num_heads,
            "decoder_heads": config.num_heads,
            "d_model": config.d_model,
            "encoder_head_dim": config.d_kv,
            "decoder_head_dim": config.d_kv,
        }
    return {
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "encoder_heads": config.encoder_attention_heads,
        "decoder_heads": config.decoder_attention_heads,
        "d_model": config.d_model,
        "encoder_head_dim": None,
        "decoder_head_dim": None,
    }


UNLIMITED = 1_000_000  # positions of a model that has relative ones alone


def max_positions(config: PreTrainedConfig) -> int:
    """Most tokens that the encoder reads, and the decoder writes; prefixes take no positions."""
    parts = [config.encoder, config.decoder] if config.sub_configs else [config]
    return min(getattr(part, "max_position_embeddings", None) or UNLIMITED for part in parts)


def start_token(config: PreTrainedConfig) -> int:
    """The decoder's input in front of the first output token. Raises UserError for a model that does not name it."""
    decoder = config.decoder if config.sub_configs else config
    for part, name in ((config, "decoder_start_token_id"), (decoder, "bos_token_id")):
        if getattr(part, name, None) is not None:
            return getattr(part, name)
    raise UserError(f"a {config.model_type} model whose config.json has no decoder_start_token_id is not supported")


def end_token(config: PreTrainedConfig) -> int:
    """The token that ends an output; the first one where the model has several."""
    return config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id


def shares_rows(base: nn.Module) -> bool:
    """Whether texts may share a row: packed in training, the beams of a source in decoding.

    Positions must be settable from outside, which relative ones (T5) are not, nor those that the model counts itself
    (M2M100).
    """
    tables = [getattr(side, "embed_positions", None) for side in (base.get_encoder(), base.get_decoder())]
    return all(table is not None and "position_ids" in inspect.signature(table.forward).parameters for table in tables)


def attention_sites(base: nn.Module) -> dict[str, list[nn.Module]]:
    """Site -> the attention module of each layer. Raises UserError for an encoder-decoder that is built otherwise."""
    encoder, decoder = base.get_encoder(), base.get_decoder()
    try:
        if hasattr(decoder, "block"):  # T5 and its relatives
            return {
                "self": [block.layer[0].SelfAttention for block in decoder.block],
                "cross": [block.layer[1].EncDecAttention for block in decoder.block],
                "encoder": [block.layer[0].SelfAttention for block in encoder.block],
            }
        cross = "cross_attn" if hasattr(decoder.layers[0], "cross_attn") else "encoder_attn"  # T5Gemma, BART
        return {
            "self": [layer.self_attn for layer in decoder.layers],
            "cross": [getattr(layer, cross) for layer in decoder.layers],
            "encoder": [layer.self_attn for layer in encoder.layers],
        }
    except AttributeError as error:
        raise UserError(
            f"a {base.config.model_type} model is not supported: it is not built as usual ({error})"
        ) from error


def install(base: nn.Module) -> None:
    """Let the base model attend to prefixes. Raises UserError where an attention of its own would miss them (LED)."""
    refusal = f"a {base.config.model_type} model is not supported: it has an attention of its own"
    try:
        attention.install(base)
    except (TypeError, ValueError) as error:
        raise UserError(refusal) from error
    sites = attention_sites(base)
    token = torch.full((1, 1), start_token(base.config), device=base.get_input_embeddings().weight.device)
    modules = [module for layers in sites.values() for module in layers]
    with torch.no_grad(), evaluating(base), attention.record_key_values(modules) as seen:
        try:
            hidden_states(base, token, torch.ones_like(token), token, torch.ones_like(token))
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{refusal} ({error})") from error
    if len(seen) < len(modules):
        raise UserError(refusal)


def hidden_states(
    base: nn.Module, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, decoder_mask: Tensor
) -> Tensor:
    """The decoder's last hidden states (B, T, E) for a padded batch: source (B, S), decoder input (B, T), and masks."""
    encoded = base.get_encoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    return base.get_decoder()(
        input_ids=decoder_input_ids,
        attention_mask=decoder_mask,
        encoder_hidden_states=encoded,
        encoder_attention_mask=attention_mask,
        use_cache=False,
    ).last_hidden_state


@contextlib.contextmanager
def attend_to(
    base: nn.Module, prefix: Mapping[str, Layers], visible: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """While open, the base model attends to the prefix of each site in `prefix`.

    visible: site -> bool (B, P), False where a row's own prefix is padded.
    """
    sites, seen = attention_sites(base) if prefix else {}, visible or {}
    prefixes = {}
    for site, layers in prefix.items():
        for module, layer in zip(sites[site], layers, strict=True):
            prefixes[module] = attention.Prefix(*layer, seen.get(site))
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
    sites, all_of_it = attention_sites(base), torch.ones_like(text)
    modules = [module for layers in sites.values() for module in layers]
    with evaluating(base), attention.record_key_values(modules) as seen:
        hidden_states(base, text, all_of_it, text, all_of_it)
    flat = {}
    for site, modules in sites.items():
        states = torch.cat([state for module in modules for state in seen[module]])  # (2L, H, P, D)
        flat[site] = states.permute(2, 0, 1, 3).flatten(1)
    return flat
