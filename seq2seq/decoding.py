"""Decoding sources in batches with an encoder-decoder, with or without a prefix; from tokens back to text.

Legend: N sources of a batch, K beams, S tokens of the longest source, P prefix length, W tokens of all beams of a
source, V vocabulary, E hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from prefixlib.compute import attention
from prefixlib.compute.head import Head
from prefixlib.data.tasks import Task, clean_up
from prefixlib.decoding import loop
from prefixlib.decoding.search import DecodingRule, Hypothesis, beam_search, rule_of
from prefixlib.decoding.text import cut_at, stop_rule
from prefixlib.decoding.tree import BeamTree, growing_cache
from prefixlib.settings.search import Search
from prefixlib.system.errors import UserError
from seq2seq.frozen_lm import Layers, at_positions, attend_to, end_token, max_positions, shares_rows, start_token
from seq2seq.prefix_lm import encoder_mask, pack_sources


@dataclass(frozen=True)
class Past:
    """What stands in front of a batch at each site.

    layers: site -> keys and values per layer, (1, H, P, D) for all sources or (N, H, P, D). visible: site -> bool
    (N, P), False where a source's own prefix is padded; {} where all sources have the same prefix.
    """

    layers: Mapping[str, Layers] = field(default_factory=dict)
    visible: Mapping[str, Tensor] = field(default_factory=dict)

    def of(self, *sites: str) -> tuple[Mapping[str, Layers], Mapping[str, Tensor]]:
        """The part at these sites, as `attend_to` takes it."""
        return {site: layers for site, layers in self.layers.items() if site in sites}, self.visible

    def rows(self, chosen: Tensor) -> "Past":
        """The prefixes of the sources `chosen` (N')."""
        if not self.visible:
            return self
        layers = {site: [(k[chosen], v[chosen]) for k, v in pairs] for site, pairs in self.layers.items()}
        return Past(layers, {site: seen[chosen] for site, seen in self.visible.items()})


def side_by_side(prefixes: Sequence[Mapping[str, Layers]]) -> Past:
    """The prefix of each source, (1, H, P_i, D) at every site, as one batch, padded on the left.

    A prefix may lack a site that others have.
    """
    layers, visible = {}, {}
    for site in dict.fromkeys(site for prefix in prefixes for site in prefix):
        like = next(prefix[site] for prefix in prefixes if site in prefix)
        nothing = [tuple(states[:, :, :0] for states in layer) for layer in like]
        rows = [prefix.get(site, nothing) for prefix in prefixes]
        padded = [attention.pad_prefixes([row[n] for row in rows]) for n in range(len(like))]
        layers[site], visible[site] = [(layer.keys, layer.values) for layer in padded], padded[0].visible
    return Past(layers, visible)


class Seq2SeqSteps:
    """An encoder-decoder over a batch of sources: a `StepwiseModel` of prefixlib.decoding.search.

    The beams of a source share its row of both caches (prefixlib.decoding.tree), which start with the prefix; positions
    count the text alone. The base model must be installed in prefixlib.compute.attention and in eval mode.
    """

    def __init__(
        self,
        base: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        past: Past,
        head: Head | None = None,
    ):
        self.base, self.input_ids, self.past, self.head = base, input_ids, past, head or Head(base)
        self.mask = attention_mask.bool()
        self.cache = EncoderDecoderCache(growing_cache(), DynamicCache())
        start = self.mask.new_ones(len(input_ids), 1)
        self.tree = BeamTree(torch.cat([self._seed(self.cache.self_attention_cache, "self"), start], dim=1))
        cross = self._seed(self.cache.cross_attention_cache, "cross")
        self.visible = torch.cat([cross, self.mask], dim=1)[:, None, None, :]  # (N, 1, 1, P+S)
        self.position = 0  # of the decoder's next tokens

    def _seed(self, cache: Cache, site: str) -> Tensor:
        """Put the prefix of a site into a row per source of `cache`; returns what of it is visible, (N, P)."""
        kind = self.input_ids.device.type  # under autocast (validation) the model's keys are not of its weights' dtype
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.base.dtype
        for index, layer in enumerate(self.past.layers.get(site, ())):
            cache.update(*(states.to(dtype).expand(len(self.input_ids), -1, -1, -1) for states in layer), index)
        everything = self.mask.new_ones(len(self.input_ids), cache.get_seq_length())
        return self.past.visible.get(site, everything)

    def prefill(self) -> Tensor:
        with attend_to(self.base, *self.past.of("encoder")):  # those of the decoder stand in the caches
            encoded = self._encode()
        start = self.input_ids.new_full((len(self.input_ids), 1), start_token(self.base.config))
        logits = self._forward(start, encoded)
        self.encoded = encoded[..., :0]  # its keys and values are cached; transformers wants some tensor nevertheless
        return logits

    def _encode(self) -> Tensor:
        """The encoder's last hidden states (N, S, E), of sources packed on shared rows where that pays."""
        encoder, layers, packed = self.base.get_encoder(), self.past.layers.get("encoder"), None
        if "encoder" not in self.past.visible:  # texts on one row have one prefix
            length = layers[0][0].shape[2] if layers else 0
            packed = pack_sources(self.input_ids, self.mask, hidden_size=self.base.config.d_model, prefix_length=length)
        if packed is None:
            return encoder(input_ids=self.input_ids, attention_mask=self.mask).last_hidden_state
        with at_positions(encoder.embed_positions, packed.positions):
            hidden = encoder(input_ids=packed.input_ids, attention_mask=encoder_mask(packed)).last_hidden_state
        encoded = hidden.new_zeros(*self.mask.shape, hidden.shape[2])
        encoded[self.mask] = hidden.flatten(0, 1).index_select(0, packed.cells)
        return encoded

    def advance(self, rows: Tensor, tokens: Tensor) -> Tensor:
        staying = self.tree.advance(rows)
        if staying is not None:
            self.visible = self.visible[staying]
            for layer in self.cache.self_attention_cache.layers:
                layer.keep(staying)
            self.cache.cross_attention_cache.batch_select_indices(staying)
        self.position += 1
        beams = self.tree.visible.shape[:2]
        return self._forward(tokens.view(beams).to(self.input_ids.device), self.encoded)

    def _forward(self, tokens: Tensor, encoded: Tensor) -> Tensor:
        """Next-token logits (N*K, V) of one token for each beam (N, K), all at the same position."""
        # the decoder itself would count the cached keys, those of the prefix and of other beams included
        with at_positions(self.base.get_decoder().embed_positions, torch.full_like(tokens, self.position)):
            hidden = self.base.base_model(
                encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
                attention_mask=self.visible.expand(-1, -1, tokens.shape[1], -1),
                decoder_input_ids=tokens,
                decoder_attention_mask=self.tree.visible.unsqueeze(1),  # (N, 1, K, P+W)
                past_key_values=self.cache,
                use_cache=True,
            ).last_hidden_state
        return self.head(hidden.flatten(0, 1))


class CopyingSteps:
    """The same for a model whose beams cannot share a row: each beam has rows of its own in both caches, copied when
    the beams change. Slower, and good for any kind of positions: the prefix of the self-attention is joined on inside
    it, as its columns take no position.
    """

    def __init__(
        self,
        base: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        past: Past,
        head: Head | None = None,
    ):
        self.base, self.input_ids, self.mask, self.past = base, input_ids, attention_mask, past
        self.head = head or Head(base)
        self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self.sources = torch.arange(len(input_ids))  # of each row, one beam after the other

    def prefill(self) -> Tensor:
        encoder = self.base.get_encoder()
        with attend_to(self.base, *self.past.of("encoder")):
            self.encoded = encoder(input_ids=self.input_ids, attention_mask=self.mask).last_hidden_state
        logits = self._forward(self.input_ids.new_full((len(self.input_ids),), start_token(self.base.config)))
        self._join_cross()
        return logits

    def _join_cross(self) -> None:
        """Put the cross-attention's prefix in front of the keys and values of the sources, which are cached now.

        Once for all steps: inside the attention it would be a copy of all of them in each.
        """
        layers = self.past.layers.get("cross")
        if layers:
            for cached, prefix in zip(self.cache.cross_attention_cache.layers, layers, strict=True):
                cached.keys, cached.values = (
                    torch.cat([states.to(own.dtype).expand(len(own), -1, -1, -1), own], dim=2)
                    for states, own in zip(prefix, (cached.keys, cached.values), strict=True)
                )
            everything = self.mask.new_ones(len(self.mask), layers[0][0].shape[2])
            seen = self.past.visible.get("cross", everything).to(self.mask.dtype)
            self.mask = torch.cat([seen, self.mask], dim=1)
        self.encoded = self.encoded.new_zeros(*self.mask.shape, 0)  # what it held is cached; its length is read
        self.past = Past(*self.past.of("self"))

    def advance(self, rows: Tensor, tokens: Tensor) -> Tensor:
        sources, device = self.sources[rows.cpu()], self.mask.device
        rows = rows.to(device)
        self.cache.self_attention_cache.batch_select_indices(rows)
        # what is kept of the sources, many times as large, is copied only when a source leaves or its beams are opened
        if not torch.equal(sources, self.sources):
            before, after = torch.unique_consecutive(self.sources), torch.unique_consecutive(sources)
            self.past = self.past.rows(torch.isin(before, after).nonzero()[:, 0].to(device))  # beams repeat its prefix
            self.cache.cross_attention_cache.batch_select_indices(rows)
            self.mask, self.encoded, self.sources = self.mask[rows], self.encoded[rows], sources
        return self._forward(tokens.to(device))

    def _forward(self, tokens: Tensor) -> Tensor:
        """Next-token logits (R, V) of one token for each row (R,)."""
        with attend_to(self.base, *self.past.of("self", "cross")):
            hidden = self.base.get_decoder()(
                input_ids=tokens.unsqueeze(1),
                encoder_hidden_states=self.encoded,
                encoder_attention_mask=self.mask,
                past_key_values=self.cache,
                use_cache=True,
            ).last_hidden_state
        return self.head(hidden[:, -1])


def make_steps(base: nn.Module, *batch: Any, **how: Any) -> Seq2SeqSteps | CopyingSteps:
    """The stepwise model that the base model allows."""
    return (Seq2SeqSteps if shares_rows(base) else CopyingSteps)(base, *batch, **how)


def decode_batch(
    base: nn.Module, input_ids: Tensor, attention_mask: Tensor, rule: DecodingRule, past: Past, head: Head | None = None
) -> list[list[Hypothesis]]:
    """The hypotheses of a beam search for every row of right-padded sources (N, S), best first."""
    steps = make_steps(base, input_ids, attention_mask, past, head=head)
    return beam_search(steps, start_tokens(base, len(input_ids)), rule)


def start_tokens(base: nn.Module, rows: int) -> list[list[int]]:
    """The decoder's input in front of the first output token."""
    return [[start_token(base.config)]] * rows


def pad_sources(base: nn.Module, sources: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask (N, S) of sources, padded on the right, on the model's device."""
    rows = [torch.tensor(source) for source in sources]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=base.config.pad_token_id)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    device = base.get_input_embeddings().weight.device
    return ids.to(device), mask.long().to(device)


def start(
    base: nn.Module, sources: Sequence[Sequence[int]], past: Past, head: Head | None = None
) -> tuple[Seq2SeqSteps | CopyingSteps, list[list[int]]]:
    """The stepwise model over a batch of sources (token ids) with their prefixes, and what each output follows."""
    return make_steps(base, *pad_sources(base, sources), past, head=head), start_tokens(base, len(sources))


def decode(
    base: nn.Module,
    sources: Sequence[Sequence[int]],
    rule: DecodingRule,
    *,
    prefix: Mapping[str, Layers] | None = None,
    past: Callable[[Sequence[int]], Past] | None = None,
    **how: Any,
) -> list[list[Hypothesis]]:
    """The hypotheses of every source (token ids), in the order of the sources; `how` as in `loop.decode`.

    prefix: the one that all sources share. past: gives the prefixes of the sources of the given numbers, if each has
    its own.
    """
    head = Head(base)

    def start_batch(members: Sequence[int]) -> tuple[Seq2SeqSteps | CopyingSteps, list[list[int]]]:
        own = past(members) if past else Past(prefix or {})
        return start(base, [sources[n] for n in members], own, head)

    return loop.decode(start_batch, [len(source) for source in sources], rule, **how)


def to_text(tokenizer: Any, tokens: Sequence[int], verbatim: bool = False, stop: Sequence[str] = ()) -> str:
    """Generated tokens as text up to the first of the strings `stop`.

    Unless `verbatim`, on one line, cleaned as the original's decoding did.
    """
    text = tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    text = cut_at(text, stop)
    return text if verbatim else clean_up(text)


def decoding_rule(search: Search, tokenizer: Any, config: PreTrainedConfig, task: Task) -> DecodingRule:
    """The rule of a search, with the task's values where the search has none.

    The task's lengths are in tokens and count the decoder's start token, as in the original; so does
    `search.min_length`. Raises UserError for values out of range.
    """
    usual, limit = task.seq2seq, max_positions(config)
    min_length = usual.min_length if search.min_length is None else search.min_length
    if search.max_new_tokens is not None:
        max_length = search.max_new_tokens + 1
        if search.min_length is None:  # an output may be shorter than is usual for the task
            min_length = min(usual.min_length, max_length)
    else:  # outputs for user data are as long as the model allows
        max_length = min(usual.max_length, limit) if task.verbatim else usual.max_length
    if max_length > limit or max_length < max(min_length, 2):
        raise UserError(
            f"--max_length {max_length}: at least --min_length {min_length} and at most the model's {limit} positions"
        )
    first = getattr(config, "bos_token_id", None) if search.force_bos else None
    if search.force_bos and first is None:
        raise UserError(f"--force_bos yes: a {config.model_type} model has no token that begins a text")
    return rule_of(
        search,
        usual,
        eos_token_id=end_token(config),
        max_new_tokens=max_length - 1,
        min_length=min_length,
        forced_first_token_id=first,
        forced_last_token_id=end_token(config),
        stop=stop_rule(search.stop, lambda tokens: tokenizer.decode(list(tokens), skip_special_tokens=True)),
    )
