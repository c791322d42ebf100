"""All that is asked of a bare transformers model: its shape, keys and values, positions, masks, attention modules.

Legend: B batch, S inputs, Q queries, W keys of a row, L layers, H key/value heads, D head size, E embedding width.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig

from prefixlib import attention
from prefixlib.errors import UserError

Layers = list[tuple[Tensor, Tensor]]  # per layer: keys, values, each (B, H, S, D)


def shape_of(config: PreTrainedConfig) -> dict[str, int]:
    """n_layer L, n_head H (fewer than the queries' in grouped-query models), head_dim D, n_embd E.

    Raises UserError for a model with layers that keep a state of their own instead of keys and values (Mamba, hybrids).
    """
    text = config.get_text_config(decoder=True)
    others = sorted(set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if others:
        raise UserError(
            f"a {config.model_type} model takes no prefix of keys and values: it has layers of the kind "
            f"{', '.join(others)}"
        )
    if not hasattr(text, "num_attention_heads"):
        raise UserError(f"a {config.model_type} model takes no prefix of keys and values: it has no attention")
    heads = text.num_attention_heads
    return {
        "n_layer": text.num_hidden_layers,
        "n_head": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
        "n_embd": getattr(text, "word_embed_proj_dim", None) or text.hidden_size,  # OPT's can be narrower
    }


def attention_window(config: PreTrainedConfig) -> int | None:
    """How far back the attention of a sliding-window model reaches, in tokens; None where it reaches everything."""
    text = config.get_text_config(decoder=True)
    if "local" in (getattr(text, "attention_layers", None) or ()):  # GPT-Neo
        return text.window_size
    everywhere = "sliding_attention" not in (getattr(text, "layer_types", None) or ["sliding_attention"])
    return None if everywhere else getattr(text, "sliding_window", None)


def max_positions(config: PreTrainedConfig) -> int:
    """The number of positions (P + T must not exceed it): those that every token can look back on."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is None:
        raise UserError(f"a {config.model_type} model does not say how many positions it has: it is not supported")
    return min(limit, attention_window(config) or limit)


def count_positions(visible: Tensor) -> Tensor:
    """Positions (B, S) of what is visible, bool (B, S), counted in each row: padding and other rows shift nothing."""
    return (visible.long().cumsum(dim=1) - 1).clamp(min=0)


def position_mask(config: PreTrainedConfig, seen: Tensor, queries: Tensor, keys: Tensor) -> Tensor | dict[str, Tensor]:
    """A mask that transformers takes as it is, for texts that do not stand one after the other in a row.

    seen: bool (B, Q, W), what each query may look at; queries (B, Q) and keys (B, W): their positions, by which a
    model with a sliding window hides what is far away. Returns (B, 1, Q, W), one for each kind of layer if they differ:
    bool for torch's attention, numbers to add to the scores for a model that computes its own.
    """
    adds = config._attn_implementation not in ("sdpa", attention.NAME)
    dtype = config.dtype or torch.float32

    def as_taken(mask: Tensor) -> Tensor:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min) if adds else mask

    seen = seen.unsqueeze(1)
    window = getattr(config, "sliding_window", None)
    if not window:
        return as_taken(seen)
    near = seen & (queries[:, None, :, None] - keys[:, None, None, :] < window)
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        return as_taken(near)
    return {kind: as_taken(near if kind == "sliding_attention" else seen) for kind in kinds}


@torch.no_grad()
def check_rows(base: nn.Module) -> None:
    """Raise UserError unless texts that share a row under a mask give what each gives alone.

    Decoding lays the beams of a sentence on one row, and training the texts of a batch.
    """
    refusal = UserError(f"a {base.config.model_type} model is not supported: texts cannot share a row in it")
    if "local" in (getattr(base.config, "attention_layers", None) or ()):  # GPT-Neo's window counts columns
        raise refusal
    device = base.get_input_embeddings().weight.device
    ids = torch.tensor([[2, 3, 1, 0, 1]], device=device)
    text = torch.tensor([0, 0, 0, 1, 1], device=device)
    positions = torch.tensor([[0, 1, 2, 0, 1]], device=device)
    seen = (text.unsqueeze(1) == text) & torch.ones(5, 5, dtype=torch.bool, device=device).tril()
    mask = position_mask(base.config, seen.unsqueeze(0), positions, positions)
    with evaluating(base):
        alone = base.base_model(input_ids=ids[:, 3:], use_cache=False).last_hidden_state
        try:
            shared = base.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        except (TypeError, ValueError, RuntimeError) as error:
            raise refusal from error
    limit = 1e-3 if alone.dtype == torch.float32 else 5e-2
    if (shared.last_hidden_state[:, 3:] - alone).abs().max() > limit * alone.abs().max():
        raise refusal


def key_values(base: nn.Module, visible: Tensor | None = None, **inputs: Tensor) -> Layers:
    """The keys and values (B, H, S, D) that the model itself gives S inputs: `input_ids` or `inputs_embeds`.

    visible: bool (B, S), False at padding, which takes no position; None if there is none.
    """
    if visible is None:
        first = next(iter(inputs.values()))
        inputs["position_ids"] = torch.arange(first.shape[1], device=first.device).unsqueeze(0)
    else:
        inputs.update(attention_mask=visible, position_ids=count_positions(visible))
    if base.training and attention.is_checkpointed(base):  # checkpointed layers take no cache
        modules = attention_modules(base)
        with attention.record_key_values(modules) as seen:
            base.base_model(**inputs, use_cache=False)
        return [seen[module] for module in modules]
    cache = DynamicCache()
    base.base_model(**inputs, past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]


def attention_modules(base: nn.Module) -> list[nn.Module]:
    """The self-attention module of every layer, in the order of the layers."""
    found = {
        m.layer_idx: m for m in base.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "layer_idx")
    }
    return [found[layer] for layer in sorted(found)]


def check_takes_prefix(base: nn.Module) -> None:
    """Raise UserError unless every layer of the base model keeps keys and values of the same H heads of size D."""
    shape = shape_of(base.config)
    token = torch.zeros(1, 1, dtype=torch.long, device=base.get_input_embeddings().weight.device)
    try:
        with torch.no_grad(), evaluating(base):
            found = {tuple(states.shape) for layer in key_values(base, input_ids=token) for states in layer}
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"a {base.config.model_type} model takes no prefix of keys and values ({error})") from error
    if found != {(1, shape["n_head"], 1, shape["head_dim"])}:
        raise UserError(
            f"a {base.config.model_type} model takes no prefix: its layers' keys and values differ, {found}"
        )
    check_rows(base)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """While open, `module` is in eval mode."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
