"""Prefix keys and values joined inside transformers' attention, for any model on its attention interface.

    install(model)                                              # once per model
    with prefix_attention({layer.self_attn: (keys, values) for ...}):
        model(**batch)                                          # positions do not change: pass GPT-2 position_ids P…

Legend: B batch, T query tokens, S the model's own keys, P prefix length, H query heads, G key/value heads (H unless
grouped), D head size. A prefix is read-only here: nothing is cached, so gradients flow to its source.

Seeding a cache does the same for a decoder-only model and is cheaper when decoding; this route serves where a
cache cannot: an encoder, cross-attention, positions that must not change (BART), activation checkpointing, and batches
whose rows carry different prefixes.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from prefixlib.compute import onednn

NAME = "prefix_sdpa"
CAPPED = "prefix_capped"  # for models that cap the attention scores, which torch's kernels cannot do (Gemma 2)
_PREFIX, _RECORD = "_prefix_key_values", "_recorded_key_values"  # the attributes of a module that `prefix_sdpa` reads


@dataclasses.dataclass(frozen=True)
class Prefix:
    """One attention module's prefix.

    keys, values: (b, G, P, D), b = B, or 1 for all rows, or a divisor of B whose rows are repeated (the beams of an
    input are adjacent). visible: bool (b, P), False where a row's prefix is shorter than P; None if all are visible.
    """

    keys: Tensor
    values: Tensor
    visible: Tensor | None = None


def install(model: nn.Module) -> None:
    """Let `model` (a transformers PreTrainedModel) attend through `prefix_sdpa`, plain sdpa when there is no prefix.

    Raises TypeError if the model does not use the attention interface, ValueError if it computes its scores
    differently.
    """
    refusal = f"{type(model).__name__} does not take its attention from transformers' attention interface"
    if not model._can_set_attn_implementation():
        raise TypeError(refusal)
    AttentionInterface.register(NAME, prefix_sdpa)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # without it transformers builds no mask at all
    AttentionInterface.register(CAPPED, prefix_capped)
    AttentionMaskInterface.register(CAPPED, eager_mask)
    text = model.config.get_text_config(decoder=True)
    name = NAME if model._supports_sdpa or not hasattr(text, "attn_logit_softcapping") else CAPPED
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise TypeError(refusal)


@contextlib.contextmanager
def prefix_attention(
    prefixes: Mapping[nn.Module, Prefix | tuple[Tensor, Tensor]], visible: Tensor | None = None
) -> Iterator[None]:
    """While open, each attention module in `prefixes` also attends to its own prefix.

    Values are (keys, values) tuples, or `Prefix`. `visible`, bool (b, P), holds for every tuple: see `pad_prefixes`.
    Modules without an entry are untouched. On exit every module's earlier prefix is restored.
    """
    carried = {m: p if isinstance(p, Prefix) else Prefix(*p, visible) for m, p in prefixes.items()}
    with _Carrying(_PREFIX, carried):
        yield


@contextlib.contextmanager
def record_key_values(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """While open, collect the model's own (keys, values), each (B, G, S, D), at each of `modules`.

    It starts a prefix from a real text. `install` must precede it; a later forward overwrites an earlier one.
    """
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    with _Carrying(_RECORD, dict.fromkeys(modules, seen)):
        yield seen


def enable_checkpointing(model: nn.Module) -> None:
    """Enable activation checkpointing for `model` so that a recomputed layer attends to the same prefix again.

    Backward runs after `prefix_attention` has closed; each checkpointed layer therefore remembers the prefixes
    of its forward pass and uses them again while it is recomputed. The layers must be in train mode.
    """

    def contexts():
        carried = {m: m.__dict__[_PREFIX] for m in model.modules() if _PREFIX in m.__dict__}
        return contextlib.nullcontext(), _Carrying(_PREFIX, carried)

    # Renamed in transformers 5.2x; the old name warns there and the new one is missing before.
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": contexts})


def is_checkpointed(model: nn.Module) -> bool:
    """Whether activation checkpointing is on; transformers 5.2x renamed its own property for it."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def pad_prefixes(prefixes: list[tuple[Tensor, Tensor]]) -> Prefix:
    """Prefixes of several lengths, each (1, G, P_i, D), as one batch: padded on the left, the padding invisible."""
    longest = max(keys.shape[2] for keys, _ in prefixes)
    lengths = torch.tensor([keys.shape[2] for keys, _ in prefixes], device=prefixes[0][0].device)

    def pad(tensor: Tensor) -> Tensor:
        return nn.functional.pad(tensor, (0, 0, longest - tensor.shape[2], 0))

    return Prefix(
        keys=torch.cat([pad(keys) for keys, _ in prefixes]),
        values=torch.cat([pad(values) for _, values in prefixes]),
        visible=torch.arange(longest, device=lengths.device) >= longest - lengths[:, None],
    )


def prefix_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, None]:
    """transformers' sdpa attention over [prefix, own keys]. query (B,H,T,D); key, value (B,G,S,D) -> (B,T,H,D)."""
    key, value, attention_mask = _join(module, query, key, value, attention_mask, kwargs)
    if not onednn.trains_attention_faster_in_float32(query):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    if (bias := kwargs.get("position_bias")) is not None:
        kwargs["position_bias"] = bias.float()
    with torch.autocast(query.device.type, enabled=False):
        wide = (tensor.float() for tensor in (query, key, value))
        outputs, _ = sdpa_attention_forward(module, *wide, attention_mask, **kwargs)
    return outputs.to(torch.bfloat16), None


def prefix_capped(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """`prefix_sdpa` with the scores capped at `softcap`, in plain torch."""
    key, value, attention_mask = _join(module, query, key, value, attention_mask, kwargs)
    groups = query.shape[1] // key.shape[1]
    scores = query @ repeat_kv(key, groups).transpose(2, 3) * scaling  # (B,H,T,P+S)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        is_shown = attention_mask.dtype == torch.bool
        hide = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~attention_mask, hide) if is_shown else scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ repeat_kv(value, groups)).transpose(1, 2).contiguous(), None


def _join(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Prepend the module's prefix to keys, values and mask; inside `recording`, store the module's own."""
    if (seen := module.__dict__.get(_RECORD)) is not None:
        seen[module] = (key, value)
    if (prefix := module.__dict__.get(_PREFIX)) is None:
        return key, value, mask
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    mask = _widen_mask(mask, prefix, query, key.shape[2], causal)
    if (bias := kwargs.get("position_bias")) is not None:  # T5's bias has no columns for the prefix
        kwargs["position_bias"] = nn.functional.pad(bias, (prefix.keys.shape[2], 0))
    key = torch.cat([_rows(prefix.keys, key), key], dim=2)  # (B,G,P+S,D)
    value = torch.cat([_rows(prefix.values, value), value], dim=2)
    return key, value, mask


def _rows(prefix: Tensor, own: Tensor) -> Tensor:
    """The prefix (b, …) for the B rows of `own`: one row is a view for all, b rows are repeated over their beams."""
    return _repeat(prefix, own.shape[0]).to(own.dtype)


def _repeat(tensor: Tensor, rows: int) -> Tensor:
    """(b, …) -> (rows, …). Raises ValueError if b does not divide rows."""
    if tensor.shape[0] == 1:
        return tensor.expand(rows, *tensor.shape[1:])
    if rows % tensor.shape[0]:
        raise ValueError(f"a prefix of {tensor.shape[0]} rows does not fit a batch of {rows} rows")
    repeats = rows // tensor.shape[0]
    return tensor if repeats == 1 else tensor.repeat_interleave(repeats, dim=0)


def _widen_mask(mask: Tensor | None, prefix: Prefix, query: Tensor, own: int, causal: bool) -> Tensor | None:
    """The mask (B|1, H|1, T, S), bool or additive, with P more columns on the left: every query sees the prefix."""
    rows, tokens, length = query.shape[0], query.shape[2], prefix.keys.shape[2]
    if mask is None:
        if causal and tokens > 1:  # None means causal here, aligned to the first key (transformers >= 5.4)
            mask = torch.ones(1, 1, tokens, own, dtype=torch.bool, device=query.device).tril()
        elif prefix.visible is None:
            return None
        else:
            mask = torch.ones(1, 1, 1, own, dtype=torch.bool, device=query.device)
    if prefix.visible is None:
        shown = mask.new_ones(1, 1, 1, length) if mask.dtype == torch.bool else mask.new_zeros(1, 1, 1, length)
    else:
        shown = _repeat(prefix.visible, rows)[:, None, None, :]
        if mask.dtype != torch.bool:
            hidden = torch.finfo(mask.dtype).min
            shown = torch.zeros_like(shown, dtype=mask.dtype).masked_fill(~shown, hidden)
    batch = max(mask.shape[0], shown.shape[0])
    shape = (batch, mask.shape[1], mask.shape[2])
    return torch.cat([shown.expand(*shape, length), mask.expand(*shape, mask.shape[3])], dim=3)


class _Carrying:
    """Sets an attribute on modules and restores it on exit.

    A class, not a generator: a layer recomputed twice (a second backward) enters the same context twice.
    """

    def __init__(self, slot: str, carried: Mapping[nn.Module, object]):
        self.slot, self.carried = slot, carried

    def __enter__(self) -> None:
        self.before = {module: module.__dict__.get(self.slot) for module in self.carried}
        for module, value in self.carried.items():
            module.__dict__[self.slot] = value

    def __exit__(self, *_) -> None:
        for module, value in self.before.items():
            if value is None:
                module.__dict__.pop(self.slot, None)
            else:
                module.__dict__[self.slot] = value
