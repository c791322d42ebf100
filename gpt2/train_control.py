"""The method: a frozen decoder-only language model steered by a trained prefix of keys and values (paper section 4).

Legend: B batch, T tokens, S source tokens, P prefix length, L layers, H key/value heads, D head size, E width of the
word embeddings, M mid_dim.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from gpt2.frozen_lm import Layers, attention_window, key_values, max_positions, shape_of
from prefixlib.base_model.load import evaluating
from prefixlib.system.errors import UserError

FAMILY = "decoder-only"


@dataclass(frozen=True)
class PrefixConfig:
    """Everything needed to rebuild the prefix module: the method's settings, then the base model's shape."""

    preseqlen: int  # P; 0 where the prefix is made of the source and has its length
    mid_dim: int  # M
    prefix_dropout: float
    prefix_mode: str
    format_mode: str
    n_layer: int  # L
    n_head: int  # H, heads of the keys and values (fewer than the queries' in grouped-query models)
    head_dim: int  # D
    n_embd: int  # E, the width of the prefix's input embeddings
    # settings that came later have the values that earlier checkpoints mean
    optim_prefix: bool = True  # a free prefix; False: made of the source's words
    parametrize_emb: str = "MLP"
    use_deep: bool = False  # three linear layers instead of two
    init_shallow: bool = False  # the keys and values are the parameters: no MLP
    init_text: str | None = None  # the text that the training started from
    head_shapes: list[list[int]] | None = None  # every layer's (H, D), or its keys' and values', where they differ

    @classmethod
    def for_model(cls, base: nn.Module, **settings: Any) -> "PrefixConfig":
        """The settings with the shape read off the base model. Raises UserError if they do not fit it."""
        config = cls(**shape_of(base), **settings)
        config.check_positions(base.config)
        return config

    def check_positions(self, base: PreTrainedConfig) -> None:
        """Raise UserError if P does not fit the base model's positions, or its window hides a part of the prefix."""
        limit = max_positions(base)
        if self.optim_prefix and not 1 <= self.preseqlen <= limit - 2:
            raise UserError(f"--preseqlen {self.preseqlen}: the model has {limit} positions; take 1 to {limit - 2}")
        if self.needs_source and attention_window(base):
            raise UserError(
                f"a prefix that depends on the source (--optim_prefix no, --format_mode infix) does not fit a "
                f"{base.model_type} model, whose attention reaches only {attention_window(base)} tokens back"
            )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def shapes(self) -> list[Sequence[int]]:
        """(H, D) of the keys of the first layer, of its values, of the keys of the second, ..., 2L in all."""
        layers = self.head_shapes or [(self.n_head, self.head_dim)] * self.n_layer
        return [shape for layer in layers for shape in (layer[:2], layer[-2:])]

    @property
    def width(self) -> int:
        """2*L*H*D: a key and a value per layer."""
        return sum(heads * size for heads, size in self.shapes)

    @property
    def needs_source(self) -> bool:
        """Whether every row of a batch has a prefix of its own."""
        return not self.optim_prefix or self.format_mode == "infix"


@dataclass(frozen=True)
class Past:
    """Keys and values that precede the text, at S positions, of which padding is invisible."""

    layers: Layers  # (B, H, S, D), or one row for all
    visible: Tensor | None = None  # bool (B, S); None if all positions count


def reparametrisation(config: PrefixConfig, outputs: int) -> nn.Sequential:
    """Linear E→M, Tanh, [Linear M→M, Tanh,] Linear M→outputs (section 4.3), with torch's default initialisation."""
    deep = [nn.Linear(config.mid_dim, config.mid_dim), nn.Tanh()] if config.use_deep else []
    return nn.Sequential(nn.Linear(config.n_embd, config.mid_dim), nn.Tanh(), *deep, nn.Linear(config.mid_dim, outputs))


class PrefixTuning(nn.Module):
    """P learned vectors through an MLP to keys and values for every layer (section 4.3, reparametrisation).

    State-dict names and torch's default initialisation (embeddings N(0, 1)) are the original's. With `init_shallow` the
    parameters are the keys and values themselves, (P, 2*L*H*D), N(0, 1); so is a stored prefix, without its MLP.
    """

    def __init__(self, config: PrefixConfig):
        super().__init__()
        self.config = config
        if config.init_shallow:
            self.control_trans = nn.Parameter(torch.randn(config.preseqlen, config.width))
        else:
            self.wte = nn.Embedding(config.preseqlen, config.n_embd)
            self.control_trans = reparametrisation(config, config.width)
        self.dropout = nn.Dropout(config.prefix_dropout)

    def flat(self) -> Tensor:
        """The prefix before it is cut into layers, (P, 2*L*H*D); the network runs on P rows only."""
        return self.control_trans if self.config.init_shallow else self.control_trans(self.wte.weight)

    def forward(self, batch_size: int) -> Layers:
        """Keys and values per layer, each (B, H, P, D). Dropout is drawn for every row of the batch on its own."""
        return split_layers(self.flat(), self.config, batch_size, self.dropout)

    def past(
        self, base: nn.Module, batch_size: int, source: Tensor | None = None, source_mask: Tensor | None = None
    ) -> Past:
        """The `Past` of a batch of texts. Every kind of prefix has this method; most do not use the source.

        source: (B, S) token ids, right-padded; source_mask: (B, S), 0 at padding.
        """
        return Past(self(batch_size))

    def stored(self, base: nn.Module | None) -> dict[str, Tensor]:
        """What decoding needs: under `prefix` the keys and values (P, 2*L*H*D), and what else the class needs."""
        return {"prefix": self.flat().detach()}


class AnchoredPrefixTuning(PrefixTuning):
    """Keys and values without an MLP, the first position of which stays as it starts (--freeze_first).

    Models attend to their first position whatever it says; a trained cache keeps it (Eyuboglu et al. 2025, Cartridges).
    The state dict is PrefixTuning's: one array (P, 2*L*H*D).
    """

    def __init__(self, config: PrefixConfig):
        super().__init__(config)
        self.first = nn.Parameter(self.control_trans.data[:1].clone(), requires_grad=False)  # (1, 2*L*H*D)
        self.control_trans = nn.Parameter(self.control_trans.data[1:].clone())  # (P-1, 2*L*H*D)
        self.register_state_dict_post_hook(_join_first)
        self.register_load_state_dict_pre_hook(_split_first)

    def flat(self) -> Tensor:
        return torch.cat([self.first, self.control_trans])


def _join_first(module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    name = f"{prefix}control_trans"
    state[name] = torch.cat([state.pop(f"{prefix}first"), state[name]])


def _split_first(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    name = f"{prefix}control_trans"
    state[f"{prefix}first"], state[name] = state[name][:1], state[name][1:]


class InfixTuning(PrefixTuning):
    """Source, P trained positions, target (section 7.2): the model reads the source and P trained embeddings, and the
    network's keys and values are added to its own at these P positions.
    """

    def __init__(self, config: PrefixConfig):
        super().__init__(config)
        self.wte2 = nn.Embedding(config.preseqlen, config.n_embd)

    def past(self, base, batch_size, source=None, source_mask=None) -> Past:
        words = base.get_input_embeddings()(source)  # (B, S, E)
        inputs = torch.cat([words, self.wte2.weight.to(words.dtype).expand(batch_size, -1, -1)], dim=1)
        visible = torch.cat([source_mask.bool(), source_mask.new_ones(batch_size, len(self.wte2.weight)).bool()], dim=1)
        own = key_values(base, visible, inputs_embeds=inputs)  # (B, H, S+P, D)

        def added(states: Tensor, trained: Tensor) -> Tensor:
            return states + nn.functional.pad(trained, (0, 0, source.shape[1], 0))  # nothing is added to the source's

        return Past([(added(k, a), added(v, b)) for (k, v), (a, b) in zip(own, self(batch_size), strict=True)], visible)

    def stored(self, base):
        return {**super().stored(base), "wte2": self.wte2.weight.detach()}


class SourcePrefixTuning(nn.Module):
    """A prefix made of S words: the MLP turns the model's own embeddings of them into keys and values."""

    def __init__(self, config: PrefixConfig):
        super().__init__()
        self.config = config
        self.control_trans = reparametrisation(config, config.width)
        self.dropout = nn.Dropout(config.prefix_dropout)

    def past(self, base, batch_size, source=None, source_mask=None) -> Past:
        flat = self.control_trans(base.get_input_embeddings()(source).float())  # (B, S, 2*L*H*D)
        return Past(split_rows(flat, self.config, self.dropout), source_mask.bool())

    def stored(self, base):
        return {}  # there is nothing to compute beforehand: decoding needs the network


class PrefixEmbTuning(nn.Module):
    """P trained input embeddings (section 7.2): the prefix is what the model makes of them at positions 0..P-1."""

    def __init__(self, config: PrefixConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.preseqlen, config.n_embd)
        if config.parametrize_emb == "MLP":
            self.control_trans = reparametrisation(config, config.n_embd)
        self.dropout = nn.Dropout(config.prefix_dropout)

    def embeddings(self) -> Tensor:
        """(P, E)."""
        return self.control_trans(self.wte.weight) if self.config.parametrize_emb == "MLP" else self.wte.weight

    def past(self, base, batch_size, source=None, source_mask=None) -> Past:
        # one row serves for all, unless dropout, here or in the model, is drawn for every row on its own
        rows = batch_size if self.training and (self.config.prefix_dropout > 0 or base.training) else 1
        inputs = self.dropout(self.embeddings().expand(rows, -1, -1)).to(base.get_input_embeddings().weight.dtype)
        layers = key_values(base, inputs_embeds=inputs)
        return Past([tuple(t.expand(batch_size, -1, -1, -1) for t in layer) for layer in layers])

    def stored(self, base):
        with torch.no_grad(), evaluating(base), evaluating(self):
            return {"prefix": join_layers(self.past(base, 1).layers).float()}


def make_prefix(config: PrefixConfig, freeze_first: bool = False) -> nn.Module:
    """The prefix module that the settings ask for."""
    if freeze_first:
        return AnchoredPrefixTuning(config)
    if config.prefix_mode == "embedding":
        return PrefixEmbTuning(config)
    if not config.optim_prefix:
        return SourcePrefixTuning(config)
    return InfixTuning(config) if config.format_mode == "infix" else PrefixTuning(config)


def split_layers(flat: Tensor, config: PrefixConfig, batch_size: int, dropout: nn.Module | None = None) -> Layers:
    """Cut (P, 2*L*H*D) into L pairs of keys and values (B, H, P, D): views of one copy, unless dropout is on.

    Raises UserError if the prefix was made for a model of another shape.
    """
    return split_rows(flat.unsqueeze(0).expand(batch_size, -1, -1), config, dropout)


def split_rows(flat: Tensor, config: PrefixConfig, dropout: nn.Module | None = None) -> Layers:
    """Cut (B, P, 2*L*H*D) into L pairs of keys and values (B, H, P, D), as `split_layers` does."""
    shape = (2 * config.n_layer, config.n_head, config.head_dim)
    if flat.shape[2] != config.width:
        raise UserError(
            f"the prefix has {flat.shape[2]} numbers per position, the model needs {'x'.join(map(str, shape))}"
        )
    if config.head_shapes:
        widths = [heads * size for heads, size in config.shapes]
        parts = (flat if dropout is None else dropout(flat)).split(widths, dim=2)
        states = [part.unflatten(2, shape).transpose(1, 2) for part, shape in zip(parts, config.shapes, strict=True)]
        return list(zip(states[::2], states[1::2], strict=True))
    states = flat.unflatten(2, shape)  # (B, P, 2L, H, D)
    if dropout is not None:
        states = dropout(states)
    states = states.permute(2, 0, 3, 1, 4)  # (2L, B, H, P, D)
    return [(states[2 * layer], states[2 * layer + 1]) for layer in range(config.n_layer)]


def join_layers(layers: Layers) -> Tensor:
    """The inverse of `split_layers`: L pairs (1, H, P, D) to (P, 2*L*H*D)."""
    return torch.cat([states[0].transpose(0, 1).flatten(1) for layer in layers for states in layer], dim=1)
