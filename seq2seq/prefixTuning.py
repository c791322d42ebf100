"""The method: a frozen encoder-decoder steered by three trained prefixes of keys and values (paper section 4).

Legend: B batch, S source tokens, T target tokens, V vocabulary, P prefix length, L layers, H heads, D head size,
E = H*D, M mid_dim.

Every layer attends to P more keys and values at each of three sites, which share nothing: the encoder's self-attention,
the decoder's cross-attention and the decoder's self-attention. Positions stay the model's own, 0 for the first token.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from prefixlib import attention
from prefixlib.accumulation import OncePerStep
from prefixlib.errors import UserError
from prefixlib.head import token_nll
from seq2seq.frozen_lm import Layers, at_positions, attend_to, attention_sites
from seq2seq.packing import PackedPair, encoder_mask, pack

FAMILY = "encoder-decoder"


@dataclass(frozen=True)
class Branch:
    """One prefix: its site, and the names its parameters have in the original's state dict."""

    site: str
    embedding: str  # P learned vectors
    network: str  # the MLP, or the keys and values themselves (init_shallow)
    switch: str  # the setting that turns it on


BRANCHES = (
    Branch("self", "wte", "control_trans", "use_self_prefix"),
    Branch("encoder_decoder", "wte2", "control_trans2", "use_cross_prefix"),
    Branch("encoder", "wte_enc", "control_trans_enc", "use_encoder_prefix"),
)


@dataclass(frozen=True)
class PrefixConfig:
    """Everything needed to rebuild the prefix module: the method's settings, then the base model's shape."""

    preseqlen: int  # P
    mid_dim: int  # M
    prefix_dropout: float
    use_deep: bool  # three linear layers instead of two
    use_encoder_prefix: bool
    use_cross_prefix: bool
    use_self_prefix: bool
    init_shallow: bool  # the keys and values are the parameters: no MLP
    encoder_layers: int  # L of the site "encoder"
    decoder_layers: int  # L of the other two
    encoder_heads: int
    decoder_heads: int
    d_model: int  # E

    @classmethod
    def for_model(cls, base: PreTrainedConfig, **settings: Any) -> "PrefixConfig":
        """The settings with the shape read off the base model. Raises UserError if they make no sense."""
        config = cls(
            encoder_layers=base.encoder_layers,
            decoder_layers=base.decoder_layers,
            encoder_heads=base.encoder_attention_heads,
            decoder_heads=base.decoder_attention_heads,
            d_model=base.d_model,
            **settings,
        )
        if config.preseqlen < 1:
            raise UserError(f"--preseqlen {config.preseqlen}: a prefix has at least 1 position")
        if not any(getattr(config, branch.switch) for branch in BRANCHES):
            raise UserError(
                "--use_encoder_prefix, --use_cross_prefix and --use_self_prefix are all no: nothing to train"
            )
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

    def shape(self, site: str) -> tuple[int, int, int]:
        """(2L, H, D) at a site: a key and a value per layer."""
        side = "encoder" if site == "encoder" else "decoder"
        heads = getattr(self, f"{side}_heads")
        return 2 * getattr(self, f"{side}_layers"), heads, self.d_model // heads


class PrefixTuning(nn.Module):
    """Three times P learned vectors through an MLP to keys and values for every layer (section 4.3).

    State-dict names and torch's default initialisation (embeddings N(0, 1)) are the original's.
    """

    def __init__(self, config: PrefixConfig):
        super().__init__()
        self.config = config
        self.branches = tuple(branch for branch in BRANCHES if getattr(config, branch.switch))
        for branch in self.branches:
            layers, heads, size = config.shape(branch.site)
            width = layers * heads * size
            if config.init_shallow:
                self.register_parameter(branch.network, nn.Parameter(torch.randn(config.preseqlen, width)))
            else:
                self.add_module(branch.embedding, nn.Embedding(config.preseqlen, config.d_model))
                self.add_module(branch.network, _network(config, width))
        self.dropout = nn.Dropout(config.prefix_dropout)
        self.once_per_step: OncePerStep | None = None  # set by a trainer that accumulates gradients

    @property
    def drops(self) -> bool:
        """Whether every row of a batch has a prefix of its own, by dropout."""
        return self.training and self.config.prefix_dropout > 0

    def flat(self) -> dict[str, Tensor]:
        """Per site the prefix before it is cut into layers, (P, 2*L*H*D); each network runs on P rows, once."""
        if self.config.init_shallow:
            return {branch.site: getattr(self, branch.network) for branch in self.branches}
        return {
            branch.site: getattr(self, branch.network)(getattr(self, branch.embedding).weight)
            for branch in self.branches
        }

    def forward(self, batch_size: int) -> dict[str, Layers]:
        """Per site and layer keys and values (B, H, P, D), or (1, H, P, D) where all rows are equal.

        Dropout is drawn for every row of the batch on its own, as in the original.
        """
        rows, dropout = (batch_size, self.dropout) if self.drops else (1, None)
        flat = self.once_per_step(self.flat) if self.once_per_step is not None else self.flat()
        return {site: split_layers(states, self.config, site, rows, dropout) for site, states in flat.items()}


def _network(config: PrefixConfig, width: int) -> nn.Sequential:
    """Linear E→M, Tanh, [Linear M→M, Tanh,] Linear M→2·L·E."""
    deep = [nn.Linear(config.mid_dim, config.mid_dim), nn.Tanh()] if config.use_deep else []
    return nn.Sequential(nn.Linear(config.d_model, config.mid_dim), nn.Tanh(), *deep, nn.Linear(config.mid_dim, width))


def split_layers(flat: Tensor, config: PrefixConfig, site: str, rows: int, dropout: nn.Module | None = None) -> Layers:
    """Cut (P, 2*L*H*D) into L pairs of keys and values (B, H, P, D): views of one copy, unless dropout is on.

    Raises UserError if the prefix was made for a model of another shape.
    """
    shape = config.shape(site)
    if flat.shape[1] != shape[0] * shape[1] * shape[2]:
        raise UserError(
            f"the {site} prefix has {flat.shape[1]} numbers per position, the model needs {'x'.join(map(str, shape))}"
        )
    states = flat.view(-1, *shape).permute(1, 2, 0, 3).unsqueeze(1)  # (2L, 1, H, P, D)
    states = states.expand(-1, rows, -1, -1, -1)  # (2L, B, H, P, D)
    if dropout is not None:
        states = dropout(states)
    states = states.unbind()  # one backward for all: an index each would fill the whole with zeros 2L times over
    return list(zip(states[::2], states[1::2], strict=True))


class PrefixLM(nn.Module):
    """A frozen encoder-decoder with its prefixes: what the trainer moves and the decoder asks.

    In train mode the frozen model runs in train mode too, its dropout on, as in the original; load it with dropout
    probabilities of 0 to train without. `prefix` is None for the model alone (fine-tuning, or no prefix);
    `freeze=False` leaves the model to be tuned together with its prefixes.
    """

    def __init__(self, base: nn.Module, prefix: PrefixTuning | None, freeze: bool = True):
        super().__init__()
        self.base = base
        self.prefix = prefix
        attention.install(base)
        attention_sites(base)  # refuse another kind of model before the first epoch, not after it
        for parameter in base.parameters() if prefix is not None and freeze else ():
            parameter.requires_grad_(False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        """Logits (B, T, V) for source (B, S) and decoder input (B, T), both right-padded; teacher forcing."""
        return self._logits(self._hidden_states(input_ids, attention_mask, decoder_input_ids))

    def loss(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        decoder_input_ids: Tensor,
        labels: Tensor,
        smoothing: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy summed over the labels (B, T) that are not padding, and their number; no logits of the others.

        With smoothing e: (1-e)·NLL + e/V · sum over the vocabulary of -log p, as in the original, which never divided
        the sum by the number of tokens; the trainer here does.
        """
        real = labels.ne(self.base.config.pad_token_id)
        targets, packed = labels[real], self._pack(input_ids, attention_mask, decoder_input_ids, real)
        if packed is None:
            places = real.flatten().nonzero().squeeze(1)
            hidden = self._hidden_states(input_ids, attention_mask, decoder_input_ids)
        else:
            places = packed.places_of(real)
            hidden = self._packed_hidden_states(packed)
        hidden = hidden.flatten(0, 1).index_select(0, places)  # (N, E)
        if smoothing:
            logits = self._logits(hidden).float()
            total = nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
        else:
            total = token_nll(hidden, targets, self.base.get_output_embeddings(), self.base.final_logits_bias).sum()
        return total, real.sum()

    def _hidden_states(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        """The decoder's last hidden states (B, T, E)."""
        prefix = self.prefix(input_ids.shape[0]) if self.prefix is not None else {}
        with attend_to(self.base, prefix):
            return self.base.base_model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                decoder_input_ids=decoder_input_ids,
                decoder_attention_mask=self._real_tokens(decoder_input_ids),
                use_cache=False,
            ).last_hidden_state

    def _pack(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, counted: Tensor):
        """The batch packed, where that pays and a prefix is not drawn for every text on its own (dropout)."""
        if self.prefix is not None and self.prefix.drops:
            return None
        return pack(
            input_ids,
            attention_mask,
            decoder_input_ids,
            counted,
            padding=self.base.config.pad_token_id,
            hidden_size=self.base.config.d_model,
            prefix_length=self.prefix.config.preseqlen if self.prefix is not None else 0,
        )

    def _packed_hidden_states(self, packed: PackedPair) -> Tensor:
        """The decoder's last hidden states (R, D, E) on the packed rows."""
        base, prefix = self.base, self.prefix(len(packed.source.text)) if self.prefix is not None else {}
        encoder, decoder = base.get_encoder(), base.get_decoder()
        with (
            attend_to(base, prefix),
            at_positions(encoder.embed_positions, packed.source.positions),
            at_positions(decoder.embed_positions, packed.target.positions),
        ):
            encoded = encoder(input_ids=packed.source.input_ids, attention_mask=encoder_mask(packed.source))
            return decoder(
                input_ids=packed.target.input_ids,
                attention_mask=packed.decoder_mask(),
                encoder_hidden_states=encoded.last_hidden_state,
                encoder_attention_mask=packed.cross_mask(),
                use_cache=False,
            ).last_hidden_state

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.base.get_output_embeddings()(hidden) + self.base.final_logits_bias

    def _real_tokens(self, decoder_input_ids: Tensor) -> Tensor:
        """Mask (B, T) of what is not padding; the start token counts, even where padding's id is used for it."""
        real = decoder_input_ids.ne(self.base.config.pad_token_id)
        real[:, 0] = True
        return real
