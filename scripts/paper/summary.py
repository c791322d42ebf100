"""The runs on a base model of the user's choice, short, as README.md shows them (scripts/reproduce.py summary)."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paper import real_model, report
from paper.experiments import Column, Experiment, Row
from paper.training_runs import read_json

TITLES = {
    "lowdata": "Low data, E2E (paper: section 6.3, Figure 3)",
    "unseen": "Categories seen and unseen in training, WebNLG (Table 1)",
    "init": "Start of the prefix, E2E, BLEU (section 7.4)",
    "length": "Prefix length, E2E, BLEU (Figure 4)",
    "placement": "Place of the trained vectors, E2E, BLEU (section 7.2)",
}
PIVOT = ("BLEU", "ROUGE-L", "loss")  # of low data, for each method
SHOWN = {"unseen": ("BLEU seen", "BLEU unseen", "BLEU all", "METEOR all", "TER all")}


def summary(folder: Path) -> str:
    """Markdown: a table or a line for each experiment that has a run in `folder`, with a link to its own page."""
    parts, lines = [], []
    for name, title in TITLES.items():
        for path in sorted(folder.glob(f"{name}_*.json")):
            found = read_json(path)
            if "own" not in found or not found["runs"]:
                continue
            experiment = real_model.rebuild(name, found["own"])
            sizes = {row.size for row in experiment.rows}
            size = f", {sizes.pop():,} training examples" if len(sizes) == 1 else ""
            link = f"[{title}](results/{path.stem}.md), {found['own']['name']}{size}"
            if name == "lowdata":
                parts.append(f"{link}:\n\n{_methods(experiment, found['runs'])}")
            elif name in SHOWN:
                parts.append(f"{link}:\n\n{_rows(experiment, found['runs'], SHOWN[name])}")
            else:
                lines.append(f"* {link}: {_line(experiment, found['runs'])}.")
    lines += [_beside_peft(path) for path in sorted(folder.glob("compare_peft_*.json"))]
    return "\n\n".join([*parts, "\n".join(lines)] if lines else parts) + "\n"


def _beside_peft(path: Path) -> str:
    """The result of scripts/compare_peft.py, in a line."""
    found = read_json(path)
    ours, peft = found["parts"].values()
    memory = [part["peak_memory_bytes"].get("gpu") or part["peak_memory_bytes"]["host"] for part in (ours, peft)]
    sizes = [
        f"{statistics.median(part['seconds']):.2f} s a step and {taken / 1e9:.1f} GB"
        for part, taken in zip((ours, peft), memory, strict=True)
    ]
    apart = f"losses within {found['largest_relative_difference']:.0e} over {len(ours['losses'])} steps"
    link = f"[The same prefix through PEFT](results/{path.stem}.md), {ours['base_model']['name']}"
    return f"* {link}: {apart}; {sizes[0]} here, {sizes[1]} there."


def _mean(runs: Mapping[str, Any], row: Row, column: Column) -> str:
    values = report.values_of(report.of_row(runs, row), column)
    return f"{report.mean_and_sd(values)[0]:.{column.digits}f}" if values else "not run"


def _columns(experiment: Experiment, wanted: Sequence[str]) -> list[Column]:
    (columns,) = experiment.columns.values()
    return [next(column for column in columns if column.heading == name) for name in wanted]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(map(report.table_line, (head, ["---"] * len(head), *rows)))


def _methods(experiment: Experiment, runs: Mapping[str, Any]) -> str:
    """A line for each number of examples, with a column per method."""
    rows = {row.curve: row for row in experiment.rows}
    methods = list(dict.fromkeys(method for method, _ in rows))
    columns = _columns(experiment, PIVOT)
    lines = []
    for size in dict.fromkeys(size for _, size in rows):
        cells = [_mean(runs, rows[method, size], column) for column in columns for method in methods]
        counts = {len(report.of_row(runs, rows[method, size])) for method in methods}
        lines.append([str(size), *cells, " / ".join(map(str, sorted(counts)))])
    head = ["examples", *(f"{column.heading} {method}" for column in columns for method in methods), "draws"]
    return _table(head, lines)


def _rows(experiment: Experiment, runs: Mapping[str, Any], wanted: Sequence[str]) -> str:
    columns, lines = _columns(experiment, wanted), []
    for row in experiment.rows:
        entries = report.of_row(runs, row)
        counts = [f"{entries[0][f'{kind}_parameters']:,}" if entries else "not run" for kind in ("trained", "stored")]
        lines.append([row.name.split(" (")[0], *counts, *(_mean(runs, row, column) for column in columns)])
    return _table(["method", "trained numbers", "stored numbers", *wanted], lines)


def _line(experiment: Experiment, runs: Mapping[str, Any]) -> str:
    (column,) = _columns(experiment, ("BLEU",))
    own = f" ({experiment.own['name']})"
    return ", ".join(f"{row.name.removesuffix(own)}: {_mean(runs, row, column)}" for row in experiment.rows)
