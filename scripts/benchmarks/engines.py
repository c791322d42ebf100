"""Other engines' decoding of the model without a prefix (scripts/benchmark.py engines, greedy; decode --vs ...).

transformers' `generate` ends each output at the length of our rows. CTranslate2 cannot: there all outputs have one
length, their mean, and so they have in the row it is compared with, this package without a prefix. CTranslate2 gets the
batch size at which it is fastest.
"""

import argparse
import functools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks import decode
from benchmarks.models import is_seq2seq, make_base
from prefixlib.system.errors import UserError

GREEDY = {"sentences": 8, "batch_size": 1, "beams": 1}
BATCH_SIZES = (1, 8, 32)  # CTranslate2 gets the best of these
LABELS = {
    "bf16": "prefix, the model in bfloat16",
    "plain": "this package without a prefix, all outputs of the mean length",
    "finetune": "transformers `generate`, no prefix",
    "finetune-static": "transformers `generate`, no prefix, static cache",
    "ct2": "CTranslate2 float32, no prefix, all outputs of the mean length",
    "ct2-int8": "CTranslate2 int8, no prefix, all outputs of the mean length",
}


def mean_length(work: decode.Work) -> decode.Work:
    """The same prompts; all outputs of the mean length."""
    mean = round(sum(work.ends) / len(work.ends))
    return decode.Work(work.prompts, [mean] * len(work.ends))


def plain_decoder(args: argparse.Namespace, work: decode.Work) -> decode.Decoder:
    """This package's decoding without a prefix."""
    return decode.our_decoder(args, mean_length(work), prefixed=False)


def bfloat16_decoder(args: argparse.Namespace, work: decode.Work) -> decode.Decoder:
    """This package's decoding with the prefix and the model in bfloat16: gen.py --bf16 yes."""
    return decode.our_decoder(argparse.Namespace(**{**vars(args), "bf16": True}), work)


def generate_decoder(args: argparse.Namespace, work: decode.Work, **how: Any) -> decode.Decoder:
    """transformers' `generate` on the same batches: the model as it is after full fine-tuning."""
    base = decode.sharpen(make_base(args))

    def run(members: Sequence[int]) -> list[list[int]]:
        outputs = []
        for group in decode.batches(members, args.batch_size):
            inputs = decode.padded(args, work, group)
            outputs += decode.generate(base, args, work, group, **inputs, **how)
        return outputs

    return run


def ctranslate2_decoder(args: argparse.Namespace, work: decode.Work, compute: str) -> decode.Decoder:
    """CTranslate2's beam search, converted from a GPT-2 folder."""
    if is_seq2seq(args) or args.device != "cpu":
        raise UserError("ct2 rows are for GPT-2's shapes on --device cpu; leave them out of --vs")
    work = mean_length(work)
    generator = convert(decode.sharpen(make_base(args)), compute)
    length = work.ends[0]

    def search(members: Sequence[int], batch_size: int) -> list[list[int]]:
        found = generator.generate_batch(
            [list(map(str, work.prompts[n])) for n in members],
            beam_size=args.beams,
            min_length=length,
            max_length=length,
            max_batch_size=batch_size,
            include_prompt_in_result=False,
        )
        return [result.sequences_ids[0] for result in found]

    best = None

    def run(members: Sequence[int]) -> list[list[int]]:
        nonlocal best
        if best is None:  # the warm-up
            seconds = {}
            for size in BATCH_SIZES:
                started = time.perf_counter()
                search(members, size)
                seconds[size] = time.perf_counter() - started
            best = min(seconds, key=seconds.get)
        return search(members, best)

    return run


def convert(base: nn.Module, compute: str) -> Any:
    """A CTranslate2 generator of a GPT-2, converted through folders; its tokens are the ids as text."""
    import ctranslate2

    size, eos = base.config.vocab_size, str(base.config.eos_token_id)
    vocabulary = SimpleNamespace(
        get_vocab=lambda: {str(n): n for n in range(size)}, bos_token=eos, eos_token=eos, unk_token=eos
    )
    base.config.tie_word_embeddings = False  # `sharpen` made separate output weights
    with tempfile.TemporaryDirectory() as folder:
        saved, converted = str(Path(folder) / "model"), str(Path(folder) / "converted")
        base.save_pretrained(saved)
        converter = ctranslate2.converters.TransformersConverter(saved)
        converter.load_tokenizer = lambda *_, **__: vocabulary
        converter.convert(converted, quantization=compute)
        return ctranslate2.Generator(converted, compute_type=compute, intra_threads=torch.get_num_threads())


DECODERS = {
    "plain": plain_decoder,
    "bf16": bfloat16_decoder,
    "finetune": generate_decoder,
    "finetune-static": functools.partial(generate_decoder, cache_implementation="static"),
    "ct2": functools.partial(ctranslate2_decoder, compute="float32"),
    "ct2-int8": functools.partial(ctranslate2_decoder, compute="int8"),
}
# Two groups of rows; within each all rows have the same work, and their tokens are compared.
PREFIXED = ("prefix", "bf16")
COMPARED = ("plain", "ct2", "ct2-int8")  # without a prefix, all outputs of one length


def engines(args: argparse.Namespace) -> dict[str, dict]:
    """This package's decoding and that of other engines, in turn. Equal tokens are counted, not required."""
    work = decode.make_work(args)
    rows = ["prefix", *args.rows[1:]]
    if any(row in COMPARED for row in rows):
        rows.insert(1, "plain")
    everyone = range(len(work.prompts))
    decoders = {row: {**decode.DECODERS, **DECODERS}[row](args, work) for row in rows}
    together = [[row for row in rows if row in group] for group in (PREFIXED, COMPARED)]
    ties = argparse.Namespace(**{**vars(args), "allow_ties": len(everyone)})
    return decode.in_turn(ties, work, decoders, dict.fromkeys(rows, everyone), [group for group in together if group])
