"""Decoding sources in batches with an encoder-decoder, with or without a prefix; from tokens back to text.

Legend: N sources of a batch, S tokens of the longest source, R rows now (alive sources x beams), P prefix length,
V vocabulary.
"""

import argparse
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from prefixlib.beam_search import DecodingRule, Hypothesis, beam_search
from prefixlib.errors import UserError
from prefixlib.text import clean_up
from seq2seq.flags import MODES
from seq2seq.prefixTuning import Layers, attend_to


class Seq2SeqSteps:
    """An encoder-decoder over a batch of sources: the stepwise model that prefixlib.beam_search asks for.

    The beams of a source share its cross-attention keys and values, which hold the prefix already joined; the decoder's
    own cache has one row per beam. The base model must be installed in prefixlib.attention and in eval mode.
    """

    def __init__(self, base: nn.Module, input_ids: Tensor, attention_mask: Tensor, prefix: Mapping[str, Layers]):
        self.base, self.input_ids, self.mask = base, input_ids, attention_mask
        self.prefix = prefix
        self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self.owner = torch.arange(len(input_ids), device=input_ids.device)  # row -> place of its source in the cache

    def prefill(self) -> Tensor:
        start = self.input_ids.new_full((len(self.input_ids), 1), self.base.config.decoder_start_token_id)
        with attend_to(self.base, self.prefix):
            logits = self.base(
                input_ids=self.input_ids,
                attention_mask=self.mask,
                decoder_input_ids=start,
                past_key_values=self.cache,
                use_cache=True,
            ).logits[:, -1]
        if "encoder_decoder" in self.prefix:
            layers = self.prefix["encoder_decoder"]
            for cached, (keys, values) in zip(self.cache.cross_attention_cache.layers, layers, strict=True):
                cached.keys = _join(keys, cached.keys)
                cached.values = _join(values, cached.values)
            self.mask = torch.cat([self.mask.new_ones(len(self.mask), layers[0][0].shape[2]), self.mask], dim=1)
        return logits

    def advance(self, rows: Tensor, tokens: Tensor) -> Tensor:
        if len(rows) != len(self.owner) or not torch.equal(rows, torch.arange(len(rows), device=rows.device)):
            self.cache.self_attention_cache.reorder_cache(rows)
            self._keep_sources(self.owner[rows])
        mask = self.mask[self.owner]  # (R, P+S)
        encoded = torch.empty(*mask.shape, 0, dtype=self.base.dtype, device=mask.device)  # read already: shape only
        with attend_to(self.base, {site: self.prefix[site] for site in self.prefix if site == "self"}):
            return self.base(
                encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
                attention_mask=mask,
                decoder_input_ids=tokens.unsqueeze(1),
                past_key_values=self.cache,
                use_cache=True,
            ).logits[:, -1]

    def _keep_sources(self, owner: Tensor) -> None:
        """Drop the sources that no row in `owner` (R,) belongs to any more; each must have the same number of rows."""
        alive, self.owner = torch.unique_consecutive(owner, return_inverse=True)
        if len(owner) % len(alive) or not torch.equal(
            self.owner, torch.arange(len(alive), device=owner.device).repeat_interleave(len(owner) // len(alive))
        ):
            raise ValueError("the rows of a source must lie side by side, equally many for every source")
        if len(alive) < len(self.mask):
            self.mask = self.mask[alive]
            for cached in self.cache.cross_attention_cache.layers:
                cached.keys, cached.values = cached.keys[alive], cached.values[alive]


def _join(prefix: Tensor, own: Tensor) -> Tensor:
    """(1, H, P, D) and (N, H, S, D) -> (N, H, P+S, D)."""
    return torch.cat([prefix.to(own.dtype).expand(len(own), -1, -1, -1), own], dim=2)


@torch.no_grad()
def decode_batch(
    base: nn.Module, input_ids: Tensor, attention_mask: Tensor, rule: DecodingRule, prefix: Mapping[str, Layers]
) -> list[Hypothesis]:
    """The best hypothesis for every row of right-padded sources (N, S)."""
    steps = Seq2SeqSteps(base, input_ids, attention_mask, prefix)
    starts = [[base.config.decoder_start_token_id]] * len(input_ids)
    return [hypotheses[0] for hypotheses in beam_search(steps, starts, rule)]


def decode(
    base: nn.Module,
    sources: Sequence[Sequence[int]],
    rule: DecodingRule,
    *,
    prefix: Mapping[str, Layers] | None = None,
    batch_size: int = 10,
    progress: bool = True,
) -> list[Hypothesis]:
    """The best hypothesis for every source (token ids), in the order given.

    Batches are made of sources of similar length; results do not depend on `batch_size`.
    """
    device, padding = base.get_input_embeddings().weight.device, base.config.pad_token_id
    order = sorted(range(len(sources)), key=lambda n: -len(sources[n]))  # longest first: memory trouble shows at once
    results: list[Hypothesis | None] = [None] * len(sources)
    with tqdm(total=len(sources), desc="decoding", unit=" sources", disable=not progress, leave=False) as bar:
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            rows = [torch.tensor(sources[n]) for n in members]
            input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding).to(device)
            lengths = torch.tensor([len(row) for row in rows], device=device)
            mask = (torch.arange(input_ids.shape[1], device=device) < lengths[:, None]).long()
            for n, best in zip(members, decode_batch(base, input_ids, mask, rule, prefix or {}), strict=True):
                results[n] = best
            bar.update(len(members))
    return results


def to_text(tokenizer, tokens: Sequence[int]) -> str:
    """Generated tokens as one line of text, cleaned as the original's decoding did."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return clean_up(text)


def decoding_rule(args: argparse.Namespace, config) -> DecodingRule:
    """The mode's search, with what the flags change. Lengths count the decoder's start token, as in the original."""
    row = MODES[args.mode].decoding
    value = {
        name: getattr(row, name) if getattr(args, name) is None else getattr(args, name)
        for name in ("num_beams", "min_length", "max_length", "no_repeat_ngram_size", "length_pen")
    }
    limit = config.max_position_embeddings
    if value["max_length"] > limit or value["max_length"] < max(value["min_length"], 2):
        raise UserError(
            f"--max_length {value['max_length']}: at least --min_length {value['min_length']} and at most the "
            f"model's {limit} positions"
        )
    return DecodingRule(
        eos_token_id=config.eos_token_id,
        max_new_tokens=value["max_length"] - 1,
        num_beams=value["num_beams"],
        min_length=value["min_length"],
        length_penalty=value["length_pen"],
        no_repeat_ngram_size=value["no_repeat_ngram_size"],
        early_stopping=row.early_stopping if args.early_stopping is None else args.early_stopping == "yes",
        forced_first_token_id=config.bos_token_id if args.force_bos == "yes" else None,
        forced_last_token_id=config.eos_token_id,
    )
