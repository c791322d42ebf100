"""Speed and memory, side by side with its peers: python scripts/benchmark.py WHAT --shape SHAPE

train-step  one optimiser step                      memory   its peak memory, a process for each row
epoch       batches of real lengths, real loops     decode   beam search to real lengths, sentences per second
startup     --help, first step, first output        scaling  curves against P, T, batch, beams and processes
recipe      the WebNLG recipe's sizes on a GPU      limit    steps and decoding as a share of the machine's rates
engines     decode beside bfloat16 and CTranslate2; encoder-decoders: transformers' generate of a fine-tuned model
greedy      one sentence at a time beside transformers' generate
mixed       many prefixes in one batch              scores   BLEU, METEOR and TER of WebNLG, on one core
table       figures and goals, into results/README.md
plan        the cost on an H100, by arithmetic alone, into results/README.md
record-lengths  token lengths of a data file, for data/lengths/

Random weights of the model's shape. Rows take turns, round by round, so that a machine's drift affects all of them;
ratios are medians over the rounds. Rows of the same method must have equal losses and tokens, else there is no ratio.
Peers need `pip install -e .[peers]`. Results go to results/benchmark_WHAT_SHAPE_DEVICE.json, where DEVICE is cuda or,
by the processor's instructions, cpu-avx2, cpu-avx512 and so on.
"""

if __name__ == "__main__":
    from prefixlib.system import startup

    startup.begin()

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path

import torch
from transformers.utils import logging

from benchmarks import decode, engines, epoch, lengths, limit, mixed, plan, scaling, startup, steps, tables
from benchmarks.models import GROUPED, LIBRARIES, ROWS, SETTINGS, SHAPES, fill_defaults, import_peft, is_seq2seq, label
from page_parts import replace_part
from prefixlib.runs import record
from prefixlib.settings.flags import Parser, add_number
from prefixlib.system import files
from prefixlib.system.errors import UserError, one_line_errors
from prefixlib.system.places import REPOSITORY

PEERS = tuple(row for row in ROWS if row not in ("prefix", GROUPED))
ENGINES = tuple(row for row in engines.DECODERS if row != "plain")
VS = {
    "mixed": "peft,lora",
    "engines": "bf16,ct2,ct2-int8",
    "greedy": "bf16,finetune,finetune-static",
}  # default of --vs, if not all peers
MEASURE = {  # what -> function that returns the rows
    "train-step": steps.train_step,
    "memory": steps.memory,
    "epoch": epoch.epoch,
    "decode": decode.decode,
    "startup": startup.startup,
    "scores": startup.scores,
    "scaling": scaling.scaling,
    "limit": limit.limit,
    "mixed": mixed.mixed,
    "engines": engines.engines,
    "greedy": engines.engines,
    "recipe": epoch.recipe,
}
SHAPELESS = ("startup", "scores", "limit")


def make_parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("what", choices=(*MEASURE, "table", "plan", "record-lengths"), metavar="WHAT")
    which = parser.add_argument_group("what is compared")
    which.add_argument("--shape", choices=tuple(SHAPES), help="(default: gpt2-small; scaling gpt2-mini)")
    which.add_argument(
        "--vs",
        help=f"rows beside prefix, by commas (default: {','.join(PEERS)}; mixed peft,lora; engines, greedy: of "
        f"{','.join(ENGINES)})",
    )
    cuda = torch.cuda.is_available()
    which.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    which.add_argument("--bf16", action="store_true", help="the base model's weights in bfloat16, in every row")
    add_number(which, "--rounds", above=0, help="timed turns of every row (default: 7)")
    add_number(which, "--seed", low=0, default=101, help="seed of the sampled lengths and ids")
    sizes = parser.add_argument_group("sizes")
    add_number(sizes, "--bsz", above=0, help="rows of a training batch (default: 5)")
    add_number(sizes, "--accumulate", above=0, default=1, help="train-step, memory: parts of a batch (default: 1)")
    add_number(sizes, "--source", above=0, help="source tokens per row (BART: 256)")
    add_number(sizes, "--tokens", above=0, help="tokens per row (default: 80, WebNLG's mean; BART's target 40)")
    add_number(sizes, "--preseqlen", above=0, help="prefix length (default: 5; BART 200)")
    add_number(sizes, "--mid_dim", above=0, help="width of the reparametrisation (default: 512; BART 800)")
    add_number(sizes, "--batches", above=0, help="epoch: training batches (default: 8; recipe 3605)")
    add_number(sizes, "--sentences", above=0, help="decode: sentences (default: 32; BART 12; scaling 16; recipe 1862)")
    add_number(sizes, "--batch_size", above=0, help="decode: sentences together (default: 32; BART 12)")
    add_number(sizes, "--beams", above=0, help="decode: beams (default: 5; BART 6)")
    add_number(sizes, "--max_new_tokens", above=0, help="decode: longest output (default: 100; BART 62; scaling 50)")
    add_number(sizes, "--alone", low=0, help="decode: sentences for rows of one at a time (default: 6; BART 3; 0 all)")
    add_number(sizes, "--allow_ties", low=0, help="decode: sentences that may differ (default: 0; --bf16 all)")
    add_number(sizes, "--points", above=0, help="scaling: at most so many points of a curve (default: all)")
    sizes.add_argument("--sweeps", help=f"scaling: only these, of {','.join(scaling.SWEEPS)}")
    many = {"nargs": "+", "default": mixed.COUNTS}
    add_number(sizes, "--prefixes", above=0, **many, help="mixed: how many at once (default: 1 8 64)")
    sizes.add_argument("--tiny", action="store_true", help="limit: shapes of two layers, to try it")
    sizes.add_argument("--no_memory", action="store_true", help="scaling: time alone")
    group = parser.add_argument_group("lengths")
    group.add_argument("--lengths", help=f"of {', '.join(lengths.SETS)} (decode: webnlg_dev, xsum_test)")
    group.add_argument("--lengths_from", type=Path, help="read them from this data file instead")
    group.add_argument("--tokenizer", type=Path, help="folder of the real vocabulary, for --lengths_from")
    parser.add_argument(
        "--output", type=Path, help="the JSON file; record-lengths, table, plan: file or folder of results"
    )
    return parser


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse, check, and fill in the defaults that depend on the shape and the measurement."""
    args = make_parser().parse_args(argv)
    args.shape = args.shape or ("gpt2-mini" if args.what == "scaling" else "gpt2-small")
    if args.vs is None:
        args.vs = "finetune" if args.what == "engines" and is_seq2seq(args) else VS.get(args.what, ",".join(PEERS))
    possible = ENGINES if args.what in ("engines", "greedy") else PEERS
    unknown = [row for row in filter(None, args.vs.split(",")) if row not in possible]
    if unknown:
        raise UserError(f"--vs {unknown[0]}: choose from {', '.join(possible)}")
    args.rows = ["prefix", *dict.fromkeys(filter(None, args.vs.split(",")))]
    leave_out_missing(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU here")
    if needs_peft(args):
        import_peft()
    args.rounds = args.rounds or 7
    own_sizes = {
        "recipe": epoch.RECIPE_SIZES,
        "scaling": scaling.SIZES,
        "mixed": mixed.SIZES,
        "greedy": engines.GREEDY,
    }.get(args.what, {})
    for name, value in own_sizes.items():
        setattr(args, name, getattr(args, name) or value)
    args.batches = args.batches or 8
    args.train_lengths = args.lengths or ("xsum_train" if is_seq2seq(args) else "webnlg_train")
    if args.what != "limit":  # its rows differ in shape
        fill_defaults(args)
        decode.fill_defaults(args)
        if args.bsz % args.accumulate:
            raise UserError(f"--accumulate {args.accumulate}: must divide --bsz {args.bsz}")
    return args


def leave_out_missing(args: argparse.Namespace) -> None:
    """Remove rows whose library or processor instructions are missing here, and report them as not run."""
    args.not_run = {}
    for row in args.rows if args.what in ("mixed", "engines", "greedy") else ():
        library = LIBRARIES.get(row)
        if library and not importlib.util.find_spec(library):
            args.not_run[row] = f"{library} is not installed"
            print(f"{row}: not run, {library} is not installed: pip install -e .[peers]", file=sys.stderr)
        elif row == "bf16" and args.device == "cpu" and not record.has_fast_bfloat16():
            args.not_run[row] = "this processor has no instructions for bfloat16"
            print(f"{row}: not run, {args.not_run[row]}", file=sys.stderr)
    args.rows = [row for row in args.rows if row not in args.not_run]


def needs_peft(args: argparse.Namespace) -> bool:
    return args.what in ("train-step", "memory", "epoch", "decode", "scaling") and bool({"peft", "lora"} & {*args.rows})


def settings_of(args: argparse.Namespace) -> dict:
    """The settings that affect the results."""
    names = {
        "epoch": (*SETTINGS, "batches", "train_lengths", "seed"),
        "decode": ("preseqlen", "mid_dim", *decode.SETTINGS, "seed"),
        "recipe": (*SETTINGS, "batches", "train_lengths", *decode.SETTINGS, "seed"),
        "startup": (),
        "scores": (),
        "limit": ("tiny", "seed"),
        **dict.fromkeys(("engines", "greedy"), ("preseqlen", "mid_dim", *decode.SETTINGS, "seed")),
        "mixed": ("preseqlen", *decode.SETTINGS, "prefixes", "seed"),
        "scaling": (*SETTINGS, *decode.SETTINGS, "points", "seed"),
    }.get(args.what, (*SETTINGS, "accumulate"))
    given = {"lengths_from": args.lengths_from.name} if args.lengths_from else {}
    shape = () if args.what in SHAPELESS else ("shape",)
    return {name: getattr(args, name) for name in (*shape, "bf16", "rounds", *names)} | given


def run_of(args: argparse.Namespace) -> dict:
    """The machine of the results."""
    versions = record.versions()
    libraries = {LIBRARIES[row] for row in args.rows if row in LIBRARIES} if args.what not in SHAPELESS else ()
    versions |= {library: importlib.metadata.version(library) for library in sorted(libraries)}
    cpu = f"cpu ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores)"
    device = torch.cuda.get_device_name() if args.device == "cuda" else cpu
    return {"device": device, "threads": torch.get_num_threads(), **versions}


def kind_of_device(args: argparse.Namespace) -> str:
    """The end of a result's file name: cuda, or the processor's instructions, such as cpu-avx2."""
    kind = torch.backends.cpu.get_cpu_capability().lower()
    return "cuda" if args.device == "cuda" else "cpu-" + kind.replace(" ", "-").replace("_", "-")


def name_of(args: argparse.Namespace) -> str:
    """The file name of the result, without its ending."""
    what = args.what + ("-tiny" if args.tiny else "")
    batch = "-accumulated" if args.accumulate > 1 else ""
    if not batch and args.what in ("train-step", "memory", "epoch") and args.bsz != tables.USUAL_BSZ:
        batch = f"-bsz{args.bsz}"
    shape = [] if args.what in SHAPELESS else [args.shape + batch]
    return "_".join(["benchmark", what, *shape]) + ("-bf16" if args.bf16 else "") + f"_{kind_of_device(args)}"


def measure(args: argparse.Namespace) -> int:
    """Measure, write the JSON, print the table."""
    output = (args.output or REPOSITORY / "results" / f"{name_of(args)}.json").expanduser().resolve()
    files.check_can_write(output, "--output")
    args.plots = output.with_suffix("")
    rows = MEASURE[args.what](args) | {row: {"not_run": why} for row, why in args.not_run.items()}
    labels = {row: label_of(args, row) for row in rows}
    result = {"what": args.what, "settings": settings_of(args), "run": run_of(args), "labels": labels, "rows": rows}
    files.write_json(output, result)
    print(tables.as_markdown(result))
    return 0


def label_of(args: argparse.Namespace, row: str) -> str:
    """A row's name in a table."""
    if args.what == "mixed":
        return mixed.label(row)
    return engines.LABELS.get(row, row) if args.what in ("engines", "greedy") else label(args, row)


def record_lengths(args: argparse.Namespace) -> int:
    """Write the histogram of --lengths NAME from --lengths_from FILE."""
    if args.lengths not in lengths.SETS or not args.tokenizer:
        raise UserError(f"record-lengths needs --lengths, of {', '.join(lengths.SETS)}, and --tokenizer DIR")
    source = args.lengths_from or lengths.default_file(args.lengths)
    histogram = lengths.record_lengths(args.lengths, source.expanduser(), args.tokenizer)
    output = args.output or lengths.RECORDED / f"{args.lengths}.json"
    lengths.write_histogram(output, histogram)
    print(f"{output}: {histogram['texts']} texts in {len(histogram['bins'])} bins")
    return 0


def write_parts(folder: Path, parts: dict[str, str]) -> int:
    """Print parts of the page of results, and write them into folder/README.md if there is one."""
    print("\n".join(parts.values()))
    page = folder / "README.md"
    for name, text in parts.items() if page.is_file() else ():
        replace_part(page, name, text)
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.set_verbosity_error()  # the peers' hints on flags
    logging.disable_progress_bar()
    folder = args.output or REPOSITORY / "results"
    if args.what == "table":
        return write_parts(folder, {name: make(folder) for name, make in tables.PARTS.items()})
    if args.what == "plan":
        return write_parts(folder, {"plan": plan.table()})
    return record_lengths(args) if args.what == "record-lengths" else measure(args)


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
