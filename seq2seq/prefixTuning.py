"""The method: a frozen encoder-decoder steered by three trained prefixes of keys and values (paper section 4).

Legend: B batch, P prefix length, L layers, H heads, D head size, E = H*D, M mid_dim.

Every layer attends to P more keys and values at each of three sites, which share nothing: the encoder's self-attention,
the decoder's cross-attention and the decoder's self-attention. Positions do not move: the first token has 0.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from prefixlib.system.errors import UserError
from seq2seq.frozen_lm import Layers, shape_of

FAMILY = "encoder-decoder"


@dataclass(frozen=True)
class Branch:
    """One prefix: its site, and its names in settings and files. `network` and `embedding` are the original's."""

    site: str
    embedding: str  # P learned vectors
    network: str  # the MLP, or with init_shallow the keys and values themselves
    switch: str  # the setting that turns it on
    saved: str  # its keys and values in a checkpoint


BRANCHES = (
    Branch("self", "wte", "control_trans", "use_self_prefix", "self"),
    Branch("cross", "wte2", "control_trans2", "use_cross_prefix", "encoder_decoder"),
    Branch("encoder", "wte_enc", "control_trans_enc", "use_encoder_prefix", "encoder"),
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
    encoder_head_dim: int | None = None  # D where it is not E / H
    decoder_head_dim: int | None = None

    @classmethod
    def for_model(cls, base: PreTrainedConfig, **settings: Any) -> "PrefixConfig":
        """The settings with the shape read off the base model's config. Raises UserError if they make no sense."""
        config = cls(**settings, **shape_of(base))
        if config.preseqlen < 1:
            raise UserError(f"--preseqlen {config.preseqlen}: a prefix has at least 1 position")
        if not any(getattr(config, branch.switch) for branch in BRANCHES):
            raise UserError(
                "--use_encoder_prefix, --use_cross_prefix and --use_self_prefix are all no: nothing to train"
            )
        return config

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The sites that have a prefix."""
        return tuple(branch for branch in BRANCHES if getattr(self, branch.switch))

    def shape(self, site: str) -> tuple[int, int, int]:
        """(2L, H, D) at a site: a key and a value per layer."""
        side = "encoder" if site == "encoder" else "decoder"
        heads = getattr(self, f"{side}_heads")
        return 2 * getattr(self, f"{side}_layers"), heads, getattr(self, f"{side}_head_dim") or self.d_model // heads


class PrefixTuning(nn.Module):
    """Three times P learned vectors through an MLP to keys and values for every layer (section 4.3).

    State-dict names and torch's default initialisation (embeddings N(0, 1)) are the original's.
    """

    def __init__(self, config: PrefixConfig):
        super().__init__()
        self.config = config
        self.branches = config.branches
        for branch in self.branches:
            layers, heads, size = config.shape(branch.site)
            width = layers * heads * size
            if config.init_shallow:
                self.register_parameter(branch.network, nn.Parameter(torch.randn(config.preseqlen, width)))
            else:
                self.add_module(branch.embedding, nn.Embedding(config.preseqlen, config.d_model))
                self.add_module(branch.network, _network(config, width))
        self.dropout = nn.Dropout(config.prefix_dropout)

    @property
    def drops(self) -> bool:
        """Whether dropout gives every row of a batch another prefix."""
        return self.training and self.config.prefix_dropout > 0

    def flat(self) -> dict[str, Tensor]:
        """Per site the keys and values of all layers, (P, 2*L*H*D); each network runs on P rows, once."""
        flat = {}
        for branch in self.branches:
            network = getattr(self, branch.network)
            flat[branch.site] = network if self.config.init_shallow else network(getattr(self, branch.embedding).weight)
        return flat

    @torch.no_grad()
    def stored(self, base: nn.Module | None) -> dict[str, Tensor]:
        """What decoding needs: the keys and values of every site, under the names of the checkpoint."""
        flat = self.flat()
        return {branch.saved: flat[branch.site] for branch in self.branches}

    def forward(self, batch_size: int) -> dict[str, Layers]:
        """Per site and layer keys and values (B, H, P, D), or (1, H, P, D) where all rows are equal.

        Dropout is drawn for every row of the batch separately, as in the original.
        """
        rows, dropout = (batch_size, self.dropout) if self.drops else (1, None)
        return {site: split_layers(flat, self.config, site, rows, dropout) for site, flat in self.flat().items()}


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
