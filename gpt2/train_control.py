"""The method: a frozen decoder-only language model steered by a trained prefix of keys and values (paper section 4).

Legend: B batch, T tokens, S source tokens, P prefix length, L layers, H key/value heads, D head size, E width of the
word embeddings, M mid_dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig

from gpt2.dataset import IGNORED
from gpt2.frozen_lm import Layers, attention_modules, count_positions, evaluating, key_values
from gpt2.packing import pack, packed_mask
from gpt2.prefix_config import PrefixConfig
from prefixlib import attention
from prefixlib.accumulation import OncePerStep
from prefixlib.errors import UserError
from prefixlib.head import token_nll
from prefixlib.packing import Packed

FAMILY = "decoder-only"


@dataclass(frozen=True)
class Past:
    """What a text finds in front of it: keys and values of S positions, of which padding is invisible."""

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
        self.once_per_step: OncePerStep | None = None  # set by a trainer that accumulates gradients

    def flat(self) -> Tensor:
        """The prefix before it is cut into layers, (P, 2*L*H*D); the network runs on P rows only."""
        return self.control_trans if self.config.init_shallow else self.control_trans(self.wte.weight)

    def forward(self, batch_size: int) -> Layers:
        """Keys and values per layer, each (B, H, P, D). Dropout is drawn for every row of the batch on its own."""
        once = self.once_per_step
        flat = once(lambda: {"prefix": self.flat()})["prefix"] if once is not None else self.flat()
        return split_layers(flat, self.config, batch_size, self.dropout)

    def past(self, base: nn.Module, batch_size: int, source: Tensor | None = None, source_mask=None, positions=None):
        """The `Past` of a batch of texts. Every kind of prefix has this method; most don't look at the source.

        source: (B, S) token ids, right-padded; source_mask: (B, S), 0 at padding; positions: as `count_positions`.
        """
        return Past(self(batch_size))

    def stored(self, base: nn.Module | None) -> dict[str, Tensor]:
        """What decoding needs: under `prefix` the keys and values (P, 2*L*H*D), and what else the class asks for."""
        return {"prefix": self.flat().detach()}


class InfixTuning(PrefixTuning):
    """Source, P trained positions, target (section 7.2): the model reads the source and P trained embeddings, and the
    network's keys and values are added to its own at these P positions.
    """

    def __init__(self, config: PrefixConfig):
        super().__init__(config)
        self.wte2 = nn.Embedding(config.preseqlen, config.n_embd)

    def past(self, base, batch_size, source=None, source_mask=None, positions=count_positions) -> Past:
        words = base.get_input_embeddings()(source)  # (B, S, E)
        inputs = torch.cat([words, self.wte2.weight.to(words.dtype).expand(batch_size, -1, -1)], dim=1)
        visible = torch.cat([source_mask.bool(), source_mask.new_ones(batch_size, len(self.wte2.weight)).bool()], dim=1)
        own = key_values(base, visible, positions, inputs_embeds=inputs)  # (B, H, S+P, D)

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

    def past(self, base, batch_size, source=None, source_mask=None, positions=None) -> Past:
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

    def past(self, base, batch_size, source=None, source_mask=None, positions=None) -> Past:
        # one row serves for all, unless dropout, here or in the model, is drawn for every row on its own
        rows = batch_size if self.training and (self.config.prefix_dropout > 0 or base.training) else 1
        inputs = self.dropout(self.embeddings().expand(rows, -1, -1)).to(base.get_input_embeddings().weight.dtype)
        layers = key_values(base, inputs_embeds=inputs)
        return Past([tuple(t.expand(batch_size, -1, -1, -1) for t in layer) for layer in layers])

    def stored(self, base):
        with torch.no_grad(), evaluating(base), evaluating(self):
            return {"prefix": join_layers(self.past(base, 1).layers).float()}


def make_prefix(config: PrefixConfig) -> nn.Module:
    """The prefix module that the settings ask for."""
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
    states = flat.unflatten(2, shape)  # (B, P, 2L, H, D)
    if dropout is not None:
        states = dropout(states)
    states = states.permute(2, 0, 3, 1, 4)  # (2L, B, H, P, D)
    return [(states[2 * layer], states[2 * layer + 1]) for layer in range(config.n_layer)]


def join_layers(layers: Layers) -> Tensor:
    """The inverse of `split_layers`: L pairs (1, H, P, D) to (P, 2*L*H*D)."""
    return torch.cat([states for layer in layers for states in layer]).permute(2, 0, 1, 3).flatten(1)


class PrefixLM(nn.Module):
    """A frozen language model with a prefix in front: what the trainer moves and the decoder asks.

    `train_base` puts the frozen model in train mode together with the prefix: for its dropout, or because
    checkpointed layers recompute only there. The original's default is eval mode, without dropout.
    `checkpointing` recomputes activations in the backward pass; a cache would not survive that, so the prefix then
    enters inside the attention function. `freeze=False` leaves the model to be tuned together with the prefix.
    """

    def __init__(
        self,
        base: nn.Module,
        prefix: nn.Module,
        train_base: bool = False,
        checkpointing: bool = False,
        freeze: bool = True,
    ):
        super().__init__()
        self.base = base
        self.prefix = prefix
        self.train_base = train_base
        self.checkpointing = checkpointing
        self.positions = count_positions  # where each row's own prefix and text stand
        for parameter in base.parameters() if freeze else ():
            parameter.requires_grad_(False)
        if checkpointing:
            try:
                attention.install(base)
            except (TypeError, ValueError) as error:
                kind = base.config.model_type
                raise UserError(
                    f"--gradient_checkpointing yes with a prefix: not for a {kind} model ({error})"
                ) from error
            attention.enable_checkpointing(base)

    @property
    def config(self) -> PreTrainedConfig:
        return self.base.config

    def train(self, mode: bool = True) -> "PrefixLM":
        super().train(mode)
        self.base.train(mode and self.train_base)
        return self

    def hidden_states(
        self, input_ids: Tensor, source: Tensor | None = None, source_mask=None, packed: Packed | None = None
    ) -> Tensor:
        """Last hidden states (B, T, E) of right-padded `input_ids` (B, T) behind the prefix, with positions after it.

        `source` and `source_mask`, both (B, S), serve prefixes that depend on the source. Without them no attention
        mask is needed: padding stands to the right of every real token and attention is causal. `packed` says how the
        texts lie if several share a row.
        """
        weight = self.base.get_input_embeddings().weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        past = self.prefix.past(self.base, len(input_ids), source, source_mask, self.positions)
        layers = [(keys.to(dtype), values.to(dtype)) for keys, values in past.layers]
        before = layers[0][0].shape[2]
        if packed is not None:
            positions = before + packed.positions
            mask = packed_mask(packed, self.config, 0 if self.checkpointing else before)
        elif past.visible is None:
            mask = None
            positions = torch.arange(before, before + input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        else:
            mask = torch.cat([past.visible, torch.ones_like(input_ids, dtype=torch.bool)], dim=1)
            positions = self.positions(mask)[:, before:]
        inputs = {"input_ids": input_ids, "position_ids": positions}
        if self.checkpointing:
            carried = dict(zip(attention_modules(self.base), layers, strict=True))
            mask = mask if packed is not None else None  # the attention function widens it, or makes a causal one
            with attention.prefix_attention(carried, past.visible):
                return self.base.base_model(**inputs, attention_mask=mask, use_cache=False).last_hidden_state
        # a cache is filled in place by the forward, so every forward gets its own
        cache = DynamicCache(layers)
        return self.base.base_model(
            **inputs, attention_mask=mask, past_key_values=cache, use_cache=True
        ).last_hidden_state

    def _pack(self, input_ids: Tensor, attention_mask: Tensor | None) -> Packed | None:
        """The batch packed, where that pays and all texts have one prefix, not one by their source or by dropout."""
        own = self.prefix.config.needs_source or (self.prefix.training and self.prefix.dropout.p > 0)
        if attention_mask is None or own:
            return None
        return pack(input_ids, attention_mask, self.config.hidden_size)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        source: Tensor | None = None,
        source_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Without labels: logits (B, T, V) at every position. With labels (B, T): the negative log-likelihood (S,) of
        the S scored tokens, and the rows (S,) they stand in.

        Logits are made at scored positions only: source and padding, half of a table-to-text batch, never meet the
        head. `attention_mask` (B, T), 0 at padding, allows for packing.
        """
        head = self.base.get_output_embeddings()
        if labels is None:
            return head(self.hidden_states(input_ids, source, source_mask))
        scored = nn.functional.pad(labels[:, 1:].ne(IGNORED), (0, 1))  # position t predicts the label at t + 1
        rows, columns = scored.nonzero(as_tuple=True)  # (S,); before the forward, for it waits for a GPU's work
        packed = self._pack(input_ids, attention_mask)
        if packed is None:
            places = rows * input_ids.shape[1] + columns
            hidden = self.hidden_states(input_ids, source, source_mask)
        else:
            places = packed.places[scored[attention_mask.bool()]]
            hidden = self.hidden_states(packed.input_ids, packed=packed)
        hidden = hidden.flatten(0, 1).index_select(0, places)  # (S, E)
        return token_nll(hidden, labels[rows, columns + 1], head), rows
