"""Time and memory of one training step, side by side with its peers: python scripts/benchmark.py train-step

The rows do the same work on the same batch: random weights of the model's shape, float32. They take turns, round by
round, so that a machine's drift meets all of them; medians and ratios to this package's prefix are printed and written
to results/. Peers need `pip install -e .[peers]`. Memory is the peak of a process that runs that row alone.

Legend: B batch, S source tokens, T tokens (of the target, for an encoder-decoder), P prefix length.
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
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel

from gpt2 import train_control as gpt2
from gpt2.trainer_prefix import row_losses
from prefixlib import attention, files, record
from prefixlib.errors import UserError, one_line_errors
from prefixlib.launch import REPOSITORY
from seq2seq import prefixTuning as bart

SHAPES = {  # layers (of each side), heads, width
    "gpt2-tiny": (2, 2, 64),
    "gpt2-small": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "bart-tiny": (2, 2, 64),
    "bart-base": (6, 12, 768),
    "bart-large": (12, 16, 1024),
}
# B, S, T, P, mid_dim where the command line does not say: WebNLG's mean length; XSum's, cut to what a CPU can do
DEFAULTS = {"gpt2": (5, 0, 80, 5, 512), "bart": (2, 256, 40, 200, 800)}

SETTINGS = ("shape", "bsz", "source", "tokens", "preseqlen", "mid_dim")

Batch = dict[str, Tensor]
Case = tuple[nn.Module, Callable[[Batch], Tensor]]  # a model, and its loss on a batch


def is_bart(args) -> bool:
    return args.shape.startswith("bart")


def make_base(args) -> nn.Module:
    """A model with random weights of the given shape; dropout off where the row is to compute an exact loss."""
    torch.manual_seed(0)
    layers, heads, width = SHAPES[args.shape]
    if not is_bart(args):
        return GPT2LMHeadModel(GPT2Config(n_layer=layers, n_head=heads, n_embd=width))
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (
        ("layers", layers), ("attention_heads", heads), ("ffn_dim", 4 * width))}  # fmt: skip
    return BartForConditionalGeneration(BartConfig(d_model=width, **sides))


def make_batch(args) -> Batch:
    """Random ids: half of every GPT-2 row is scored, as in table-to-text; all of BART's target is."""
    torch.manual_seed(1)
    labels = torch.randint(4, 50_000, (args.bsz, args.tokens))
    if is_bart(args):
        return {"input_ids": torch.randint(4, 50_000, (args.bsz, args.source)), "labels": labels}
    input_ids = labels.clone()
    labels[:, : args.tokens // 2] = -100
    return {"input_ids": input_ids, "labels": labels}


def set_dropout_to_zero(model: nn.Module) -> None:
    """No dropout even in train mode, which checkpointed layers need."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def per_row(prefix: nn.Module) -> None:
    """Let the prefix networks run on B*P rows, as the original does, instead of on P."""
    rows = 1

    def remember(module, inputs):
        nonlocal rows
        rows = inputs[0]

    def repeat(module, inputs):
        return (inputs[0].repeat(rows, 1),)

    def first_of(module, inputs, output):
        return output.view(rows, -1, output.shape[-1]).mean(dim=0)  # every row's gradient, as in the original

    prefix.register_forward_pre_hook(remember)
    for module in prefix.children():
        if isinstance(module, nn.Sequential):
            module.register_forward_pre_hook(repeat)
            module.register_forward_hook(first_of)


def our_prefix(args, base: nn.Module) -> nn.Module:
    """This package's prefix module with random weights."""
    torch.manual_seed(2)
    settings = {"preseqlen": args.preseqlen, "mid_dim": args.mid_dim, "prefix_dropout": 0.0}
    if is_bart(args):
        sites = dict.fromkeys(("use_encoder_prefix", "use_cross_prefix", "use_self_prefix"), True)
        off = {"use_deep": False, "init_shallow": False}
        return bart.PrefixTuning(bart.PrefixConfig.for_model(base.config, **settings, **sites, **off))
    named = {"prefix_mode": "activation", "format_mode": "cat"}
    return gpt2.PrefixTuning(gpt2.PrefixConfig.for_model(base.config, **settings, **named))


def prefix_case(args) -> Case:
    """This package: the network on P rows; GPT-2 in eval mode with logits where there are labels."""
    base = make_base(args).eval()
    set_dropout_to_zero(base)
    prefix = our_prefix(args, base)
    checkpointing = args.row == "prefix, checkpointing"
    if args.row == "prefix, network per row":
        per_row(prefix)
    if not is_bart(args):
        model = gpt2.PrefixLM(base, prefix, train_base=checkpointing, checkpointing=checkpointing).train()

        def loss(batch: Batch) -> Tensor:
            nll, rows = model(batch["input_ids"], batch["labels"])
            return row_losses(nll, rows, batch["labels"], torch.ones(1), mode=0).mean()

        return model, loss
    model = bart.PrefixLM(base, prefix).train()
    if checkpointing:
        attention.enable_checkpointing(base)

    def bart_loss(batch: Batch) -> Tensor:
        start = torch.full_like(batch["labels"][:, :1], 2)
        decoder_input_ids = torch.cat([start, batch["labels"][:, :-1]], dim=1)
        logits = model(batch["input_ids"], torch.ones_like(batch["input_ids"]), decoder_input_ids)
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    return model, bart_loss


def peft_case(args) -> Case:
    """PEFT's prefix tuning with projection, no dropout. GPT-2: our weights. BART: only its decoder gets a prefix."""
    try:
        from peft import PrefixTuningConfig, get_peft_model
    except ImportError as error:
        raise UserError("peft is not installed: pip install -e .[peers], or leave it out with --rows") from error
    base = make_base(args)
    set_dropout_to_zero(base)
    config = PrefixTuningConfig(
        task_type="SEQ_2_SEQ_LM" if is_bart(args) else "CAUSAL_LM",
        num_virtual_tokens=args.preseqlen,
        prefix_projection=True,
        encoder_hidden_size=args.mid_dim,
    )
    model = get_peft_model(base, config).train()
    if not is_bart(args):
        ours = our_prefix(args, base)
        encoder = model.prompt_encoder["default"]
        encoder.embedding.load_state_dict(ours.wte.state_dict())
        encoder.transform.load_state_dict(ours.control_trans.state_dict())
    return model, lambda batch: model(**batch).loss


def finetune_case(args) -> Case:
    """Full fine-tuning with transformers' own loss, dropout on."""
    model = make_base(args).train()
    return model, lambda batch: model(**batch).loss


ROWS = {
    "prefix": prefix_case,
    "prefix, checkpointing": prefix_case,
    "prefix, network per row": prefix_case,
    "peft prefix": peft_case,
    "full fine-tuning": finetune_case,
}


def same_loss(args) -> tuple[str, ...]:
    """Rows that compute the same function of the same weights."""
    ours = ("prefix", "prefix, checkpointing", "prefix, network per row")
    return ours if is_bart(args) else (*ours, "peft prefix")


def make_step(args, row: str) -> tuple[Callable[[], float], float]:
    """A function that takes one optimiser step and returns its seconds; and the loss before any step."""
    args = argparse.Namespace(**{**vars(args), "row": row})
    model, loss_of = ROWS[row](args)
    model.to(args.device)
    batch = {name: part.to(args.device) for name, part in make_batch(args).items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)

    def step() -> float:
        started = time.perf_counter()
        optimizer.zero_grad()
        loss_of(batch).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    with torch.no_grad():
        first_loss = loss_of(batch).item()
    return step, first_loss


def peak_memory(args, row: str) -> int:
    """Bytes at the peak of a fresh process that takes three steps of `row` alone (GPU memory where there is one)."""
    flags = [word for name in (*SETTINGS, "device") for word in (f"--{name}", str(getattr(args, name)))]
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
    same = [losses[row] for row in args.rows if row in same_loss(args)]
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
            "tokens_per_second": args.bsz * (args.source + args.tokens) / statistics.median(times),
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
    parser.add_argument("--bsz", type=int, help="rows of the batch (default: 5; BART 2)")
    parser.add_argument("--source", type=int, help="source tokens per row (BART: 256)")
    parser.add_argument("--tokens", type=int, help="tokens per row (default: 80, WebNLG's mean; BART's target 40)")
    parser.add_argument("--preseqlen", type=int, help="prefix length (default: 5; BART 200)")
    parser.add_argument("--mid_dim", type=int, help="width of the reparametrisation (default: 512; BART 800)")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of every row")
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="default: results/benchmark_train-step_SHAPE_DEVICE.json")
    args = parser.parse_args(argv)
    for name, value in zip(SETTINGS[1:], DEFAULTS["bart" if is_bart(args) else "gpt2"], strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.what == "memory-of":
        step, _ = make_step(args, args.rows[0])
        for _ in range(3):
            step()
        print(json.dumps(record.peak_memory_bytes()))
        return 0
    table = train_step(args)
    output = args.output or REPOSITORY / "results" / f"benchmark_train-step_{args.shape}_{args.device}.json"
    settings = {name: getattr(args, name) for name in (*SETTINGS, "rounds")}
    run = {"device": record.device_name(), **record.versions()}
    files.write_json(output, {"settings": settings, "run": run, "rows": table})
    print(as_table(table, args.rows[0]))
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
