"""What this tree uses of a plain transformers model: its shape, keys and values, positions, masks, attention modules.

Legend: B batch, S inputs, Q queries, W keys of a row, L layers, H key/value heads, D head size, E embedding width.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig

from prefixlib.base_model.load import evaluating
from prefixlib.compute import attention
from prefixlib.system.errors import UserError, first_line

Layers = list[tuple[Tensor, Tensor]]  # per layer: keys, values, each (B, H, S, D)


@torch.no_grad()
def shape_of(base: nn.Module) -> dict[str, Any]:
    """n_layer L, n_head H, head_dim D, n_embd E, read off the keys and values that the model itself gives one token.

    L counts the layers that keep keys and values: the last ones of Gemma 3n take over those of earlier layers. H are
    fewer heads than the queries' in grouped-query models. `head_shapes` is None where all keys and values are alike;
    else it holds every layer's (H, D), or its (H, D, H, D) where the values have other heads than the keys (latent
    attention). n_head and head_dim are then those of the first keys. Costs a forward of one token. Raises UserError for
    a model with layers that keep a state of their own instead of keys and values (Mamba, hybrids).
    """
    _check_layers(base.config, "takes no prefix of keys and values")
    refusal = f"a {base.config.model_type} model takes no prefix of keys and values"
    embeddings = base.get_input_embeddings().weight
    token = torch.zeros(1, 1, dtype=torch.long, device=embeddings.device)
    try:
        with evaluating(base):
            layers = [[tuple(states.shape) for states in layer] for layer in key_values(base, input_ids=token)]
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{refusal} ({first_line(error)})") from error
    if not layers:
        raise UserError(f"{refusal}: it keeps none")
    if any(len(shape) != 4 or shape[::2] != (1, 1) for layer in layers for shape in layer):
        raise UserError(f"{refusal}: of one token it keeps {layers[0][0]}, not one key for each head")
    shapes = [[keys[1::2], values[1::2]] for keys, values in layers]  # (H, D) each
    heads, size = shapes[0][0]
    alike = all(pair == [(heads, size)] * 2 for pair in shapes)
    return {
        "n_layer": len(layers),
        "n_head": heads,
        "head_dim": size,
        "n_embd": embeddings.shape[1],
        "head_shapes": None if alike else [[*keys, *(values if values != keys else ())] for keys, values in shapes],
    }


def without_weights(config: PreTrainedConfig) -> nn.Module:
    """A decoder-only model on torch's meta device, which has shapes and no numbers: enough for `shape_of`.

    In bfloat16, as mixtures of experts take no other type there. Not every model can be run without numbers.
    """
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16).eval()  # it notes the type


USUAL_LAYERS = {"full_attention", "sliding_attention", "mlp", "moe"}  # the last two, of Nemotron-H, keep nothing
UNUSUAL_LAYERS = {
    "chunked_attention": "which do not see all of a long text",
    "indexed_attention": "which look keys up by an index of their own",
}


def _check_layers(config: PreTrainedConfig, verdict: str) -> None:
    """Raise UserError for layers that keep something else than keys and values that every token sees."""
    text = config.get_text_config(decoder=True)
    others = sorted(set(getattr(text, "layer_types", None) or ()) - USUAL_LAYERS)
    why = "it has no attention that its config.json describes"
    if others:
        stateful = [kind for kind in others if kind not in UNUSUAL_LAYERS] or others
        reason = UNUSUAL_LAYERS.get(stateful[0], "which keep a state of their own")
        why = f"it has layers of the kind {', '.join(stateful)}, {reason}"
    if others or not hasattr(text, "num_attention_heads"):
        raise UserError(f"a {config.model_type} model {verdict}: {why}")


def _sharing_layers(config: PreTrainedConfig) -> int:
    """How many layers, the last ones, keep no keys and values of their own."""
    return getattr(config.get_text_config(decoder=True), "num_kv_shared_layers", None) or 0


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
    """Positions (B, S), counted in each row over what is `visible`, bool (B, S): padding takes no position."""
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

    seen, text = seen.unsqueeze(1), config.get_text_config(decoder=True)
    window = getattr(text, "sliding_window", None)
    if not window:
        return as_taken(seen)
    near = seen & (queries[:, None, :, None] - keys[:, None, None, :] < window)
    kinds = set(getattr(text, "layer_types", None) or ())
    if not kinds:
        return as_taken(near)
    return {kind: as_taken(near if kind == "sliding_attention" else seen) for kind in kinds}


@torch.no_grad()
def check_rows(base: nn.Module) -> None:
    """Raise UserError unless texts that share a row under a mask give what each gives alone.

    Decoding lays the beams of a sentence on one row, and training the texts of a batch.
    """
    _check_layers(base.config, "is not supported")
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
    if not _alike(shared.last_hidden_state[:, 3:], alone):
        raise refusal


def key_values(base: nn.Module, visible: Tensor | None = None, **inputs: Tensor) -> Layers:
    """The keys and values (B, H, S, D) that the model itself gives S inputs: `input_ids` or `inputs_embeds`.

    visible: bool (B, S), False at padding, which takes no position; None if there is none. Raises UserError for
    embeddings where every layer reads the ids as well.
    """
    if "inputs_embeds" in inputs and getattr(base.config.get_text_config(), "hidden_size_per_layer_input", None):
        raise UserError(
            f"a {base.config.model_type} model reads the words' ids in every layer: --prefix_mode embedding and "
            "--format_mode infix do not go with it"
        )
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
    """The self-attention module of every layer, in the order of the layers.

    Raises UserError for a model with layers that take over others' keys and values: they would miss a prefix there.
    """
    if _sharing_layers(base.config):
        raise UserError(
            f"--gradient_checkpointing yes with a prefix: not for a {base.config.model_type} model, whose layers share "
            "keys and values"
        )
    found = {
        m.layer_idx: m for m in base.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "layer_idx")
    }
    return [found[layer] for layer in sorted(found)]


@torch.no_grad()
def check_attention(base: nn.Module) -> None:
    """Raise UserError unless keys and values that are joined on inside the attention give what a cache of them gives.

    They do not where the attention changes what it takes from the cache: latent attention expands it.
    """
    ids = torch.tensor([[2, 3, 1]], device=base.get_input_embeddings().weight.device)
    last = {"input_ids": ids[:, 2:], "position_ids": torch.full_like(ids[:, 2:], 2)}
    with evaluating(base):
        layers = key_values(base, input_ids=ids[:, :2])
        expected = base.base_model(**last, past_key_values=DynamicCache(layers), use_cache=True).last_hidden_state
        try:
            with attention.prefix_attention(dict(zip(attention_modules(base), layers, strict=True))):
                found = base.base_model(**last, use_cache=False).last_hidden_state
            alike = _alike(found, expected)
        except (ValueError, RuntimeError):  # shapes that cannot be joined
            alike = False
    if not alike:
        raise UserError(
            f"--gradient_checkpointing yes with a prefix: not for a {base.config.model_type} model, whose attention "
            "changes the keys and values that it keeps"
        )


def _alike(states: Tensor, expected: Tensor) -> bool:
    """Whether hidden states are equal but for rounding."""
    limit = 1e-3 if expected.dtype == torch.float32 else 5e-2
    return bool((states - expected).abs().max() <= limit * expected.abs().max())
