"""The method: a frozen decoder-only language model steered by a trained prefix of keys and values (paper section 4).

Legend: B batch, T tokens, P prefix length, L layers, H key/value heads, D head size, E hidden size, M mid_dim.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig

from gpt2.dataset import IGNORED
from prefixlib import attention
from prefixlib.errors import UserError

FAMILY = "decoder-only"


@dataclass(frozen=True)
class PrefixConfig:
    """Everything needed to rebuild the prefix module: the method's settings, then the base model's shape."""

    preseqlen: int  # P
    mid_dim: int  # M
    prefix_dropout: float
    prefix_mode: str
    format_mode: str
    n_layer: int  # L
    n_head: int  # H, heads of the keys and values (fewer than the queries' in grouped-query models)
    head_dim: int  # D
    n_embd: int  # E, the width of the prefix's input embeddings

    @classmethod
    def for_model(cls, base: PreTrainedConfig, **settings: Any) -> "PrefixConfig":
        """The settings with the shape read off the base model's configuration. Raises UserError if P does not fit."""
        text = base.get_text_config(decoder=True)
        heads = text.num_attention_heads
        config = cls(
            n_layer=text.num_hidden_layers,
            n_head=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            n_embd=text.hidden_size,
            **settings,
        )
        limit = max_positions(base)
        if not 1 <= config.preseqlen <= limit - 2:
            raise UserError(f"--preseqlen {config.preseqlen}: the model has {limit} positions; take 1 to {limit - 2}")
        return config

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any], directory) -> "PrefixConfig":
        """The settings as a checkpoint holds them. Raises UserError if they are not this version's."""
        try:
            return cls(**saved)
        except TypeError as error:
            raise UserError(f"{directory}: its prefix settings are not known here ({error})") from error

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def max_positions(base: PreTrainedConfig) -> int:
    """The number of positions of the base model (P + T must not exceed it)."""
    return base.get_text_config(decoder=True).max_position_embeddings


class PrefixTuning(nn.Module):
    """P learned vectors through an MLP to keys and values for every layer (paper section 4.3, reparametrisation).

    State-dict names and torch's default initialisation (embeddings N(0, 1)) are the original's.
    """

    def __init__(self, config: PrefixConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.preseqlen, config.n_embd)
        width = 2 * config.n_layer * config.n_head * config.head_dim  # a key and a value per layer
        self.control_trans = nn.Sequential(
            nn.Linear(config.n_embd, config.mid_dim), nn.Tanh(), nn.Linear(config.mid_dim, width)
        )
        self.dropout = nn.Dropout(config.prefix_dropout)

    def flat(self) -> Tensor:
        """The prefix before it is cut into layers, (P, 2*L*H*D); the network runs on P rows only."""
        return self.control_trans(self.wte.weight)

    def forward(self, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values per layer, each (B, H, P, D). Dropout is drawn for every row of the batch on its own."""
        return split_layers(self.flat(), self.config, batch_size, self.dropout)


def split_layers(
    flat: Tensor, config: PrefixConfig, batch_size: int, dropout: nn.Module | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Cut (P, 2*L*H*D) into L pairs of keys and values (B, H, P, D): views of one copy, unless dropout is on.

    Raises UserError if the prefix was made for a model of another shape.
    """
    shape = (2 * config.n_layer, config.n_head, config.head_dim)
    if flat.shape[1] != shape[0] * shape[1] * shape[2]:
        raise UserError(
            f"the prefix has {flat.shape[1]} numbers per position, the model needs {'x'.join(map(str, shape))}"
        )
    rows = flat.view(-1, *shape).permute(1, 2, 0, 3).unsqueeze(1)  # (2L, 1, H, P, D)
    rows = rows.expand(-1, batch_size, -1, -1, -1)  # (2L, B, H, P, D)
    if dropout is not None:
        rows = dropout(rows)
    return [(rows[2 * layer], rows[2 * layer + 1]) for layer in range(config.n_layer)]


class PrefixLM(nn.Module):
    """A frozen language model with a prefix in front: what the trainer moves and the decoder asks.

    `train_base` puts the frozen model in train mode together with the prefix: for its dropout, or because
    checkpointed layers recompute only there. The original's default is eval mode, without dropout.
    `checkpointing` recomputes activations in the backward pass; a cache would not survive that, so the prefix then
    enters inside the attention function.
    """

    def __init__(self, base: nn.Module, prefix: PrefixTuning, train_base: bool = False, checkpointing: bool = False):
        super().__init__()
        self.base = base
        self.prefix = prefix
        self.train_base = train_base
        self.checkpointing = checkpointing
        for parameter in base.parameters():
            parameter.requires_grad_(False)
        if checkpointing:
            attention.install(base)
            attention.enable_checkpointing(base)

    @property
    def config(self) -> PreTrainedConfig:
        return self.base.config

    def train(self, mode: bool = True) -> "PrefixLM":
        super().train(mode)
        self.base.train(mode and self.train_base)
        return self

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """Last hidden states (B, T, E) of right-padded `input_ids` (B, T) behind the prefix; text starts at position P.

        No attention mask is needed: padding stands to the right of every real token and attention is causal.
        """
        weight = self.base.get_input_embeddings().weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        layers = [(keys.to(dtype), values.to(dtype)) for keys, values in self.prefix(input_ids.shape[0])]
        length = self.prefix.config.preseqlen
        positions = torch.arange(length, length + input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        inputs = {"input_ids": input_ids, "position_ids": positions}
        if self.checkpointing:
            with attention.prefix_attention(dict(zip(attention_modules(self.base), layers, strict=True))):
                return self.base.base_model(**inputs, use_cache=False).last_hidden_state
        # a cache is filled in place by the forward, so every forward gets its own
        return self.base.base_model(**inputs, past_key_values=DynamicCache(layers), use_cache=True).last_hidden_state

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """With labels (B, T): `token_nll` of the scored tokens. Without: logits (B, T, V) at every position."""
        hidden = self.hidden_states(input_ids)
        head = self.base.get_output_embeddings()
        return head(hidden) if labels is None else token_nll(hidden, labels, head)


def attention_modules(base: nn.Module) -> list[nn.Module]:
    """The self-attention module of every layer, in the order of the layers."""
    found = {
        m.layer_idx: m for m in base.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "layer_idx")
    }
    return [found[layer] for layer in sorted(found)]


def token_nll(hidden: Tensor, labels: Tensor, head: nn.Module) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood (S,) of the S scored tokens and the rows (S,) they stand in.

    Logits are made at scored positions only: source and padding, half of a table-to-text batch, never meet the head.
    hidden (B, T, E) at position t predicts labels (B, T) at t + 1.
    """
    targets = labels[:, 1:]
    scored = targets.ne(IGNORED)
    rows = scored.nonzero()[:, 0]
    logits = head(hidden[:, :-1][scored]).float()  # (S, V)
    return nn.functional.cross_entropy(logits, targets[scored], reduction="none"), rows
