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
    model with a sliding window hides what is far away. Returns (B, 1, Q, W), one for each kind of layer if they differ.
    """
    seen = seen.unsqueeze(1)
    window = getattr(config, "sliding_window", None)
    if not window:
        return seen
    near = seen & (queries[:, None, :, None] - keys[:, None, None, :] < window)
    kinds = set(getattr(config, "layer_types", None) or ())
    return {kind: near if kind == "sliding_attention" else seen for kind in kinds} if kinds else near


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


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """While open, `module` is in eval mode."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
