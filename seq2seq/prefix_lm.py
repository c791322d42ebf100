"""The model that trainer and decoder share: an encoder-decoder with or without a prefix, and its forward pass.

Batches are packed where that pays: sources lie one after the other on shared rows, and row for row their targets on
the decoder's, so that a target finds its source in the same row. A text attends to itself and the prefixes, never to
its neighbours, and its positions start at 0: its loss is that of a padded batch.

Legend: B texts, S and T tokens of the longest source and target, R rows after packing, W and D their widths,
N counted tokens, E hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prefixlib.compute import onednn, packing
from prefixlib.compute.head import Head
from prefixlib.compute.packing import Packed, Rows, lay_out, layouts, width_of
from seq2seq.frozen_lm import Layers, at_positions, attend_to, hidden_states, install, shares_rows
from seq2seq.prefixTuning import PrefixTuning


class PrefixLM(nn.Module):
    """An encoder-decoder and, in front of its attention, a prefix; `prefix=None` is the model alone.

    In train mode the frozen model runs in train mode too, its dropout on, as in the original; load it with dropout
    probabilities of 0 to train without. `freeze=False` leaves the model to be tuned together with its prefix. Raises
    UserError for a model whose attention takes no prefix.
    """

    def __init__(self, base: nn.Module, prefix: PrefixTuning | None = None, freeze: bool = True):
        super().__init__()
        self.base = base
        self.prefix = prefix
        install(base)  # refuses another kind of model before the first epoch, not after it
        self.head = Head(base)
        self.shares_rows = shares_rows(base)
        if prefix is not None and freeze:
            base.requires_grad_(False)
        onednn.install(self)

    def layers(self, rows: int = 1) -> dict[str, Layers]:
        """The prefix of every site as keys and values (rows, H, P, D), or (1, H, P, D) where rows do not differ.

        {} without a prefix.
        """
        return self.prefix(rows) if self.prefix is not None else {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        """Logits (B, T, V) for source (B, S) and decoder input (B, T), both right-padded; teacher forcing."""
        return self.head(self._hidden_states(input_ids, attention_mask, decoder_input_ids))

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
        packed = self._pack(input_ids, attention_mask, decoder_input_ids, real)
        if packed is None:
            counted = real.flatten().nonzero().squeeze(1)
            hidden = self._hidden_states(input_ids, attention_mask, decoder_input_ids)
        else:
            counted = packed.indices_of(real)
            hidden = self._packed_hidden_states(packed)
        hidden, targets = hidden.flatten(0, 1).index_select(0, counted), labels[real]  # (N, E), (N,)
        if smoothing:
            logits = self.head(hidden).float()
            total = nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
        else:
            total = self.head.nll(hidden, targets).sum()
        return total, real.sum()

    def _hidden_states(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        """The decoder's last hidden states (B, T, E)."""
        with attend_to(self.base, self.layers(len(input_ids))):
            real = self._real_tokens(decoder_input_ids)
            return hidden_states(self.base, input_ids, attention_mask, decoder_input_ids, real)

    def _pack(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, counted: Tensor
    ) -> "PackedPair | None":
        """The batch packed; None where that does not pay, or where dropout gives every text another prefix.

        None, too, for a model whose texts cannot share a row.
        """
        if not self.shares_rows or (self.prefix is not None and self.prefix.drops):
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

    def _packed_hidden_states(self, packed: "PackedPair") -> Tensor:
        """The decoder's last hidden states (R, D, E) on the packed rows."""
        encoder, decoder = self.base.get_encoder(), self.base.get_decoder()
        with (
            attend_to(self.base, self.layers(len(packed.source.text))),
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

    def _real_tokens(self, decoder_input_ids: Tensor) -> Tensor:
        """Mask (B, T) of what is not padding; the start token counts, even where it has the padding's id (Pegasus)."""
        real = decoder_input_ids.ne(self.base.config.pad_token_id)
        real[:, 0] = True
        return real


# ---- packing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedPair:
    """B sources on R rows, and their targets on R rows."""

    source: Packed
    target: Packed
    needed: Tensor  # (B, T): the tokens of the padded batch's targets that were laid out
    padding: int  # the id that hides a decoder input from the later ones

    def indices_of(self, counted: Tensor) -> Tensor:
        """Index on the flattened target rows of each position in `counted` (B, T), in the batch's order."""
        return self.target.cells[counted[self.needed]]

    def decoder_mask(self) -> Tensor:
        """(R, 1, D, D), True where a target token sees an earlier one; a start token is seen whatever its id."""
        target = self.target
        real = target.input_ids.ne(self.padding) | target.positions.eq(0)
        return (_same(target.text, target.text.where(real, -2)) & _causal(target.text)).unsqueeze(1)

    def cross_mask(self) -> Tensor:
        """(R, 1, D, W), True where a target token sees its source.

        Unused cells attend to the whole row: a query without any key would give NaN.
        """
        unused = self.target.text.eq(-1).unsqueeze(2)
        return (_same(self.target.text, self.source.text) | unused).unsqueeze(1)


def encoder_mask(source: Packed) -> Tensor:
    """(R, 1, W, W), True where a source token sees another.

    Unused cells attend to each other: a query without any key would give NaN.
    """
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

    Of `decoder_input_ids` (B, T) a target needs the tokens up to its last `counted` (B, T) position.
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
    """The rows that take the least time; one text a row if nothing is better.

    Multiplications per token of an encoder layer: about 12 E² outside attention, 2 (P + W) E, slower ones, in it, and
    2 E² for the keys and values of the cross-attention; of a decoder layer 14 E², 2 (P + D) E and 2 (P + W) E.
    """

    def time(rows: Rows) -> int:
        width, target_width = width_of(sources, rows), width_of(targets, rows)
        source = width * (7 * hidden_size + packing.SLOWNESS * (prefix_length + width))
        target = target_width * (7 * hidden_size + packing.SLOWNESS * (2 * prefix_length + width + target_width))
        return len(rows) * (source + target)

    return min(layouts(sources), key=time)
