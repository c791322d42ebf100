"""Decoding sources in batches with an encoder-decoder, with or without a prefix; from tokens back to text.

Legend: N sources of a batch, K beams, S tokens of the longest source, P prefix length, W tokens of all beams of a
source, V vocabulary, E hidden size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from prefixlib.beam_search import DecodingRule, Hypothesis, beam_search, sample
from prefixlib.beam_tree import BeamTree, growing_cache
from prefixlib.errors import UserError
from prefixlib.settings import SEARCH_BOUNDS, out_of_bounds
from prefixlib.tasks import clean_up, find_task
from seq2seq.frozen_lm import Layers, at_positions, attend_to, max_positions
from seq2seq.prefix_lm import encoder_mask, pack_sources

STRATEGIES = ("beam", "greedy", "nucleus")


class Seq2SeqSteps:
    """An encoder-decoder over a batch of sources: a `StepwiseModel` of prefixlib.beam_search.

    The beams of a source share its row of both caches (prefixlib.beam_tree), which start with the prefix; positions
    count the text alone. The base model must be installed in prefixlib.attention and in eval mode.
    """

    def __init__(self, base: nn.Module, input_ids: Tensor, attention_mask: Tensor, prefix: Mapping[str, Layers]):
        self.base, self.input_ids, self.prefix = base, input_ids, prefix
        self.cache = EncoderDecoderCache(growing_cache(), DynamicCache())
        length = self._seed(self.cache.self_attention_cache, prefix.get("self", ()))
        self.tree = BeamTree(attention_mask.new_ones(len(input_ids), length + 1))  # the start token is one more
        cross = self._seed(self.cache.cross_attention_cache, prefix.get("cross", ()))
        self.mask = attention_mask.bool()
        self.visible = nn.functional.pad(self.mask, (cross, 0), value=True)[:, None, None, :]  # (N, 1, 1, P+S)
        self.position = 0  # of the decoder's next tokens

    def _seed(self, cache: Cache, layers: Layers | tuple[()]) -> int:
        """Put a prefix into a row per source of `cache`; returns its length P."""
        kind = self.input_ids.device.type  # under autocast (validation) the model's keys are not of its weights' dtype
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.base.dtype
        for index, layer in enumerate(layers):
            cache.update(*(states.to(dtype).expand(len(self.input_ids), -1, -1, -1) for states in layer), index)
        return cache.get_seq_length()

    def prefill(self) -> Tensor:
        encoder = {"encoder": self.prefix["encoder"]} if "encoder" in self.prefix else {}
        with attend_to(self.base, encoder):  # those of the decoder stand in the caches
            encoded = self._encode()
        start = self.input_ids.new_full((len(self.input_ids), 1), self.base.config.decoder_start_token_id)
        logits = self._forward(start, encoded)
        self.encoded = encoded[..., :0]  # its keys and values are cached; transformers wants some tensor nevertheless
        return logits

    def _encode(self) -> Tensor:
        """The encoder's last hidden states (N, S, E), of sources packed on shared rows where that pays."""
        encoder, layers = self.base.get_encoder(), self.prefix.get("encoder")
        packed = pack_sources(
            self.input_ids,
            self.mask,
            hidden_size=self.base.config.d_model,
            prefix_length=layers[0][0].shape[2] if layers else 0,
        )
        if packed is None:
            return encoder(input_ids=self.input_ids, attention_mask=self.mask).last_hidden_state
        with at_positions(encoder.embed_positions, packed.positions):
            hidden = encoder(input_ids=packed.input_ids, attention_mask=encoder_mask(packed)).last_hidden_state
        encoded = hidden.new_zeros(*self.mask.shape, hidden.shape[2])
        encoded[self.mask] = hidden.flatten(0, 1).index_select(0, packed.places)
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
        return self.base.get_output_embeddings()(hidden.flatten(0, 1)) + self.base.final_logits_bias


@torch.no_grad()
def decode_batch(
    base: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    rule: DecodingRule,
    prefix: Mapping[str, Layers],
    strategy: str = "beam",
    seeds: Sequence[int] | None = None,
) -> list[list[Hypothesis]]:
    """For every row of right-padded sources (N, S) its hypotheses, best first: K by beam search, else one.

    seeds: one for each source (strategy "nucleus").
    """
    steps = Seq2SeqSteps(base, input_ids, attention_mask, prefix)
    starts = start_tokens(base, len(input_ids))
    if strategy == "beam":
        return beam_search(steps, starts, rule)
    return [[hypothesis] for hypothesis in sample(steps, starts, rule, seeds if strategy == "nucleus" else None)]


def start_tokens(base: nn.Module, rows: int) -> list[list[int]]:
    """The decoder's input in front of the first output token."""
    return [[base.config.decoder_start_token_id]] * rows


def pad_sources(base: nn.Module, sources: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask (N, S) of sources, padded on the right, on the model's device."""
    rows = [torch.tensor(source) for source in sources]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=base.config.pad_token_id)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    device = base.get_input_embeddings().weight.device
    return ids.to(device), mask.long().to(device)


def decode(
    base: nn.Module,
    sources: Sequence[Sequence[int]],
    rule: DecodingRule,
    *,
    prefix: Mapping[str, Layers] | None = None,
    strategy: str = "beam",
    count: int = 1,
    seed: int = 42,
    batch_size: int = 10,
    progress: bool = True,
) -> list[list[Hypothesis]]:
    """The `count` best hypotheses of every source (token ids), or as many samples, in the order of the sources.

    Batches are made of sources of similar length; results do not depend on `batch_size`. A sample (strategy "nucleus")
    is drawn from its own seed: seed, seed + 1, ... in the order of the results.
    """
    if strategy == "nucleus" and count > 1:
        repeated = [source for source in sources for _ in range(count)]
        how = {"prefix": prefix, "strategy": strategy, "seed": seed, "batch_size": batch_size, "progress": progress}
        samples = [one for (one,) in decode(base, repeated, rule, **how)]
        return [samples[start : start + count] for start in range(0, len(samples), count)]
    order = sorted(range(len(sources)), key=lambda n: -len(sources[n]))  # longest first: memory trouble shows at once
    results: list[list[Hypothesis]] = [[] for _ in sources]
    with tqdm(total=len(sources), desc="decoding", unit=" sources", disable=not progress, leave=False) as bar:
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            input_ids, mask = pad_sources(base, [sources[n] for n in members])
            seeds = [seed + n for n in members]
            found = decode_batch(base, input_ids, mask, rule, prefix or {}, strategy, seeds)
            for n, hypotheses in zip(members, found, strict=True):
                results[n] = hypotheses[:count]
            bar.update(len(members))
    return results


def to_text(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Generated tokens as one line of text, cleaned as the original's decoding did."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return clean_up(text)


def decoding_rule(
    mode: str,
    config: PreTrainedConfig,
    *,
    num_beams: int | None = None,
    min_length: int | None = None,
    max_length: int | None = None,
    no_repeat_ngram_size: int | None = None,
    early_stopping: bool | None = None,
    length_pen: float | None = None,
    force_bos: bool = False,
    top_p: float = 1.0,
    temperature: float = 1.0,
) -> DecodingRule:
    """The search of the task; settings that are not None replace the task's.

    Lengths are in tokens and count the decoder's start token, as in the original. Raises UserError for values out of
    range.
    """
    row, limit = find_task(mode).seq2seq, max_positions(config)
    min_length = row.min_length if min_length is None else min_length
    max_length = row.max_length if max_length is None else max_length
    if max_length > limit or max_length < max(min_length, 2):
        raise UserError(
            f"--max_length {max_length}: at least --min_length {min_length} and at most the model's {limit} positions"
        )
    if top_p > 1:
        raise UserError(f"top_p {top_p}: must be at most 1")
    try:
        rule = DecodingRule(
            eos_token_id=config.eos_token_id,
            max_new_tokens=max_length - 1,
            num_beams=row.num_beams if num_beams is None else num_beams,
            min_length=min_length,
            length_penalty=row.length_pen if length_pen is None else length_pen,
            no_repeat_ngram_size=row.no_repeat_ngram_size if no_repeat_ngram_size is None else no_repeat_ngram_size,
            early_stopping=row.early_stopping if early_stopping is None else early_stopping,
            forced_first_token_id=config.bos_token_id if force_bos else None,
            forced_last_token_id=config.eos_token_id,
            top_p=top_p,
            temperature=temperature,
        )
    except ValueError as error:
        raise UserError(f"decoding settings: {error}") from error
    for name, bounds in SEARCH_BOUNDS.items():
        wanted = out_of_bounds(getattr(rule, name), **bounds)
        if wanted:
            raise UserError(f"{name} {getattr(rule, name)}: must be {wanted}")
    return rule
