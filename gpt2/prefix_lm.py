"""PrefixLM: the forward pass behind the prefix, with texts packed on shared rows and activations checkpointed.

Packing: several texts of a padded batch share a row, so that no computation is spent on padding. A text sees itself and
the prefix, never its neighbours, and its positions start anew: its loss is that of the padded batch.

Legend: B texts, T tokens of the longest, S scored tokens, P prefix length, R rows after packing, W their width,
E hidden size, V vocabulary.
"""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig

from gpt2.dataset import IGNORED, Encoded, collate
from gpt2.frozen_lm import attention_modules, check_attention, count_positions, position_mask
from gpt2.train_control import Past
from prefixlib.base_model.load import evaluating
from prefixlib.compute import attention, onednn, packing
from prefixlib.compute.head import Head
from prefixlib.compute.packing import Packed, Rows, lay_out, layouts, width_of
from prefixlib.system.errors import UserError


class PrefixLM(nn.Module):
    """A language model with a prefix in front, or alone (`prefix` None): the model that is trained.

    freeze: the base model is frozen, as it is behind a prefix unless both are tuned together.
    train_base: the base model is put in train mode together with the prefix: for its dropout, or because checkpointed
        layers recompute only there. The original's default behind a prefix is eval mode, without dropout.
    checkpointing: activations are recomputed in the backward pass. A cache would not survive that, so the prefix then
        enters inside the attention function.
    """

    def __init__(
        self,
        base: nn.Module,
        prefix: nn.Module | None,
        train_base: bool = False,
        checkpointing: bool = False,
        freeze: bool = True,
    ):
        super().__init__()
        self.base = base
        self.head = Head(base)
        self.prefix = prefix
        self.train_base = train_base
        self.checkpointing = checkpointing
        if freeze and prefix is not None:
            base.requires_grad_(False)
        if onednn.is_faster() and base.config._attn_implementation == "sdpa":
            with contextlib.suppress(TypeError, ValueError):  # only for speed here
                attention.install(base)
        if checkpointing and prefix is not None:
            attention_modules(base)  # raises UserError where they are not enough
            try:
                attention.install(base)
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"--gradient_checkpointing yes with a prefix: not for a {base.config.model_type} model ({error})"
                ) from error
            check_attention(base)
        if checkpointing:
            attention.enable_checkpointing(base)
        onednn.install(self)

    @property
    def config(self) -> PreTrainedConfig:
        return self.base.config

    def train(self, mode: bool = True) -> "PrefixLM":
        super().train(mode)
        self.base.train(mode and (self.train_base or self.prefix is None))
        return self

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        source: Tensor | None = None,
        source_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Without labels: logits (B, T, V) at every position. With labels (B, T): the negative log-likelihood (S,) of
        the S scored tokens, and the rows (S,) they stand in.

        No logits are computed for source and padding, half of a table-to-text batch. `attention_mask` (B, T), 0 at
        padding, allows for packing. `source` and `source_mask`, both (B, S), serve prefixes that depend on the source.
        """
        if labels is None:
            return self.head(self.hidden_states(input_ids, source, source_mask))
        scored = nn.functional.pad(labels[:, 1:].ne(IGNORED), (0, 1))  # position t predicts the label at t + 1
        rows, columns = scored.nonzero(as_tuple=True)  # (S,); before the forward, for it waits for a GPU's work
        packed = self._pack(input_ids, attention_mask)
        if packed is None:
            scored_positions = rows * input_ids.shape[1] + columns
            hidden = self.hidden_states(input_ids, source, source_mask)
        else:
            scored_positions = packed.cells[scored[attention_mask.bool()]]
            hidden = self.hidden_states(packed.input_ids, packed=packed)
        hidden = hidden.flatten(0, 1).index_select(0, scored_positions)  # (S, E)
        return self.head.nll(hidden, labels[rows, columns + 1]), rows

    def hidden_states(
        self, input_ids: Tensor, source: Tensor | None = None, source_mask=None, packed: Packed | None = None
    ) -> Tensor:
        """Last hidden states (B, T, E) of right-padded `input_ids` (B, T) behind the prefix, with positions after it.

        Unless the prefix depends on the source or texts are packed, no attention mask is needed: padding stands to the
        right of every real token and attention is causal. `packed` says how the texts lie if several share a row.
        """
        past = self._past(len(input_ids), source, source_mask)
        length = past.layers[0][0].shape[2] if past.layers else 0
        if packed is not None:
            positions = length + packed.positions
            mask = packed_mask(packed, self.config, 0 if self.checkpointing else length)
        elif past.visible is None:
            mask = None
            positions = torch.arange(length, length + input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        else:
            mask = torch.cat([past.visible, torch.ones_like(input_ids, dtype=torch.bool)], dim=1)
            positions = count_positions(mask)[:, length:]
            mask = None if self.checkpointing else mask  # the attention function makes its own
        inputs = {"input_ids": input_ids, "position_ids": positions, "attention_mask": mask}
        if self.checkpointing or not past.layers:
            modules = attention_modules(self.base) if past.layers else []
            with attention.prefix_attention(dict(zip(modules, past.layers, strict=True)), past.visible):
                return self.base.base_model(**inputs, use_cache=False).last_hidden_state
        # a cache is filled in place by the forward, so every forward gets its own
        cache = DynamicCache(past.layers)
        return self.base.base_model(**inputs, past_key_values=cache, use_cache=True).last_hidden_state

    def _past(self, rows: int, source: Tensor | None, source_mask: Tensor | None) -> Past:
        """The prefix's keys and values, in the precision that the base model computes in."""
        if self.prefix is None:
            return Past([])
        weight = self.base.get_input_embeddings().weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        past = self.prefix.past(self.base, rows, source, source_mask)
        return Past([(keys.to(dtype), values.to(dtype)) for keys, values in past.layers], past.visible)

    def _pack(self, input_ids: Tensor, attention_mask: Tensor | None) -> Packed | None:
        """The packed batch; None where that does not pay, or where source or dropout give each text its own prefix."""
        if attention_mask is None:
            return None
        if self.prefix is not None and (
            self.prefix.config.needs_source or (self.prefix.training and self.prefix.dropout.p > 0)
        ):
            return None
        return pack(input_ids, attention_mask, self.config.get_text_config(decoder=True).hidden_size)


@torch.no_grad()
def mean_loss(lm: PrefixLM, examples: Sequence[Encoded], pad_token_id: int = 0, batch_size: int = 8) -> float:
    """Mean negative log-likelihood per token of the examples' continuations, in nats, given the prefix of `lm`."""
    total, count = 0.0, 0
    with evaluating(lm):
        for start in range(0, len(examples), batch_size):
            members = [examples[n] for n in range(start, min(start + batch_size, len(examples)))]
            batch = collate(members, pad_token_id)
            nll, _ = lm(**{name: ids.to(lm.base.device) for name, ids in batch.items()})
            total, count = total + nll.sum().item(), count + len(nll)
    return total / count


# ---- packing -----------------------------------------------------------------------------------------------------


def pack(input_ids: Tensor, attention_mask: Tensor, hidden_size: int) -> Packed | None:
    """Pack right-padded `input_ids` (B, T) of which `attention_mask` (B, T) is real; None where it would not pay."""
    lengths = attention_mask.sum(dim=1).tolist()
    rows = best_layout(lengths, hidden_size)
    if len(rows) == len(lengths):
        return None
    return lay_out(input_ids, attention_mask, lengths, rows)


def best_layout(lengths: Sequence[int], hidden_size: int) -> Rows:
    """The rows that take the least time; one text a row if nothing is better.

    A transformer layer takes about 12 E² multiplications per token outside attention and 2 W E, slower ones, in it.
    """

    def time(rows: Rows) -> int:
        width = width_of(lengths, rows)
        return len(rows) * width * (6 * hidden_size + packing.SLOWNESS * width)

    return min(layouts(lengths), key=time)


def packed_mask(packed: Packed, config: PreTrainedConfig, length: int) -> Tensor | dict[str, Tensor]:
    """What each token may look at, behind `length` prefix positions in the cache: see `position_mask`.

    Unused cells at the end of a row attend to each other: a query without any key would give NaN.
    """
    same_text = packed.text.unsqueeze(2) == packed.text.unsqueeze(1)
    earlier = torch.ones_like(same_text[0]).tril()
    seen = nn.functional.pad(same_text & earlier, (length, 0), value=True)  # (R, W, P+W)
    prefix = torch.arange(length, device=seen.device).expand(len(seen), -1)
    queries = length + packed.positions
    return position_mask(config, seen, queries, torch.cat([prefix, queries], dim=1))
