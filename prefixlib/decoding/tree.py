"""The beams of a sentence on one row of the cache: they share the query axis, and each sees its ancestor tokens alone.

Prefix, prompt and encoder states are the same for all beams of a sentence, and so are the first tokens they share. A
row of the cache therefore holds them once, followed by every token of any beam of the sentence, and a mask says which
of these belong to a beam. Continuing other beams means choosing other rows of the mask; no key is copied.

Legend: N sentences in the batch, K beams, S cached positions of prefix and prompt, W cached positions now, H heads,
D head size.
"""

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class BeamTree:
    """Ancestry mask of the beams. `visible`, bool (N, S), marks the positions of the prompts that are not padding."""

    def __init__(self, visible: Tensor):
        self.visible = visible.bool().unsqueeze(1)  # (N, K, W); a prompt is one beam

    def advance(self, rows: Tensor) -> Tensor | None:
        """Continue the beams `rows` (N'*K',) of N*K, before K' tokens are appended to each sentence's row.

        `rows` has the order of `beam_search`: the beams of a sentence are adjacent, equally many for all. Returns the
        sentences (N',) that stay, or None if all do. `visible` is then (N', K', W+K'): what each new token sees.
        Raises ValueError for rows of another order.
        """
        before = self.visible.shape[1]
        owner = (rows // before).cpu()
        staying = torch.unique_consecutive(owner)
        beams = len(rows) // len(staying)
        if not torch.equal(owner, staying.repeat_interleave(beams)) or (staying.diff() <= 0).any():
            raise ValueError("the rows of a sentence must be adjacent, equally many for every sentence")
        chosen = self.visible.flatten(0, 1)[rows.to(self.visible.device)].unflatten(0, (len(staying), beams))
        itself = torch.eye(beams, dtype=torch.bool, device=chosen.device).expand(len(staying), -1, -1)
        all_stay = len(staying) == len(self.visible)
        self.visible = torch.cat([chosen, itself], dim=2)
        return None if all_stay else staying.to(chosen.device)


class GrowingLayer(DynamicLayer):
    """A cache layer with free columns after the tokens: a new token is written there, without copying the others."""

    SPARE = 256  # columns of a buffer that has grown

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append (N, H, T, D) keys and values; returns all of them, (N, H, W, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [states[:, :, :0] for states in (key_states, value_states)]
        used = self.get_seq_length()
        wanted = used + key_states.shape[2]
        for n, new in enumerate((key_states, value_states)):
            if self.buffers[n].shape[2] < wanted:
                grown = new.new_empty(*new.shape[:2], wanted + self.SPARE, new.shape[3])
                grown[:, :, :used] = self.buffers[n][:, :, :used]
                self.buffers[n] = grown
            self.buffers[n][:, :, used:wanted] = new
        self.keys, self.values = (buffer[:, :, :wanted] for buffer in self.buffers)
        return self.keys, self.values

    def keep(self, rows: Tensor) -> None:
        """Drop all rows (sentences) but `rows` (N',), which are in ascending order.

        They move up inside the buffers: no memory is allocated, and free columns are not copied.
        """
        used = self.get_seq_length()
        for n, buffer in enumerate(self.buffers):
            buffer[: len(rows), :, :used] = buffer[rows, :, :used]
            self.buffers[n] = buffer[: len(rows)]
        self.keys, self.values = (buffer[:, :, :used] for buffer in self.buffers)


def growing_cache() -> Cache:
    """An empty cache whose layers are `GrowingLayer`."""
    return Cache(layer_class_to_replicate=GrowingLayer)
