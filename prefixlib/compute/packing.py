"""Texts of a padded batch placed one after the other on fewer rows, so that no computation is spent on padding.

The cheapest layout and the attention mask of a packed row depend on the model: see prefix_lm.py of each tree.

Legend: B texts, T tokens of the longest, N real tokens, R rows after packing, W their width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Rows = list[list[int]]  # per row the texts on it, from left to right
SLOWNESS = 3  # a multiplication in masked attention takes as long as this many in a linear layer (measured on a CPU)


@dataclass(frozen=True)
class Packed:
    """B texts on R rows."""

    input_ids: Tensor  # (R, W)
    positions: Tensor  # (R, W), from 0 in every text
    text: Tensor  # (R, W): the index of the text, -1 in unused cells
    cells: Tensor  # (N,): the cell of each real token on the flattened rows, in the order of the padded batch


def lay_out(input_ids: Tensor, real: Tensor, lengths: Sequence[int], rows: Rows) -> Packed:
    """Place the real tokens of `input_ids` (B, T) on `rows`; `real` is bool (B, T), `lengths` its B sums."""
    width = width_of(lengths, rows)
    start = [0] * len(lengths)  # first cell of each text, on the flattened rows
    for row, members in enumerate(rows):
        column = row * width
        for text in members:
            start[text] = column
            column += lengths[text]
    text, position = real.nonzero(as_tuple=True)  # (N,)
    cells = torch.tensor(start, device=text.device)[text] + position

    def on_rows(values: Tensor, filler: int) -> Tensor:
        return values.new_full((len(rows) * width,), filler).index_copy_(0, cells, values).view(len(rows), width)

    return Packed(
        input_ids=on_rows(input_ids[text, position], filler=0),
        positions=on_rows(position, filler=0),
        text=on_rows(text, filler=-1),
        cells=cells,
    )


def width_of(lengths: Sequence[int], rows: Rows) -> int:
    """Tokens on the longest row."""
    return max(sum(lengths[text] for text in members) for members in rows)


def layouts(lengths: Sequence[int]) -> list[Rows]:
    """The layout with one text a row, and a first-fit layout for every width that may need fewer rows."""
    longest, total = max(lengths), sum(lengths)
    widths = sorted({max(longest, -(-total // rows)) for rows in range(1, len(lengths))})
    return [[[text] for text in range(len(lengths))], *(first_fit(lengths, width) for width in widths)]


def first_fit(lengths: Sequence[int], width: int) -> Rows:
    """Rows of at most `width` tokens, filled by first fit, the longest texts first."""
    rows: Rows = []
    free: list[int] = []  # unused cells of each row
    for text in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        row = next((n for n, left in enumerate(free) if left >= lengths[text]), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(width)
        rows[row].append(text)
        free[row] -= lengths[text]
    return rows
