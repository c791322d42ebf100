"""Decoding sources in batches with an encoder-decoder, with or without a prefix; from tokens back to text.

Legend: N sources of a batch, K beams, S tokens of the longest source, P prefix length, W tokens of all beams of a
source, V vocabulary.
"""

import argparse
from collections.abc import Mapping, Sequence

import torch
from prefixlib.text import clean_up
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from prefixlib.beam_search import DecodingRule, Hypothesis, beam_search
from prefixlib.beam_tree import BeamTree, growing_cache
from prefixlib.errors import UserError
from seq2seq.flags import MODES
from seq2seq.frozen_lm import Layers, at_positions, attend_to
from seq2seq.packing import encoder_mask, pack_sources


class Seq2SeqSteps:
    """An encoder-decoder over a batch of sources: the stepwise model that prefixlib.beam_search asks for.

    The beams of a source share its row of both caches (prefixlib.beam_tree), which start with the prefix; the positions
    of the text are its own. The base model must be installed in prefixlib.attention and in eval mode.
    """

    def __init__(self, base: nn.Module, input_ids: Tensor, attention_mask: Tensor, prefix: Mapping[str, Layers]):
        self.base, self.input_ids, self.prefix = base, input_ids, prefix
        self.cache = EncoderDecoderCache(growing_cache(), DynamicCache())
        own = self._seed(self.cache.self_attention_cache, prefix.get("self", ()))
        cross = self._seed(self.cache.cross_attention_cache, prefix.get("encoder_decoder", ()))
        self.tree = BeamTree(attention_mask.new_ones(len(input_ids), own + 1))  # the start token is one more
        self.mask = attention_mask.bool()
        self.visible = nn.functional.pad(self.mask, (cross, 0), value=True)[:, None, None, :]  # (N, 1, 1, P+S)
        self.position = 0  # of the decoder's next tokens

    def _seed(self, cache: Cache, layers: Layers | tuple[()]) -> int:
        """Put a prefix into a row per source of `cache`; returns its length P."""
        kind = self.input_ids.device.type  # under autocast (validation) the model's own keys are not of its own dtype
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.base.dtype
        for index, layer in enumerate(layers):
            cache.update(*(states.to(dtype).expand(len(self.input_ids), -1, -1, -1) for states in layer), index)
        return cache.get_seq_length()

    def prefill(self) -> Tensor:
        with attend_to(self.base, {site: layers for site, layers in self.prefix.items() if site == "encoder"}):
            encoded = self._encode()
        start = self.input_ids.new_full((len(self.input_ids), 1), self.base.config.decoder_start_token_id)
        logits = self._forward(start, encoded)
        self.encoded = encoded[..., :0]  # its keys and values are cached; transformers asks that it be there
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
        # told, for the decoder would count the cached keys, prefix and other beams included
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
