"""Markdown of one benchmark's rows, and of the target figures from all stored results."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixlib.system.errors import UserError

# key in a row -> column, and the value's format
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "seconds": ("seconds", lambda value: f"{value:.3g}"),
    "training_seconds": ("training, s", lambda value: f"{value:,.0f}"),
    "decoding_seconds": ("decoding, s", lambda value: f"{value:,.0f}"),
    "operations": ("GFLOP", lambda value: f"{value / 1e9:,.3g}"),
    "operations_per_second": ("GFLOP/s", lambda value: f"{value / 1e9:,.0f}"),
    "bytes_per_second": ("GB/s", lambda value: f"{value / 1e9:.1f}"),
    "share": ("share of the product's rate", lambda value: f"{value:.2f}"),
    "memory_share": ("share of the memory's", lambda value: f"{value:.2f}"),
    "tokens_per_second": ("tokens/s", lambda value: f"{value:,.0f}"),
    "sentences_per_second": ("sentences/s", lambda value: f"{value:.3g}"),
    "time_ratio": ("time: prefix / row", lambda value: f"{value:.2f}"),
    "speed_ratio": ("sentences/s: prefix / row", lambda value: f"{value:.2f}"),
    "sentences_that_differ": ("sentences that differ", str),
    "peak_memory_bytes": ("peak memory, MiB", lambda value: f"{value / 2**20:,.0f}"),
    "memory_ratio": ("memory: prefix / row", lambda value: f"{value:.2f}"),
    "own_memory_bytes": ("without libraries, MiB", lambda value: f"{value / 2**20:,.0f}"),
    "not_run": ("not run", str),
    "own_memory_ratio": ("without: prefix / row", lambda value: f"{value:.2f}"),
}


def as_markdown(result: Mapping) -> str:
    """The rows of one result; scaling's points one line each."""
    if result["what"] == "scaling":
        return _sweeps(result["rows"])
    rows = result["rows"]
    used = [name for name in COLUMNS if any(name in numbers for numbers in rows.values())]
    lines = ["| row | " + " | ".join(COLUMNS[name][0] for name in used) + " |", "|---" * (len(used) + 1) + "|"]
    for row, numbers in rows.items():
        cells = [COLUMNS[name][1](numbers[name]) if name in numbers else "" for name in used]
        lines.append(f"| {result['labels'].get(row, row)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _sweeps(sweeps: Mapping) -> str:
    lines = ["| sweep | value | row | numbers |", "|---|---|---|---|"]
    for name, sweep in sweeps.items():
        for value, table in sweep["points"].items():
            for row, numbers in table.items():
                shown = ", ".join(f"{kind} {number:.3g}" for kind, number in numbers.items())
                lines.append(f"| {name} | {value} | {row} | {shown} |")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Figure:
    """A target figure, and its place in the stored results."""

    text: str
    what: str
    shape: str
    row: str
    number: str
    devices: str = "cpu cuda"
    over: str = ""  # divide this row's value by that of another row

    def value(self, rows: Mapping[str, Mapping]) -> float | None:
        if any(self.number not in rows.get(row, {}) for row in filter(None, (self.row, self.over))):
            return None
        value = rows[self.row][self.number]
        return value / rows[self.over][self.number] if self.over else value


USUAL_BSZ = 5  # the default of --bsz
STEP = "step, B 5, T 80, P 5: time / "
FIGURES = (
    Figure("gpt2-small " + STEP + "PEFT prefix with MLP", "train-step", "gpt2-small", "peft", "time_ratio"),
    Figure("gpt2-small " + STEP + "full fine-tuning", "train-step", "gpt2-small", "finetune", "time_ratio"),
    Figure(
        "WebNLG epoch on real lengths, bsz 5: time / PEFT with the stock Trainer",
        *("epoch", "gpt2-small", "peft", "time_ratio"),
    ),
    Figure(
        "bart-base step, B 5, S 256, T 40, P 200, mid 800: time / original-style",
        *("train-step", "bart-base", "original-style", "time_ratio"),
    ),
    Figure("the same / full fine-tuning", "train-step", "bart-base", "finetune", "time_ratio"),
    Figure(
        "XSum batches of real lengths, bart-base, bsz 5: time / original-style",
        *("epoch", "bart-base", "original-style", "time_ratio"),
    ),
    Figure("the same / full fine-tuning", "epoch", "bart-base", "finetune", "time_ratio"),
    *(
        Figure(f"{text} / {peer}", what, "bart-base", row, "time_ratio")
        for text, what in (("bart-base step: time", "train-step"), ("XSum batches of real lengths: time", "epoch"))
        for peer, row in (("PEFT prefix, decoder's self-attention alone", "peft"), ("PEFT LoRA", "lora"))
    ),
    Figure(
        "bart-base step, B 2: time / original-style",
        *("train-step", "bart-base-bsz2", "original-style", "time_ratio"),
    ),
    *(
        Figure(f"{shape} step with activation checkpointing: time / without", *place, "seconds", over="prefix")
        for shape in ("gpt2-small", "bart-base")
        for place in [("train-step", shape, "checkpointing")]
    ),
    Figure(
        "decode, 5 beams, WebNLG dev prompts: sentences/s / PEFT `generate`, same batch",
        *("decode", "gpt2-small", "peft", "speed_ratio"),
    ),
    Figure("the same / one sentence at a time", "decode", "gpt2-small", "original-style", "speed_ratio"),
    Figure(
        "seq2seq decode, 6 beams, XSum lengths, P 200: documents/s / original-style",
        *("decode", "bart-base", "original-style", "speed_ratio"),
    ),
    *(
        Figure(text, "memory", shape, row, number, over=over)
        for shape in ("gpt2-small", "gpt2-medium", "bart-base")
        for text, row, number, over in (
            (f"peak training memory, {shape} / full fine-tuning", "finetune", "memory_ratio", ""),
            ("the same, with activation checkpointing", "checkpointing", "peak_memory_bytes", "finetune"),
            ("the same, without what the libraries take", "checkpointing", "own_memory_bytes", "finetune"),
        )
    ),
    Figure("peak training memory, bart-base / PEFT prefix", "memory", "bart-base", "peft", "memory_ratio"),
    *(
        Figure(f"{script} --help, seconds", "startup", "", f"{script} --help", "seconds")
        for script in ("gpt2/train_e2e.py", "seq2seq/train_bart.py", "gpt2/gen.py")
    ),
    *(
        Figure(f"{script}: first training step of the demo, seconds", "startup", "", f"{script}, first step", "seconds")
        for script in ("gpt2/train_e2e.py", "seq2seq/train_bart.py")
    ),
    *(
        Figure(f"{count} prefixes, 64 sentences: {text}", "mixed", "gpt2-small", f"{peer}-{count}", number, over=over)
        for count in (8, 64)
        for text, peer, number in (
            ("sentences/s / PEFT prefixes, one after the other", "peft", "seconds"),
            ("sentences/s / PEFT LoRA, `adapter_names=`", "lora", "seconds"),
            ("memory of PEFT LoRA, `adapter_names=` / memory", "lora", "own_memory_bytes"),
        )
        for over in [f"mixed-{count}"]
    ),
    Figure("WebNLG recipe, gpt2-medium, seconds", "recipe", "gpt2-medium", "prefix", "seconds"),
    Figure(
        "bart-large decode, P 200, XSum lengths, bf16: documents/s / original-style",
        *("decode", "bart-large-bf16", "original-style", "speed_ratio"),
        devices="cuda",
    ),
)


@dataclass(frozen=True)
class Goal(Figure):
    """A figure with the value that is required, and the one that is hoped for."""

    least: str = ""
    reach: str = ""


def _share(row: str, least: str, reach: str) -> Goal:
    return Goal(f"{row}: share of the matrix product's rate", "limit", "", row, "share", least=least, reach=reach)


def _over(text: str, what: str, shape: str, row: str, other: str, least: str, reach: str) -> Goal:
    number = "peak_memory_bytes" if what == "memory" else "seconds"
    return Goal(text, what, shape, row, number, over=other, least=least, reach=reach)


_CT2 = "the same decode: time / CTranslate2 {}, without a prefix"
_GENERATE = "decode, {}, 6 beams: time / transformers `generate` of the fine-tuned model, same batch"
_GREEDY = "greedy decode, batch 1: tokens/s / transformers `generate`"
_ACCUMULATED = "peak training memory, bart-large, P 200, B 16 in 16 parts{} / full fine-tuning"
GOALS = (
    _share("gpt2-small step, B 5, T 80, P 5", "0.80", "0.88"),
    _share("llama-135m step, B 10, T 57 (E2E's mean), P 5", "0.72", "0.80"),
    _share("bart-base step, B 5, XSum's lengths, P 200", "reported", "0.75"),
    _share("gpt2-small decode, 5 beams", "0.45", "0.60"),
    _over(_CT2.format("float32"), "engines", "gpt2-small", "prefix", "ct2", "0.55", "0.45"),
    _over(_CT2.format("int8"), "engines", "gpt2-small", "prefix", "ct2-int8", "reported", "1.0"),
    _over(
        "the same decode in bfloat16: time / CTranslate2 int8, without a prefix",
        *("engines", "gpt2-small", "bf16", "ct2-int8", "reported", "1.0"),
    ),
    *(
        _over(_GENERATE.format(shape), "engines", shape, "prefix", "finetune", "0.5", "0.3")
        for shape in ("t5-small", "bart-base")
    ),
    *(
        Goal(_GREEDY + cache, "greedy", "gpt2-small", row, "speed_ratio", least="1.5", reach="3")
        for row, cache in (("finetune", ""), ("finetune-static", ", static cache"))
    ),
    _over("8 prefixes in one batch: time / one prefix", "mixed", "gpt2-small", "mixed-8", "prefix", "1.1", "1.02"),
    Goal(
        "start of decoding a checkpoint, gpt2-small shape, launch to first output, seconds",
        *("startup", "", "gpt2/gen.py, first output", "seconds"),
        least="6",
        reach="4",
    ),
    Goal(
        "BLEU, METEOR and TER of WebNLG's test set, one core, seconds",
        *("scores", "", "BLEU + METEOR + TER", "seconds"),
        least="30",
        reach="12",
    ),
    *(
        _over(_ACCUMULATED.format(how), "memory", "bart-large-accumulated", row, "finetune", "0.45", "0.35")
        for row, how in (("prefix", ""), ("checkpointing", ", activation checkpointing"))
    ),
)
WHOLE = ("limit", "engines", "greedy", "mixed")  # measurements of which the page shows all rows


def goals(folder: Path) -> str:
    """Every goal with its stored value in `folder`, a column per kind of device, or "not run"."""
    # reversed: if both are stored, float32 replaces bfloat16
    found = [{device: rest for device, *rest in reversed([*_stored(folder, goal)])} for goal in GOALS]
    devices = sorted({device for stored in found for device in stored}) or ["now"]
    columns = ["figure", *devices, "at least", "reach for", "made by `benchmark.py` with"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for goal, stored in zip(GOALS, found, strict=True):
        now = [f"{stored[device][0]:.2f}" if device in stored else "not run" for device in devices]
        command = next((_command(result) for _, result in stored.values()), "")
        lines.append("| " + " | ".join([goal.text, *now, goal.least, goal.reach, command]) + " |")
    return "\n".join(lines) + "\n"


def whole(folder: Path) -> str:
    """All rows of the results in `folder` of the kinds WHOLE, in a table each."""
    found = []
    for what in WHOLE:
        for path in sorted(folder.glob(f"benchmark_{what}_*.json")):
            result = json.loads(path.read_text(encoding="utf-8"))
            names = [name for name in ("rounds", "sentences") if name in result["settings"]]
            sizes = "".join(f", {name}: {result['settings'][name]}" for name in names)
            found.append(f"{_command(result)}, {_where(result)}{sizes}:\n\n{as_markdown(result)}")
    return "\n".join(found)


def _stored(folder: Path, figure: Figure) -> Iterator[tuple[str, float, dict]]:
    """The kind of device, the figure's value and the result, of every result that has it."""
    name = "_".join(filter(None, ("benchmark", figure.what, figure.shape)))
    for path in (path for bf16 in ("", "-bf16") for path in sorted(folder.glob(f"{name}{bf16}_*.json"))):
        device = path.stem.rpartition("_")[2]
        result = json.loads(path.read_text(encoding="utf-8"))
        value = figure.value(result["rows"])
        if value is not None and device.partition("-")[0] in figure.devices.split():
            yield device, value, result


def _where(result: Mapping) -> str:
    run = result["run"]
    return run["device"] + (f", {run['threads']} threads" if run["device"].startswith("cpu") else "")


def figures(folder: Path) -> str:
    """Every figure for which a result is stored, in order, and its command: a table per machine."""
    if not any(folder.glob("benchmark_*.json")):
        raise UserError(f"{folder}: no benchmark_*.json there")
    tables: dict[str, list[str]] = {}
    for figure in FIGURES:
        for _, value, result in _stored(folder, figure):
            line = f"| {figure.text} | {value:.2f} | {_command(result)} |"
            tables.setdefault(_where(result), []).append(line)
    head = "| figure | measured | made by `benchmark.py` with |\n|---|---|---|\n"
    return "\n".join(f"On {where}:\n\n{head}" + "\n".join(lines) + "\n" for where, lines in tables.items())


def _command(result: Mapping) -> str:
    """The command line of a result; other sizes are in its file."""
    settings = result["settings"]
    shape = f" --shape {settings['shape']}" if settings.get("shape") and result["what"] != "startup" else ""
    bsz = f" --bsz {settings['bsz']}" if settings.get("bsz", USUAL_BSZ) != USUAL_BSZ else ""
    bsz += f" --accumulate {settings['accumulate']}" if settings.get("accumulate", 1) > 1 else ""
    bf16 = " --bf16" if settings["bf16"] else ""
    return f"`{result['what']}{shape}{bsz}{bf16}`"


PARTS = {"figures": figures, "goals": goals, "rows": whole}  # of results/README.md
