"""Sentences per second of beam search on prompts of real lengths (scripts/benchmark.py decode).

Random weights never end a sentence, so each sentence is ended at its real reference's length, in all rows alike. Rows
of the same method must give the same tokens, else there is no ratio.

Legend: N sentences, K beams, P prefix length, V vocabulary.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from benchmarks.lengths import draw, load_lengths
from benchmarks.models import IDS, POSITIONS, OriginalStyle, config_of, is_seq2seq, our_model, peft_model
from benchmarks.steps import now, pairwise_ratio
from gpt2 import decoding
from prefixlib.decoding.search import DecodingRule
from prefixlib.system.errors import UserError
from seq2seq import decoding as seq2seq_decoding
from seq2seq.frozen_lm import attend_to, shares_rows

# sentences, batch, beams, new tokens, decoded one at a time, lengths from
DEFAULTS = {"gpt2": (32, 32, 5, 100, 6, "webnlg_dev"), "bart": (12, 12, 6, 62, 3, "xsum_test")}
SETTINGS = ("sentences", "batch_size", "beams", "max_new_tokens", "alone", "lengths")
SPREAD = 4.4  # standard deviation of the logits, so that the best token has a probability of a few tenths
# gains of attention's weights, and standard deviations of GPT-2's embeddings, in a random model that uses its input
PEAKED = {**dict.fromkeys(("attn.c_attn", "q_proj", "k_proj", "v_proj"), 2.0), "attn.c_proj": 0.3, "out_proj": 0.5}
PEAKED |= {"Attention.q": 0.25, "Attention.k": 2.0, "Attention.v": 2.0, "Attention.o": 0.5}  # T5 does not scale scores
EMBEDDINGS = {"wte": 1.0, "wpe": 0.5}
NEVER = -100.0  # the logit of an eos that must not come by itself
ONE_BY_ONE = ("prefix-alone", "original-style")

Decoder = Callable[[Sequence[int]], list[list[int]]]  # indices of sentences -> their tokens


def fill_defaults(args: argparse.Namespace) -> None:
    """Fill in the tree's own sizes where the command line has none."""
    for name, value in zip(SETTINGS, DEFAULTS["bart" if is_seq2seq(args) else "gpt2"], strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)


@dataclass(frozen=True)
class Work:
    """N prompts, longest first, and after how many tokens each output ends."""

    prompts: list[list[int]]
    ends: list[int]

    def end_of(self) -> dict[tuple[int, ...], int]:
        return dict(zip(map(tuple, self.prompts), self.ends, strict=True))


def make_work(args: argparse.Namespace) -> Work:
    """Random ids of real lengths; an output ends before the limit, and not with its first token."""
    pairs = sorted(draw(load_lengths(args, args.lengths), args.sentences, args.seed), reverse=True)
    positions = POSITIONS if is_seq2seq(args) else POSITIONS - args.preseqlen - args.max_new_tokens
    generator = torch.Generator().manual_seed(args.seed)
    prompts = [torch.randint(*IDS, (min(s, positions),), generator=generator).tolist() for s, _ in pairs]
    return Work(prompts, [max(min(target - 1, args.max_new_tokens - 1), 1) for _, target in pairs])


def sharpen(base: nn.Module) -> nn.Module:
    """Make a random model's outputs varied and dependent on its input, without an eos of its own.

    With transformers' initialisation a model attends to all positions alike and repeats the last token: equal tokens
    would then show little. Here attention picks few positions, and the output layer is not tied to the input's.
    """
    head, eos = base.get_output_embeddings(), base.config.eos_token_id
    spread = {name: wanted / head.in_features**0.5 for name, wanted in PEAKED.items()} | EMBEDDINGS
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            for ending_in, std in spread.items():
                if name.endswith(f"{ending_in}.weight"):
                    # sampled separately: in place the values would depend on the weight's memory layout
                    parameter.copy_(torch.empty(parameter.shape).normal_(std=std))
        head.weight = nn.Parameter(torch.empty_like(head.weight).normal_(std=SPREAD / head.in_features**0.5))
        norm = getattr(base.base_model, "ln_f", None)
        if hasattr(base, "final_logits_bias"):
            base.final_logits_bias[0, eos] = NEVER
        elif norm is not None:  # GPT-2: one dimension of the last hidden state is kept for the eos
            norm.weight[0], norm.bias[0] = 0.0, 1.0
            head.weight[eos, 0] = NEVER
        else:
            head.bias = nn.Parameter(torch.zeros_like(head.weight[:, 0]))
            head.bias[eos] = NEVER
    return base


def ending(steps: type, work: Work, eos: int, prompts_of: Callable[..., Sequence]) -> type:
    """A stepwise model (prefixlib.decoding.search) like `steps` whose sentences end where `work` says."""
    end_of = work.end_of()

    class Ending(steps):
        def __init__(self, *args, **how):
            super().__init__(*args, **how)
            self.end = torch.tensor([end_of[tuple(prompt)] for prompt in prompts_of(*args)])
            self.generated = 0

        def prefill(self) -> Tensor:
            return self._end(super().prefill())

        def advance(self, rows: Tensor, tokens: Tensor) -> Tensor:
            self.end = self.end[rows.cpu()]
            self.generated += 1
            return self._end(super().advance(rows, tokens))

        def _end(self, logits: Tensor) -> Tensor:
            return certain(logits, self.end == self.generated, eos)

    return Ending


def certain(scores: Tensor, over: Tensor, eos: int) -> Tensor:
    """Scores (R, V) with a certain eos in the rows `over`, bool (R,)."""
    if over.any():
        over = over.to(scores.device)
        scores[over] = float("-inf")
        scores[over, eos] = 0.0
    return scores


class EndThere(LogitsProcessor):
    """The same ending for transformers' `generate`: row n of R ends after ends[n] tokens."""

    def __init__(self, ends: Sequence[int], beams: int, before: int, eos: int):
        self.ends, self.before, self.eos = torch.tensor(ends).repeat_interleave(beams), before, eos

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return certain(scores, self.ends == input_ids.shape[1] - self.before, self.eos)


def causal_steps(work: Work, eos: int) -> type:
    """gpt2.decoding's stepwise model with these ends."""
    return ending(decoding.CausalSteps, work, eos, lambda model, prompts, *_: prompts)


def rule_of(args: argparse.Namespace, eos: int) -> DecodingRule:
    return DecodingRule(
        eos_token_id=eos,
        max_new_tokens=args.max_new_tokens,
        num_beams=args.beams,
        length_normalization="output",  # transformers' rule, so that PEFT's outputs can be compared
        early_stopping=True,  # all beams of a sentence end together, so both searches stop at that step
    )


def padded(args: argparse.Namespace, work: Work, members: Sequence[int]) -> dict[str, Tensor]:
    """The prompts of these sentences for `generate`: padded on the left, an encoder's on the right."""
    side = "right" if is_seq2seq(args) else "left"
    filler = config_of(args.shape).pad_token_id or 0  # no prompt holds it
    rows = [torch.tensor(work.prompts[n], device=args.device) for n in members]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler, padding_side=side)
    return {"input_ids": ids, "attention_mask": ids.ne(filler).long()}


def generate(model: nn.Module, args: argparse.Namespace, work: Work, members: Sequence[int], **inputs):
    """transformers' beam search on `inputs`; returns the tokens after the prompt, without eos and padding."""
    eos = model.config.eos_token_id
    before = 1 if is_seq2seq(args) else inputs["input_ids"].shape[1]
    output = model.generate(
        **inputs,
        num_beams=args.beams,
        do_sample=False,
        max_new_tokens=args.max_new_tokens,
        early_stopping=True,
        eos_token_id=eos,
        pad_token_id=model.generation_config.pad_token_id,
        logits_processor=LogitsProcessorList([EndThere([work.ends[n] for n in members], args.beams, before, eos)]),
    )
    rows = [row[before:] for row in output.tolist()]
    return [row[: row.index(eos)] if eos in row else row for row in rows]


def batches(members: Sequence[int], size: int) -> list[Sequence[int]]:
    return [members[start : start + size] for start in range(0, len(members), size)]


def our_decoder(args: argparse.Namespace, work: Work, batch_size: int | None = None, prefixed: bool = True) -> Decoder:
    """This package's decoding, with the prefix in its stored form, or without one."""
    model = our_model(args).eval()
    base, eos = sharpen(model.base), model.base.config.eos_token_id
    settings = {"batch_size": batch_size or args.batch_size, "progress": False}
    rule = rule_of(args, eos)
    with torch.no_grad():
        prefix = model.prefix(1) if prefixed else None
    if is_seq2seq(args):
        name = "Seq2SeqSteps" if shares_rows(base) else "CopyingSteps"
        steps = ending(getattr(seq2seq_decoding, name), work, eos, _sources)

        def run(members: Sequence[int]) -> list[list[int]]:
            with mock.patch.object(seq2seq_decoding, name, steps):
                prompts = [work.prompts[n] for n in members]
                found = seq2seq_decoding.decode(base, prompts, rule, prefix=prefix, **settings)
            return [best.tokens for (best,) in found]

        return run
    causal = causal_steps(work, eos)

    def run_causal(members: Sequence[int]) -> list[list[int]]:
        with mock.patch.object(decoding, "CausalSteps", causal):
            found = decoding.decode(base, [work.prompts[n] for n in members], rule, layers=prefix, **settings)
        return [hypothesis.tokens for hypothesis in found]

    return run_causal


def _sources(base: nn.Module, input_ids: Tensor, mask: Tensor, *_) -> list[list[int]]:
    return [row[: int(kept.sum())].tolist() for row, kept in zip(input_ids, mask, strict=True)]


def our_decoder_alone(args: argparse.Namespace, work: Work) -> Decoder:
    """This package's decoding, one sentence at a time."""
    return our_decoder(args, work, batch_size=1)


def peft_decoder(args: argparse.Namespace, work: Work, batch_size: int | None = None) -> Decoder:
    """PEFT's `generate`, on the same batches, padded on the left."""
    if is_seq2seq(args):
        raise UserError("decode has no peft row for BART: its prefix is another function; leave it out of --vs")
    model = peft_model(args).eval()
    sharpen(model.base_model)

    def run(members: Sequence[int]) -> list[list[int]]:
        outputs = []
        for group in batches(members, batch_size or args.batch_size):
            outputs += generate(model, args, work, group, **padded(args, work, group))
        return outputs

    return run


def original_decoder(args: argparse.Namespace, work: Work) -> Decoder:
    """One sentence at a time on the stock model; prompt, prefix and encoder states are copied for every beam.

    GPT-2: the cache is seeded with the prefix as PEFT does it. BART: the prefix network runs on K rows per document.
    """
    if not is_seq2seq(args):
        return peft_decoder(args, work, batch_size=1)
    model = OriginalStyle(args).eval()
    base = sharpen(model.base)

    def run(members: Sequence[int]) -> list[list[int]]:
        outputs = []
        for n in members:
            with torch.no_grad():
                layers = model.layers(args.beams)
            layers["encoder"] = [(keys[:1], values[:1]) for keys, values in layers["encoder"]]  # it runs once
            ids = torch.tensor([work.prompts[n]], device=args.device)
            with attend_to(base, layers):
                outputs += generate(base, args, work, [n], input_ids=ids, attention_mask=torch.ones_like(ids))
        return outputs

    return run


DECODERS: dict[str, Callable[[argparse.Namespace, Work], Decoder]] = {
    "prefix": our_decoder,
    "prefix-alone": our_decoder_alone,
    "peft": peft_decoder,
    "original-style": original_decoder,
}


def decoding_rows(args: argparse.Namespace) -> list[str]:
    """The rows of --vs that decode: without a prefix a fine-tuned model is decoded in the same way."""
    wanted = [
        row for row in ("peft", "original-style") if row in args.rows and not (is_seq2seq(args) and row == "peft")
    ]
    return ["prefix", *(["prefix-alone"] if "original-style" in args.rows else []), *wanted]


def check_equal_tokens(args: argparse.Namespace, outputs: dict[str, dict[int, list[int]]]) -> dict[str, int]:
    """Each row's number of sentences that differ from the first row's. Raises UserError for more than --allow_ties."""
    first = next(iter(outputs.values()))
    differ = {row: sum(first[n] != tokens for n, tokens in found.items()) for row, found in outputs.items()}
    allowed = args.allow_ties
    if allowed is None:  # bfloat16 rounds differently in batches of another size: beams part at near ties
        allowed = args.sentences if args.bf16 else 0
    if max(differ.values()) > allowed:
        raise UserError(
            f"the rows do not decode the same tokens, so there is no ratio; sentences that differ: {differ} of "
            f"{args.sentences} (--allow_ties {allowed})"
        )
    return differ


def decode(args: argparse.Namespace) -> dict[str, dict]:
    """All rows in turn; those that decode one sentence at a time get evenly spaced sentences."""
    work = make_work(args)
    everyone = list(range(len(work.prompts)))
    alone = some(everyone, args.alone)
    rows = decoding_rows(args)
    decoders = {row: DECODERS[row](args, work) for row in rows}
    members = {row: alone if row in ONE_BY_ONE else everyone for row in rows}
    return in_turn(args, work, decoders, members)


def some(members: Sequence[int], most: int) -> Sequence[int]:
    """At most `most` evenly spaced sentences; 0: all."""
    return members[:: max(len(members) // most, 1)][:most] if most else members


def in_turn(
    args: argparse.Namespace,
    work: Work,
    decoders: dict[str, Decoder],
    members: dict[str, Sequence[int]],
    same: Sequence[Sequence[str]] | None = None,
) -> dict[str, dict]:
    """Each row decodes its members in every round; `same`: groups of rows whose tokens must agree (default: all rows).

    The time of a row that decodes some of the sentences is scaled up. Ratios are to the first row.
    """
    rows, first = list(decoders), next(iter(decoders))
    scale = {row: sum(work.ends) / sum(work.ends[n] for n in members[row]) for row in rows}
    outputs = {row: dict(zip(members[row], decoders[row](members[row]), strict=True)) for row in rows}  # warm-up
    differ: dict[str, int] = {}
    for group in same if same is not None else [rows]:
        differ |= check_equal_tokens(args, {row: outputs[row] for row in group})
    seconds: dict[str, list[float]] = {row: [] for row in rows}
    for _ in range(args.rounds):
        for row in rows:
            started = now(args.device)
            decoders[row](members[row])
            seconds[row].append((now(args.device) - started) * scale[row])
    return {
        row: {
            "seconds": statistics.median(times),
            "sentences_per_second": len(work.prompts) / statistics.median(times),
            "tokens_per_second": sum(work.ends) / statistics.median(times),
            "speed_ratio": pairwise_ratio(times, seconds[first]),
            "sentences_decoded": len(members[row]),
            "scaled_by": scale[row],
            **({"sentences_that_differ": differ[row]} if row in differ else {}),
            "all_seconds": [round(value, 4) for value in times],
        }
        for row, times in seconds.items()
    }
