"""A batch of sources and targets packed on shared rows, for an encoder-decoder.

Row for row, the targets of the encoder's texts lie on the decoder's: the cross-attention of a row stays within it. A
text sees itself and the prefixes, never its neighbours, and its positions start anew: its loss is what it was padded.

Legend: B texts, S and T tokens of the longest source and target, R rows after packing, W and D their widths.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prefixlib.packing import Packed, Rows, lay_out, layouts, width_of


@dataclass(frozen=True)
class PackedPair:
    """B sources on R rows, and their targets on R rows."""

    source: Packed
    target: Packed
    needed: Tensor  # (B, T): which of the padded batch's targets are there
    padding: int  # the id that hides a decoder input from the later ones

    def places_of(self, counted: Tensor) -> Tensor:
        """Where on the flattened target rows each position in `counted` (B, T) stands, in the batch's order."""
        return self.target.places[counted[self.needed]]

    def decoder_mask(self) -> Tensor:
        """(R, 1, D, D), True where a target token sees an earlier one; a start token is seen whatever its id."""
        target = self.target
        real = target.input_ids.ne(self.padding) | target.positions.eq(0)
        return (_same(target.text, target.text.where(real, -2)) & _causal(target.text)).unsqueeze(1)

    def cross_mask(self) -> Tensor:
        """(R, 1, D, W), True where a target token sees its source; room left sees all, so that it sees something."""
        room = self.target.text.eq(-1).unsqueeze(2)
        return (_same(self.target.text, self.source.text) | room).unsqueeze(1)


def encoder_mask(source: Packed) -> Tensor:
    """(R, 1, W, W), True where a source token sees another; room left sees room left."""
    return _same(source.text, source.text).unsqueeze(1)


def _same(queries: Tensor, keys: Tensor) -> Tensor:
    return queries.unsqueeze(2) == keys.unsqueeze(1)


def _causal(text: Tensor) -> Tensor:
    return torch.ones(text.shape[1], text.shape[1], dtype=torch.bool, device=text.device).tril()


def pack(
    input_ids: Tensor,
    attention_mask: Tensor,
    decoder_input_ids: Tensor,
    counted: Tensor,
    *,
    padding: int,
    hidden_size: int,
    prefix_length: int,
) -> PackedPair | None:
    """Pack sources `input_ids` (B, S) of which `attention_mask` is real, and their targets; None if it would not pay.

    Of `decoder_input_ids` (B, T) a target needs what stands up to its last `counted` (B, T) position.
    """
    needed = counted.flip(1).cumsum(dim=1).flip(1).gt(0)
    sources, targets = torch.stack([attention_mask.sum(dim=1), needed.sum(dim=1)]).tolist()
    rows = best_layout(sources, targets, hidden_size, prefix_length)
    if len(rows) == len(sources) or not any(targets):
        return None
    return PackedPair(
        source=lay_out(input_ids, attention_mask, sources, rows),
        target=lay_out(decoder_input_ids, needed, targets, rows),
        needed=needed,
        padding=padding,
    )


def pack_sources(input_ids: Tensor, attention_mask: Tensor, *, hidden_size: int, prefix_length: int) -> Packed | None:
    """Pack sources `input_ids` (B, S) of which `attention_mask` is real, for the encoder; None if it would not pay."""
    sources = attention_mask.sum(dim=1).tolist()
    rows = best_layout(sources, [0] * len(sources), hidden_size, prefix_length)
    return lay_out(input_ids, attention_mask, sources, rows) if len(rows) < len(sources) else None


def best_layout(sources: Sequence[int], targets: Sequence[int], hidden_size: int, prefix_length: int) -> Rows:
    """The rows that take the fewest operations; one text a row if nothing is better.

    Multiplications per token of an encoder layer: about 12 E² outside attention, 2 (P + W) E in it, and 2 E² for the
    keys and values of the cross-attention; of a decoder layer 14 E², 2 (P + D) E and 2 (P + W) E.
    """

    def operations(rows: Rows) -> int:
        width, target_width = width_of(sources, rows), width_of(targets, rows)
        source = width * (7 * hidden_size + prefix_length + width)
        target = target_width * (7 * hidden_size + 2 * prefix_length + width + target_width)
        return len(rows) * (source + target)

    return min(layouts(sources), key=operations)
