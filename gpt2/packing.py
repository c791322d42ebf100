"""Texts of a padded batch laid one after the other, so that no computation is spent on padding.

A text sees itself and the prefix, never its neighbours, and its positions start anew: its loss is what it was padded.

Legend: B texts, T tokens of the longest, N real tokens, R rows after packing, W their width, P prefix length.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from gpt2.frozen_lm import position_mask


@dataclass(frozen=True)
class Packed:
    """B texts on R rows."""

    input_ids: Tensor  # (R, W)
    positions: Tensor  # (R, W), from 0 in every text
    text: Tensor  # (R, W): the number of the text, -1 where a row has room left
    places: Tensor  # (N,): where on the flattened rows each real token stands, in the order of the padded batch

    def mask(self, config: PreTrainedConfig, before: int) -> Tensor | dict[str, Tensor]:
        """What each token may look at, for `before` cached prefix positions and its row: see `position_mask`.

        Room left looks at room left, so that no query is without a key.
        """
        same = self.text.unsqueeze(2) == self.text.unsqueeze(1)
        seen = nn.functional.pad(same & torch.ones_like(same[0]).tril(), (before, 0), value=True)  # (R, W, P+W)
        prefix = torch.arange(before, device=seen.device).expand(len(seen), -1)
        queries = before + self.positions
        return position_mask(config, seen, queries, torch.cat([prefix, queries], dim=1))


def pack(input_ids: Tensor, attention_mask: Tensor, hidden_size: int) -> Packed | None:
    """Pack right-padded `input_ids` (B, T) of which `attention_mask` (B, T) is real; None where it would not pay."""
    lengths = attention_mask.sum(dim=1).tolist()
    width, rows = best_layout(lengths, hidden_size)
    if len(rows) == len(lengths):
        return None
    start = [0] * len(lengths)  # of each text, on the flattened rows
    for row, members in enumerate(rows):
        column = 0
        for text in members:
            start[text] = row * width + column
            column += lengths[text]
    text, position = attention_mask.nonzero(as_tuple=True)  # (N,)
    places = torch.tensor(start, device=text.device)[text] + position

    def laid_out(values: Tensor, filler: int) -> Tensor:
        return values.new_full((len(rows) * width,), filler).index_copy_(0, places, values).view(len(rows), width)

    return Packed(
        input_ids=laid_out(input_ids[text, position], filler=0),
        positions=laid_out(position, filler=0),
        text=laid_out(text, filler=-1),
        places=places,
    )


def best_layout(lengths: Sequence[int], hidden_size: int) -> tuple[int, list[list[int]]]:
    """The width and, per row, the texts on it that take the fewest operations; one text a row if nothing is better.

    A transformer layer takes about 12 E² multiplications per token outside attention and 2 W E in it.
    """
    longest, total = max(lengths), sum(lengths)
    alone = longest, [[text] for text in range(len(lengths))]
    widths = [max(longest, -(-total // rows)) for rows in range(1, len(lengths))]
    layouts = [alone, *((width, first_fit(lengths, width)) for width in sorted(set(widths)))]
    return min(layouts, key=lambda layout: len(layout[1]) * layout[0] * (6 * hidden_size + layout[0]))


def first_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Rows of at most `width` tokens, filled by first fit, the longest texts first."""
    rows: list[list[int]] = []
    room: list[int] = []
    for text in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        row = next((n for n, left in enumerate(room) if left >= lengths[text]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(text)
        room[row] -= lengths[text]
    return rows
