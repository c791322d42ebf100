"""Many prefixes on one GPT-2 in one batch, and other ways to serve many tasks (scripts/benchmark.py mixed).

Sentences take turns among the prefixes. PEFT decodes each prefix's sentences in a separate batch, with our weights and
so the same tokens; LoRA, another method, mixes adapters in a batch by `adapter_names=`. Memory is measured in a process
that does nothing else, for outputs of a few tokens.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from benchmarks import decode
from benchmarks.models import LORA_RANK, LOUDER, SETTINGS, import_peft, is_seq2seq, make_base
from benchmarks.steps import peak_memory
from gpt2 import decoding
from gpt2.dataset import Encoded
from gpt2.model import Model
from gpt2.prefix_lm import PrefixLM
from gpt2.train_control import PrefixConfig, PrefixTuning
from prefixlib.base_model.load import fuse_gelu
from prefixlib.mixed import MixedPrefixes, Prepared
from prefixlib.runs import record
from prefixlib.system.errors import UserError

COUNTS = (1, 8, 64)  # prefixes
SIZES = {"sentences": 64, "batch_size": 64, "beams": 1}
FEW_TOKENS = 8  # tokens of an output when memory is measured
LABELS = {
    "prefix": "one prefix for all",
    "mixed": "{} in one batch",
    "peft": "PEFT prefix: {}, one after the other",
    "lora": f"PEFT LoRA, rank {LORA_RANK}: {{}} in one batch (another method)",
}


def label(row: str) -> str:
    """A row's name in the table."""
    kind, _, count = row.partition("-")
    one, many = ("adapter", "adapters") if kind == "lora" else ("prefix", "prefixes")
    return LABELS[kind].format(f"{count} {one if count == '1' else many}")


def make_prefix(args: argparse.Namespace, base: nn.Module, number: int) -> PrefixTuning:
    """Prefix `number` in its stored form, without its network."""
    torch.manual_seed(number)
    kind = {"mid_dim": 1, "prefix_dropout": 0.0, "prefix_mode": "activation", "format_mode": "cat"}
    config = PrefixConfig.for_model(base, preseqlen=args.preseqlen, init_shallow=True, **kind)
    prefix = PrefixTuning(config).to(args.device, base.dtype).requires_grad_(False)
    prefix.control_trans.mul_(LOUDER)
    return prefix


def our_decoder(args: argparse.Namespace, work: decode.Work, count: int) -> decode.Decoder:
    """The model of `load_mixed`: sentences of all prefixes in one batch. count 0: one prefix, without `load_mixed`."""
    base = decode.sharpen(make_base(args))
    fuse_gelu(base)
    models = {str(n): Model(PrefixLM(base, make_prefix(args, base, n)), None) for n in range(count or 1)}
    mixed, eos = MixedPrefixes(Model, base, None, "", models), base.config.eos_token_id
    rule, steps = decode.rule_of(args, eos), decode.causal_steps(work, eos)
    how = {"batch_size": args.batch_size, "progress": False}

    def run(members: Sequence[int]) -> list[list[int]]:
        prompts = [work.prompts[n] for n in members]
        with mock.patch.object(decoding, "CausalSteps", steps):
            if not count:
                layers = models["0"].past([]).layers
                return [one.tokens for one in decoding.decode(base, prompts, rule, layers=layers, **how)]
            jobs = [(str(n % count), Encoded(work.prompts[n], [])) for n in members]
            found = mixed._decode(jobs, Prepared(prompts, "beam", rule, str), count=1, seed=0, **how)
        return [best.tokens for (best,) in found]

    return run


def peft_decoder(args: argparse.Namespace, work: decode.Work, count: int) -> decode.Decoder:
    """PEFT's prefixes with our weights, loaded once; sentences are decoded prefix by prefix."""
    peft, base = import_peft(), decode.sharpen(make_base(args))
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=args.preseqlen, inference_mode=True)
    model = _with_adapters(peft, base, config, count).eval()
    for n in range(count):
        weight = model.prompt_encoder[str(n)].embedding.weight
        weight.data.copy_(make_prefix(args, base, n).flat())

    def run(members: Sequence[int]) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        for name in range(count):
            own = [n for n in members if n % count == name]
            if own:
                model.set_adapter(str(name))
            for group in decode.batches(own, args.batch_size):
                inputs = decode.padded(args, work, group)
                found |= zip(group, decode.generate(model, args, work, group, **inputs), strict=True)
        return [found[n] for n in members]

    return run


def lora_decoder(args: argparse.Namespace, work: decode.Work, count: int) -> decode.Decoder:
    """LoRA adapters of random weights, mixed in one batch."""
    peft, base = import_peft(), decode.sharpen(make_base(args))
    how = {"task_type": "CAUSAL_LM", "fan_in_fan_out": True, "init_lora_weights": False}
    model = _with_adapters(peft, base, peft.LoraConfig(r=LORA_RANK, **how), count).eval()

    def run(members: Sequence[int]) -> list[list[int]]:
        outputs = []
        for group in decode.batches(members, args.batch_size):
            names = [str(n % count) for n in group]
            inputs = decode.padded(args, work, group)
            outputs += decode.generate(model, args, work, group, adapter_names=names, **inputs)
        return outputs

    return run


def _with_adapters(peft, base: nn.Module, config, count: int) -> nn.Module:
    model = peft.get_peft_model(base, config, adapter_name="0")
    for n in range(1, count):
        model.add_adapter(str(n), config)
    return model.to(base.device)


DECODERS: dict[str, Callable[[argparse.Namespace, decode.Work, int], decode.Decoder]] = {
    "prefix": our_decoder,
    "mixed": our_decoder,
    "peft": peft_decoder,
    "lora": lora_decoder,
}


def make_decoder(args: argparse.Namespace, work: decode.Work, row: str) -> decode.Decoder:
    kind, _, count = row.partition("-")
    return DECODERS[kind](args, work, int(count or 0))


def mixed(args: argparse.Namespace) -> dict[str, dict]:
    """Seconds and peak memory of every row; 64 prefixes one after the other decode a part of the sentences."""
    if is_seq2seq(args):
        raise UserError(f"mixed is for GPT-2's shapes, not --shape {args.shape}")
    work = decode.make_work(args)
    kinds = ["mixed", *(kind for kind in ("peft", "lora") if kind in args.rows)]
    rows = ["prefix", *(f"{kind}-{count}" for count in args.prefixes for kind in kinds)]
    decoders = {row: make_decoder(args, work, row) for row in rows}
    everyone = list(range(len(work.prompts)))
    one_by_one = f"peft-{len(everyone)}"  # as many prefixes as sentences
    members = {row: decode.some(everyone, args.alone) if row == one_by_one else everyone for row in rows}
    same = [[row for row in (f"mixed-{count}", f"peft-{count}") if row in rows] for count in args.prefixes]
    same[0] = ["prefix", *same[0]] if args.prefixes[0] == 1 else same[0]
    table = decode.in_turn(args, work, decoders, members, same)
    del decoders
    names = ("shape", "device", "bf16", *SETTINGS, *decode.SETTINGS, "lengths_from", "tokenizer", "seed")
    settings = {**{name: getattr(args, name) for name in names}, "max_new_tokens": FEW_TOKENS}
    first = None
    for row in rows:
        found = peak_memory("benchmarks.mixed", row, settings)
        own = found["gpu"] if args.device == "cuda" else found["host"] - found["libraries"]
        first = first or own
        table[row] |= {"own_memory_bytes": own, "own_memory_ratio": first / own}
    return table


def peak(args: argparse.Namespace, row: str) -> dict[str, int]:
    """Peak memory of this process after and before loading and decoding; call it where nothing else runs."""
    before = record.peak_memory_bytes()["host"]
    args.lengths_from = args.lengths_from and Path(args.lengths_from)
    args.tokenizer = args.tokenizer and Path(args.tokenizer)
    work = decode.make_work(args)
    make_decoder(args, work, row)(range(len(work.prompts)))
    return {**record.peak_memory_bytes(), "libraries": before}


if __name__ == "__main__":  # the process that `peak_memory` starts
    print(json.dumps(peak(argparse.Namespace(**json.loads(sys.argv[2])), sys.argv[1])))
