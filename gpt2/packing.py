"""A batch of texts packed on shared rows, for a decoder-only model with one prefix for all texts.

A text sees itself and the prefix, never its neighbours, and its positions start anew: its loss is what it was padded.

Legend: B texts, T tokens of the longest, R rows after packing, W their width, P prefix length.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from gpt2.frozen_lm import position_mask
from prefixlib.packing import Packed, Rows, lay_out, layouts, width_of


def pack(input_ids: Tensor, attention_mask: Tensor, hidden_size: int) -> Packed | None:
    """Pack right-padded `input_ids` (B, T) of which `attention_mask` (B, T) is real; None where it would not pay."""
    lengths = attention_mask.sum(dim=1).tolist()
    rows = best_layout(lengths, hidden_size)
    if len(rows) == len(lengths):
        return None
    return lay_out(input_ids, attention_mask, lengths, rows)


def best_layout(lengths: Sequence[int], hidden_size: int) -> Rows:
    """The rows that take the fewest operations; one text a row if nothing is better.

    A transformer layer takes about 12 E² multiplications per token outside attention and 2 W E in it.
    """

    def operations(rows: Rows) -> int:
        width = width_of(lengths, rows)
        return len(rows) * width * (6 * hidden_size + width)

    return min(layouts(lengths), key=operations)


def packed_mask(packed: Packed, config: PreTrainedConfig, before: int) -> Tensor | dict[str, Tensor]:
    """What each token may look at, for `before` prefix positions in the cache and its row: see `position_mask`.

    Room left looks at room left, so that no query is without a key.
    """
    same = packed.text.unsqueeze(2) == packed.text.unsqueeze(1)
    seen = nn.functional.pad(same & torch.ones_like(same[0]).tril(), (before, 0), value=True)  # (R, W, P+W)
    prefix = torch.arange(before, device=seen.device).expand(len(seen), -1)
    queries = before + packed.positions
    return position_mask(config, seen, queries, torch.cat([prefix, queries], dim=1))
