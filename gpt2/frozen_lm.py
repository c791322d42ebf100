"""What the frozen model gives by itself: keys and values of real inputs, positions, where its attention is.

Legend: B batch, S inputs, Q queries, W keys of a row, H key/value heads, D head size.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig

from gpt2.prefix_config import PrefixConfig
from prefixlib import attention
from prefixlib.errors import UserError

Layers = list[tuple[Tensor, Tensor]]  # per layer: keys, values, each (B, H, S, D)


def count_positions(visible: Tensor) -> Tensor:
    """Positions (B, S) of what is visible, bool (B, S), numbered by row: padding and neighbours shift nothing."""
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


def key_values(
    base: nn.Module, visible: Tensor | None = None, positions: Callable[[Tensor], Tensor] = count_positions, **inputs
) -> Layers:
    """The keys and values (B, H, S, D) that the model itself gives S inputs: `input_ids` or `inputs_embeds`."""
    if visible is None:
        first = next(iter(inputs.values()))
        inputs["position_ids"] = torch.arange(first.shape[1], device=first.device).unsqueeze(0)
    else:
        inputs.update(attention_mask=visible, position_ids=positions(visible))
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


def check_shape(base: nn.Module, config: PrefixConfig) -> None:
    """Raise UserError unless every layer of the base model keeps keys and values of H heads of size D each."""
    token = torch.zeros(1, 1, dtype=torch.long, device=base.get_input_embeddings().weight.device)
    try:
        with torch.no_grad(), evaluating(base):
            found = {tuple(states.shape) for layer in key_values(base, input_ids=token) for states in layer}
            hidden = base.base_model(input_ids=token).last_hidden_state
            plain = torch.allclose(base.get_output_embeddings()(hidden), base(input_ids=token).logits, atol=1e-3)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"a {base.config.model_type} model takes no prefix of keys and values ({error})") from error
    if not plain:  # what training and decoding here take for logits
        raise UserError(f"a {base.config.model_type} model is not supported: it caps or scales what its head gives")
    if found != {(1, config.n_head, 1, config.head_dim)}:
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
