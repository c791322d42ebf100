"""Time and memory of one training step, side by side with its peers: python scripts/benchmark.py train-step

The rows do the same work on the same batch: random weights of GPT-2's shape, float32. They take turns, round by round,
so that a machine's drift meets all of them; medians and ratios to this package's prefix are printed and written to
results/. Peers need `pip install -e .[peers]`. Memory is the peak of a process that runs that row alone.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2.train_control import PrefixConfig, PrefixLM, PrefixTuning
from gpt2.trainer_prefix import row_losses
from prefixlib import files, record
from prefixlib.errors import UserError, one_line_errors
from prefixlib.launch import REPOSITORY

SHAPES = {  # layers, heads, width
    "gpt2-tiny": (2, 2, 64),
    "gpt2-small": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
}


def make_base(shape: str) -> GPT2LMHeadModel:
    """A GPT-2 with random weights of the given shape."""
    torch.manual_seed(0)
    layers, heads, width = SHAPES[shape]
    return GPT2LMHeadModel(GPT2Config(n_layer=layers, n_head=heads, n_embd=width))


def make_batch(rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Random ids (B, T) whose second half is scored, as in table-to-text."""
    torch.manual_seed(1)
    input_ids = torch.randint(0, 50_000, (rows, tokens))
    labels = input_ids.clone()
    labels[:, : tokens // 2] = -100
    return input_ids, labels


def prefix_loss(args) -> tuple[nn.Module, Callable]:
    """This package: the frozen model in eval mode, the MLP on P rows, logits where there are labels."""
    base = make_base(args.shape).eval()
    torch.manual_seed(2)
    settings = {"prefix_dropout": 0.0, "prefix_mode": "activation", "format_mode": "cat"}
    config = PrefixConfig.for_model(base.config, preseqlen=args.preseqlen, mid_dim=args.mid_dim, **settings)
    checkpointing = args.row == "prefix, checkpointing"
    if checkpointing:
        for module in base.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    model = PrefixLM(base, PrefixTuning(config), train_base=checkpointing, checkpointing=checkpointing).train()

    def loss(input_ids: Tensor, labels: Tensor) -> Tensor:
        nll, rows = model(input_ids, labels)
        return row_losses(nll, rows, labels, torch.ones(len(labels), device=labels.device), mode=0).mean()

    return model, loss


def peft_loss(args) -> tuple[nn.Module, Callable]:
    """PEFT's prefix tuning with projection, its weights set to ours, its base in eval mode too."""
    try:
        from peft import PrefixTuningConfig, get_peft_model
    except ImportError as error:
        raise UserError("peft is not installed: pip install -e .[peers], or leave it out with --rows") from error
    ours, _ = prefix_loss(args)
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=args.preseqlen,
        prefix_projection=True,
        encoder_hidden_size=args.mid_dim,
    )
    model = get_peft_model(make_base(args.shape), config).train()
    model.base_model.eval()
    encoder = model.prompt_encoder["default"]
    encoder.embedding.load_state_dict(ours.prefix.wte.state_dict())
    encoder.transform.load_state_dict(ours.prefix.control_trans.state_dict())
    return model, lambda input_ids, labels: model(input_ids=input_ids, labels=labels).loss


def finetune_loss(args) -> tuple[nn.Module, Callable]:
    """Full fine-tuning with transformers' own loss, dropout on."""
    model = make_base(args.shape).train()
    return model, lambda input_ids, labels: model(input_ids=input_ids, labels=labels).loss


ROWS = {
    "prefix": prefix_loss,
    "prefix, checkpointing": prefix_loss,
    "peft prefix": peft_loss,
    "full fine-tuning": finetune_loss,
}
SAME_LOSS = ("prefix", "prefix, checkpointing", "peft prefix")  # the same function of the same weights


def make_step(args, row: str) -> tuple[Callable[[], float], float]:
    """A function that takes one optimiser step and returns its seconds; and the loss before any step."""
    args = argparse.Namespace(**{**vars(args), "row": row})
    model, loss_of = ROWS[row](args)
    model.to(args.device)
    batch = tuple(part.to(args.device) for part in make_batch(args.bsz, args.tokens))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)

    def step() -> float:
        started = time.perf_counter()
        optimizer.zero_grad()
        loss_of(*batch).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    with torch.no_grad():
        first_loss = loss_of(*batch).item()
    return step, first_loss


def peak_memory(args, row: str) -> int:
    """Bytes at the peak of a fresh process that takes three steps of `row` alone (GPU memory where there is one)."""
    settings = ("shape", "bsz", "tokens", "preseqlen", "mid_dim", "device")
    flags = [word for name in settings for word in (f"--{name}", str(getattr(args, name)))]
    command = [sys.executable, __file__, "memory-of", "--rows", row, *flags]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"measuring the memory of {row!r} failed: {result.stderr.strip().splitlines()[-1]}")
    peak = json.loads(result.stdout.splitlines()[-1])
    return peak.get("gpu", peak["host"])


def train_step(args) -> dict:
    """All rows in turn for `rounds` rounds; medians, ratios to "prefix", peak memory."""
    steps, losses = {}, {}
    for row in args.rows:
        steps[row], losses[row] = make_step(args, row)
    same = [losses[row] for row in args.rows if row in SAME_LOSS]
    if same and max(same) - min(same) > 1e-4:
        raise UserError(f"the rows do not compute the same loss: {losses}")
    for _ in range(2):  # warm-up
        for step in steps.values():
            step()
    seconds: dict[str, list[float]] = {row: [] for row in steps}
    for _ in range(args.rounds):
        for row, step in steps.items():
            seconds[row].append(step())
    steps.clear()
    table = {}
    for row, times in seconds.items():
        reference = seconds[args.rows[0]]
        table[row] = {
            "seconds": statistics.median(times),
            "tokens_per_second": args.bsz * args.tokens / statistics.median(times),
            "time_ratio": statistics.median(ours / other for ours, other in zip(reference, times, strict=True)),
            "first_loss": losses[row],
            "peak_memory_bytes": peak_memory(args, row),
        }
    return table


def as_table(table: dict[str, dict], first: str) -> str:
    """Markdown; the ratio columns are `first` divided by the row: below 1 means `first` is faster, or smaller."""
    lines = [
        f"| row | tokens/s | time: {first} / row | peak memory, MiB | memory: {first} / row |",
        "|---|---|---|---|---|",
    ]
    memory = table[first]["peak_memory_bytes"]
    for row, numbers in table.items():
        peak = numbers["peak_memory_bytes"]
        lines.append(
            f"| {row} | {numbers['tokens_per_second']:,.0f} | {numbers['time_ratio']:.2f} "
            f"| {peak / 2**20:,.0f} | {memory / peak:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("train-step", "memory-of"), help="memory-of: one row alone, for its peak")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="gpt2-small")
    parser.add_argument("--bsz", type=int, default=5, help="rows of the batch")
    parser.add_argument("--tokens", type=int, default=80, help="tokens per row; WebNLG's mean is 80")
    parser.add_argument("--preseqlen", type=int, default=5)
    parser.add_argument("--mid_dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of every row")
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="default: results/benchmark_train-step_SHAPE_DEVICE.json")
    args = parser.parse_args(argv)
    if args.what == "memory-of":
        step, _ = make_step(args, args.rows[0])
        for _ in range(3):
            step()
        print(json.dumps(record.peak_memory_bytes()))
        return 0
    table = train_step(args)
    output = args.output or REPOSITORY / "results" / f"benchmark_train-step_{args.shape}_{args.device}.json"
    settings = {name: getattr(args, name) for name in ("shape", "bsz", "tokens", "preseqlen", "mid_dim", "rounds")}
    run = {"device": record.device_name(), **record.versions()}
    files.write_json(output, {"settings": settings, "run": run, "rows": table})
    print(as_table(table, args.rows[0]))
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
