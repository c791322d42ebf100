"""The settings of a prefix and the shape of the model it is made for: saved with every checkpoint, rebuilt from it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedConfig

from gpt2.dataset import Format
from prefixlib.errors import UserError


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

    @classmethod
    def for_model(cls, base: PreTrainedConfig, **settings: Any) -> "PrefixConfig":
        """The settings with the shape read off the base model's configuration. Raises UserError if P does not fit."""
        text = base.get_text_config(decoder=True)
        heads = text.num_attention_heads
        config = cls(
            n_layer=text.num_hidden_layers,
            n_head=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            n_embd=getattr(text, "word_embed_proj_dim", None) or text.hidden_size,  # OPT's can be narrower
            **settings,
        )
        limit = max_positions(base)
        if config.optim_prefix and not 1 <= config.preseqlen <= limit - 2:
            raise UserError(f"--preseqlen {config.preseqlen}: the model has {limit} positions; take 1 to {limit - 2}")
        if config.needs_source and attention_window(base):
            raise UserError(
                f"a prefix that depends on the source (--optim_prefix no, --format_mode infix) does not fit a "
                f"{base.model_type} model, whose attention reaches only {attention_window(base)} tokens back"
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

    @property
    def width(self) -> int:
        """2*L*H*D: a key and a value per layer."""
        return 2 * self.n_layer * self.n_head * self.head_dim

    @property
    def form(self) -> Format:
        """What stands in the text and what the prefix is made of."""
        return Format(self.format_mode, self.optim_prefix)

    @property
    def needs_source(self) -> bool:
        """Whether every row of a batch has a prefix of its own."""
        return not self.optim_prefix or self.format_mode == "infix"


def attention_window(base: PreTrainedConfig) -> int | None:
    """How far back the attention of a sliding-window model reaches, in tokens; None where it reaches everything."""
    text = base.get_text_config(decoder=True)
    if "local" in (getattr(text, "attention_layers", None) or ()):  # GPT-Neo
        return text.window_size
    everywhere = "sliding_attention" not in (getattr(text, "layer_types", None) or ["sliding_attention"])
    return None if everywhere else getattr(text, "sliding_window", None)


def max_positions(base: PreTrainedConfig) -> int:
    """The number of positions of the base model (P + T must not exceed it): those that every token can look back on."""
    limit = getattr(base.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is None:
        raise UserError(f"a {base.model_type} model does not say how many positions it has: it is not supported")
    return min(limit, attention_window(base) or limit)
