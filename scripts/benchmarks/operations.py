"""The number of operations that a training step and a decoding need, for `benchmark.py limit`.

The count follows torch's FlopCounterMode: two operations for every multiplication of a matrix product, and each query
with all of its keys, also if a causal mask hides some. Sums, norms, softmax and the optimiser are not counted. Only
needed operations count: those of real tokens, each prefix network once, logits at scored positions, and no gradient
of frozen weights or of their inputs below the first prefix.

Legend: S source and T target tokens of a text (decoder-only: S is 0, T all of the text), K beams, P prefix length,
M mid_dim, L layers, E hidden size, Q size of all query heads, G of all key heads, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from gpt2 import frozen_lm
from seq2seq import frozen_lm as seq2seq_lm


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that the count needs."""

    hidden: int  # E
    queries: int  # Q
    keys: int  # G
    layers: int  # L of the decoder
    weights: int  # in all matrices that multiply each target token, without the head
    head: int  # E*V
    encoder_layers: int = 0
    encoder_weights: int = 0  # in all matrices that multiply each source token in the encoder
    cross_weights: int = 0  # in the matrices that make the decoder's keys and values from it

    @classmethod
    def of(cls, base: nn.Module) -> "Sizes":
        """The sizes of a transformers model."""
        out = base.get_output_embeddings()
        head = out.in_features * out.out_features
        if not base.config.is_encoder_decoder:
            shape = frozen_lm.shape_of(base)
            size, layers = shape["head_dim"], shape["n_layer"]
            queries, keys = base.config.num_attention_heads * size, shape["n_head"] * size
            return cls(shape["n_embd"], queries, keys, layers, _weights(base.base_model), head)
        shape = seq2seq_lm.shape_of(base.config)
        hidden = shape["d_model"]
        queries = shape["decoder_heads"] * (shape["decoder_head_dim"] or hidden // shape["decoder_heads"])
        cross = shape["decoder_layers"] * 2 * hidden * queries
        encoder = {"encoder_layers": shape["encoder_layers"], "encoder_weights": _weights(base.get_encoder())}
        own = _weights(base.get_decoder()) - cross
        return cls(hidden, queries, queries, shape["decoder_layers"], own, head, **encoder, cross_weights=cross)

    @property
    def all_weights(self) -> int:
        """Number of weights in the matrices that every decoding step reads."""
        return self.weights + self.head


def _weights(module: nn.Module) -> int:
    return sum(child.weight.numel() for child in module.modules() if isinstance(child, nn.Linear | Conv1D))


def training_step(
    sizes: Sizes, targets: Sequence[int], scored: int, prefix: int, mid_dim: int, sources: Sequence[int] = ()
) -> dict[str, int]:
    """Operations of one optimiser step of the prefix, by part.

    targets, sources: tokens T and S of every text; scored: positions with a label, all texts together.
    """
    sources = sources or [0] * len(targets)
    read, written = sum(sources), sum(targets)
    own = sum(t * (t + prefix) for t in targets)  # pairs of a query and a key, a layer
    encoder = sum(s * (s + prefix) for s in sources)
    cross = sum(t * (s + prefix) for s, t in zip(sources, targets, strict=True)) if sizes.encoder_layers else 0
    matrices = 2 * (sizes.weights * written + (sizes.encoder_weights + sizes.cross_weights) * read)
    attention = 4 * sizes.queries * (sizes.layers * (own + cross) + sizes.encoder_layers * encoder)
    # the first layer's inputs are frozen: no gradient passes through its projections, or into its queries
    projections = 2 * sizes.hidden * (sizes.queries + 2 * sizes.keys) * (written + read)
    first = 2 * sizes.queries * (own + encoder)
    widths = [2 * sizes.layers * sizes.keys]  # widths of the prefix networks' outputs
    if sizes.encoder_layers:
        widths = [*widths * 2, 2 * sizes.encoder_layers * sizes.keys]
    network = sum(2 * prefix * (sizes.hidden * mid_dim + mid_dim * width) for width in widths)
    return {
        "forward": matrices + attention,
        "backward": matrices - projections + 2 * attention - first,
        "prefix networks": 3 * network,
        "head": 4 * scored * sizes.head,
    }


def decoding(sizes: Sizes, prompts: Sequence[int], outputs: Sequence[int], beams: int, prefix: int) -> dict[str, int]:
    """Operations of a beam search, by part: prompt and prefix are shared by the K beams of a text.

    prompts: tokens of every prompt (encoder-decoder: source); outputs: tokens of every output without its final eos;
    all beams continue from each of them.
    """
    sources = prompts if sizes.encoder_layers else [0] * len(prompts)
    starts = [1] * len(prompts) if sizes.encoder_layers else prompts
    texts = list(zip(sources, starts, outputs, strict=True))
    tokens = sum(start + beams * out for _, start, out in texts)
    own = sum(
        start * (start + prefix) + beams * (out * (start + prefix) + out * (out + 1) // 2) for _, start, out in texts
    )
    encoder = sum(s * (s + prefix) for s in sources)
    cross = sum((1 + beams * out) * (s + prefix) for s, _, out in texts) if sizes.encoder_layers else 0
    return {
        "matrices": 2 * (sizes.weights * tokens + (sizes.encoder_weights + sizes.cross_weights) * sum(sources)),
        "attention": 4 * sizes.queries * (sizes.layers * (own + cross) + sizes.encoder_layers * encoder),
        "head": 2 * sizes.head * sum(1 + beams * out for _, _, out in texts),
    }
