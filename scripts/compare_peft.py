"""The same prefix trained here and through PEFT: losses step by step, seconds per step, peak memory of each.

python scripts/compare_peft.py --model_name_or_path smollm2-135m --train_file data/e2e_data/src1_train.txt --steps 20

Both start from the same weights of the same network (PEFT's prefix_projection=True), read the same batches, and take
AdamW's steps without decay; each is a separate process, so that its peak memory can be measured. PEFT's network reads
vectors as wide as the keys of a layer, so ours does here, too; its usual width is the model's.
"""

if __name__ == "__main__":
    from prefixlib.system import startup

    startup.begin()

import argparse
import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from gpt2.dataset import TableToTextDataset, collate
from gpt2.prefix_lm import PrefixLM
from gpt2.train_control import FAMILY, PrefixConfig, PrefixTuning
from prefixlib.base_model import gguf_base
from prefixlib.base_model.load import load_model, load_tokenizer, resolve_model_name
from prefixlib.data.tasks import GPT2_MODES, read_records
from prefixlib.runs import record
from prefixlib.settings.flags import Parser, add_number
from prefixlib.system import files
from prefixlib.system.errors import UserError, one_line_errors

log = logging.getLogger("compare_peft")

LIBRARIES = ("this package", "PEFT")
Batch = dict[str, Tensor]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--model_name_or_path", required=True, help="decoder-only model: hub name, folder, FILE.gguf")
    parser.add_argument("--train_file", type=Path, required=True, help="texts to train on, in the mode's format")
    parser.add_argument("--mode", default="data2text", choices=GPT2_MODES, help="the file's task")
    add_number(parser, "--steps", above=0, default=20, help="optimiser steps")
    add_number(parser, "--bsz", above=0, default=10, help="texts per step")
    add_number(parser, "--preseqlen", above=0, default=5, help="prefix length P")
    add_number(parser, "--mid_dim", above=0, default=512, help="hidden width of the network")
    add_number(parser, "--learning_rate", float, above=0, default=1e-3, help="constant")
    add_number(parser, "--seed", low=0, default=101, help="seed of the network's weights and the order of the texts")
    parser.add_argument("--output", type=Path, help="STEM: writes STEM.json and STEM.md (default: print only)")
    parser.add_argument("--only", choices=LIBRARIES, help=argparse.SUPPRESS)  # a child's part
    args = parser.parse_args(argv)
    if args.output:
        files.check_can_write(args.output.with_name(f"{args.output.name}.json"), "--output")
    return args


def read_batches(args: argparse.Namespace, tokenizer, positions: int) -> Iterator[Batch]:
    """`steps` batches of the file's texts in the seed's order, repeated from the beginning if they run out."""
    texts = TableToTextDataset(args.mode, read_records(args.mode, args.train_file), tokenizer, positions)
    generator, order = torch.Generator().manual_seed(args.seed), []
    for _ in range(args.steps):
        while len(order) < args.bsz:
            order += torch.randperm(len(texts), generator=generator).tolist()
        chosen, order = order[: args.bsz], order[args.bsz :]
        yield collate([texts[n] for n in chosen], pad_token_id=tokenizer.eos_token_id)


def import_peft():
    """The peft library. Raises UserError if it is missing."""
    try:
        import peft
    except ImportError as error:
        raise UserError("peft is not installed: pip install -e .[peers]") from error
    return peft


def network(args: argparse.Namespace, config: PrefixConfig) -> nn.Module:
    """PEFT's prefix network with the seed's weights, which both parts start from."""
    torch.manual_seed(args.seed)
    shape = {"num_layers": config.n_layer, "num_attention_heads": config.n_head, "num_transformer_submodules": 1}
    return import_peft().PrefixEncoder(peft_config(args, token_dim=config.n_head * config.head_dim, **shape))


def peft_config(args: argparse.Namespace, **shape: int):
    return import_peft().PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=args.preseqlen,
        prefix_projection=True,
        encoder_hidden_size=args.mid_dim,
        **shape,
    )


def build(args: argparse.Namespace, base: nn.Module) -> tuple[nn.Module, Callable[[Batch], Tensor]]:
    """The library's model around `base`, and its loss of a batch: the mean over the scored tokens."""
    settings = {"preseqlen": args.preseqlen, "mid_dim": args.mid_dim, "prefix_dropout": 0.0}
    config = PrefixConfig.for_model(base, **settings, prefix_mode="activation", format_mode="cat")
    start = network(args, config)
    if args.only == "PEFT":
        model = import_peft().get_peft_model(base, peft_config(args))
        model.prompt_encoder["default"].load_state_dict(start.state_dict())
        return model, lambda batch: model(**batch).loss
    prefix = PrefixTuning(replace(config, n_embd=config.n_head * config.head_dim))
    prefix.wte.load_state_dict(start.embedding.state_dict())
    prefix.control_trans.load_state_dict(start.transform.state_dict())
    ours = PrefixLM(base, prefix)
    return ours, lambda batch: ours(**batch)[0].mean()


def train(args: argparse.Namespace) -> dict[str, object]:
    """One library's part: its loss (mean per scored token) and seconds at every step, and its memory."""
    name = resolve_model_name(args.model_name_or_path)
    tokenizer, base = load_tokenizer(name), load_model(name, FAMILY)
    batches = list(read_batches(args, tokenizer, positions=512))
    model, loss_of = build(args, base)
    model.train()
    base.eval()  # no dropout in the frozen model, in both parts
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0)
    losses, seconds = [], []
    for step, batch in enumerate(batches, start=1):
        started = time.perf_counter()
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        seconds.append(round(time.perf_counter() - started, 4))
        losses.append(loss.item())
        log.info("%s: step %d/%d  loss %.4f  %.2f s", args.only, step, args.steps, losses[-1], seconds[-1])
    return {
        "losses": losses,
        "seconds": seconds,
        "peak_memory_bytes": record.peak_memory_bytes(),
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "base_model": gguf_base.described(name) or {"name": args.model_name_or_path},
        "device": record.device_name(),
        "versions": record.versions(),
    }


def compare(args: argparse.Namespace, argv: list[str]) -> dict[str, object]:
    """Run both parts, one after the other, and compare their losses."""
    parts = {}
    for library in LIBRARIES:
        command = [sys.executable, __file__, *argv, "--only", library]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if child.returncode:
            raise UserError(f"the part of {library} failed (exit code {child.returncode}); its message is above")
        parts[library] = json.loads(child.stdout.splitlines()[-1])
    ours, theirs = (parts[library]["losses"] for library in LIBRARIES)
    apart = max(abs(one - other) / abs(other) for one, other in zip(ours, theirs, strict=True))
    shown = {
        name: getattr(args, name) for name in ("mode", "steps", "bsz", "preseqlen", "mid_dim", "learning_rate", "seed")
    }
    return {"settings": shown, "largest_relative_difference": apart, "parts": parts}


def as_markdown(found: dict) -> str:
    """The table."""
    settings, parts = found["settings"], found["parts"]
    base = parts[LIBRARIES[0]]["base_model"]["name"]
    lines = [
        f"### The same prefix here and through PEFT: {base}",
        "",
        f"{settings['steps']} steps of {settings['bsz']} texts, P {settings['preseqlen']}, network width "
        f"{settings['mid_dim']}, float32. Largest relative difference of the losses: "
        f"{found['largest_relative_difference']:.1e}.",
        "",
        "| | first loss | last loss | median seconds per step | peak memory, GB | trained numbers |",
        "|---|---|---|---|---|---|",
    ]
    for library, part in parts.items():
        memory = part["peak_memory_bytes"].get("gpu") or part["peak_memory_bytes"].get("host")
        cells = [f"{part['losses'][0]:.5f}", f"{part['losses'][-1]:.5f}", f"{statistics.median(part['seconds']):.2f}"]
        cells += [f"{memory / 1e9:.2f}" if memory else "n/a", f"{part['trained_parameters']:,}"]
        lines.append(f"| {library} | " + " | ".join(cells) + " |")
    first = parts[LIBRARIES[0]]
    return "\n".join([*lines, "", f"Device: {first['device']}. Code: {first['versions'].get('commit')}."]) + "\n"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    record.set_up_logging()
    log.setLevel(logging.INFO)
    if args.only:
        print(json.dumps(train(args)))
        return 0
    found = compare(args, argv)
    if args.output:
        stem = args.output.expanduser().resolve()
        files.write_json(stem.with_name(f"{stem.name}.json"), found)
        files.write_text(stem.with_name(f"{stem.name}.md"), as_markdown(found))
    print(as_markdown(found))
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
