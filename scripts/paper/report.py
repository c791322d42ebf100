"""The files of an experiment of reproduce.py: results/NAME.json, the table in Markdown, the plots."""

import itertools
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paper.experiments import Column, Experiment, Row
from paper.real_model import shown
from paper.training_runs import Run, RunFailed, read_json
from prefixlib.system import files

Entries = dict[str, dict[str, Any]]  # a run's name -> its entry


def entry_of(run: Run, with_curves: bool) -> dict[str, Any]:
    """The entry of a finished run: settings, scores, cost, device, versions."""
    found = run.results()
    training, about = found["training"], found.get("run", {})
    test = found["decoding"]["test"] if run.row.decoded else {"scores": {}, "seconds": None}
    versions = {name: value for name, value in about.items() if name in VERSIONS}
    entry = {
        "row": run.row.key,
        "seed": run.seed,
        **({"sample": run.sample} if run.sample else {}),
        "recipe": run.recipe(),
        "checkpoint": "best" if (run.folder / "best").is_dir() and run.row.best else "last",
        "scores": test["scores"],
        "train_seconds": training["seconds"],
        "decode_seconds": test["seconds"],
        "steps": training["steps"],
        "trained_parameters": training["trainable_parameters"],
        "stored_parameters": training.get("stored_parameters"),
        "device": about.get("device"),
        "versions": versions,
    }
    if run.settings.own_base:
        entry |= {"base_model": shown(run.settings.gpt2_model), "peak_memory_bytes": training.get("peak_memory_bytes")}
        entry["test_sources"] = test.get("sentences")
    if with_curves or run.settings.own_base:
        entry["dev_loss"] = dev_curve(run, found)
    if not run.row.decoded:
        entry["scores"] = {"dev loss": min(loss for _, loss in entry["dev_loss"])}
    return entry


VERSIONS = (
    "python", "torch", "transformers", "accelerate", "lightning", "datasets", "safetensors",
    "sacrebleu", "rouge-score", "commit",
)  # fmt: skip


def dev_curve(run: Run, found: Mapping[str, Any]) -> list[tuple[int, float]]:
    """(step, dev loss) of every evaluation during the training."""
    if run.row.tree == "seq2seq":
        return found["training"]["curves"]["dev"]
    state = read_json(run.folder / "trainer_state.json")
    return [(point["step"], point["eval_loss"]) for point in state.get("log_history", ()) if "eval_loss" in point]


def collect(experiment: Experiment, runs: Iterable[Run], selected: set[str], path: Path) -> Entries:
    """The entries of all finished runs: from their folders, else from an earlier `path`.

    An earlier result of a selected row counts only if it was made by the same recipe.
    """
    earlier = read_results(path)["runs"] if path.is_file() else {}
    entries: Entries = {}
    for run in runs:
        try:
            if run.is_done():
                entries[run.name] = entry_of(run, experiment.plot == "loss")
                continue
        except (RunFailed, KeyError):  # reported when the run is made
            pass
        before = earlier.pop(run.name, None)
        if before and (run.row.key not in selected or before["recipe"] == run.recipe()):
            entries[run.name] = before
    keys = {row.key for row in experiment.rows}
    entries |= {name: entry for name, entry in earlier.items() if name not in entries and entry["row"] in keys}
    return entries


def read_results(path: Path) -> dict[str, Any]:
    """A results/NAME.json. Raises RunFailed for a broken one."""
    found = read_json(path)
    runs = found.get("runs")
    whole = isinstance(runs, dict) and all(
        isinstance(entry, dict) and {"row", "recipe", "scores"} <= entry.keys() for entry in runs.values()
    )
    if not whole:
        raise RunFailed(f"{path} is not a file that reproduce.py wrote; move it away")
    return found


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (None of a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def of_row(entries: Entries, row: Row) -> list[dict[str, Any]]:
    return [entry for entry in entries.values() if entry["row"] == row.key]


def values_of(entries: Sequence[Mapping[str, Any]], column: Column) -> list[float]:
    scores = (entry["scores"].get(column.score) for entry in entries)
    return [score for score in scores if score is not None]


def as_markdown(experiment: Experiment, entries: Entries, command: str, caption: str = "") -> str:
    """The table: the paper's line (marked as quoted) above ours, "not run" where there is no run."""
    lines = [f"### {experiment.title}", ""]
    for text in (caption, experiment.note):
        lines += [text, ""] if text else []
    for group, columns in experiment.columns.items():
        rows = [row for row in experiment.rows if row.group == group]
        if not rows:
            continue
        lines.append(table_line([group, *(column.heading for column in columns), "trained numbers", "runs"]))
        lines.append("|---" * (len(columns) + 3) + "|")
        for row in rows:
            lines += _row_lines(row, columns, of_row(entries, row))
        lines.append("")
    return "\n".join([*lines, _footer(entries, command)]) + "\n"


def table_line(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def _row_lines(row: Row, columns: Sequence[Column], entries: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for numbers, where in ((row.paper, ""), (row.dev, "dev set, ")):
        if numbers:
            pairs = itertools.zip_longest(columns, numbers[: len(columns)])
            quoted = ["—" if number is None else f"{number:.{column.digits}f}" for column, number in pairs]
            lines.append(table_line([f"{row.name} ({row.source}, {where}quoted)", *quoted, "", ""]))
    if not entries:
        return [*lines, table_line([f"{row.name}, here", "not run", *[""] * (len(columns) - 1), "", "0"])]
    cells = []
    for column in columns:
        values = values_of(entries, column)
        mean, sd = mean_and_sd(values) if values else (None, None)
        text = "n/a" if mean is None else f"{mean:.{column.digits}f}"
        cells.append(text if sd is None else f"{text} ± {sd:.{column.digits}f}")
    trained = sorted({entry["trained_parameters"] for entry in entries})
    return [*lines, table_line([f"{row.name}, here", *cells, " / ".join(f"{n:,}" for n in trained), str(len(entries))])]


def _footer(entries: Entries, command: str) -> str:
    made = f"Made by `{command}`; ± is the standard deviation over the runs."
    devices = sorted({str(entry.get("device")) for entry in entries.values()})
    commits = sorted({str(entry.get("versions", {}).get("commit")) for entry in entries.values()})
    return f"{made} Device: {', '.join(devices)}. Code: {', '.join(commits)}." if entries else made


# ---- plots -------------------------------------------------------------------------------------------------------


def draw(experiment: Experiment, entries: Entries, stem: Path) -> list[Path]:
    """The experiment's plots, one PNG for each part that has runs; returns their paths."""
    drawn = []
    for group, columns in experiment.columns.items():
        rows = [row for row in experiment.rows if row.group == group and of_row(entries, row)]
        if not rows or not experiment.plot:
            continue
        path = stem.with_name(f"{stem.name}_{group}.png")
        if experiment.plot == "loss":
            _plot_losses(group, rows, entries, path)
        else:
            _plot_scores(experiment, rows, columns, entries, path)
        drawn.append(path)
    return drawn


def _new_figure(panels: int):
    import matplotlib  # here: a dry run need not pay for it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    across = min(panels, 3)
    down = -(-panels // across)
    figure, axes = pyplot.subplots(down, across, figsize=(4.2 * across + 1, 3.2 * down), dpi=120, squeeze=False)
    for spare in axes.flat[panels:]:
        spare.set_axis_off()
    return figure, list(axes.flat[:panels])


def _save(figure, title: str, path: Path) -> None:
    from matplotlib import pyplot

    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial.png")
    figure.savefig(partial)
    partial.replace(path)
    pyplot.close(figure)


def _plot_scores(experiment: Experiment, rows, columns, entries: Entries, path: Path) -> None:
    """Mean score with its standard deviation against the row's x, a panel per metric; quoted numbers dashed."""
    known = [n for n, column in enumerate(columns) if any(values_of(of_row(entries, row), column) for row in rows)]
    figure, panels = _new_figure(max(1, len(known)))
    for index, axes in zip(known, panels, strict=False):  # a metric that is n/a in every run gets no panel
        column = columns[index]
        for label in dict.fromkeys(row.curve[0] for row in rows):
            points, quoted = [], []
            for row in (row for row in rows if row.curve[0] == label):
                values = values_of(of_row(entries, row), column)
                if values:
                    points.append((row.curve[1], *mean_and_sd(values)))
                if len(row.paper) > index and row.paper[index] is not None:
                    quoted.append((row.curve[1], row.paper[index]))
            if points:
                xs, means, sds = zip(*points, strict=True)
                axes.errorbar(xs, means, yerr=[sd or 0 for sd in sds], marker="o", markersize=4, capsize=3, label=label)
            if quoted:
                axes.plot(*zip(*quoted, strict=True), "--", color="grey", label=f"{label} ({rows[0].source}, quoted)")
        if experiment.name == "lowdata":
            axes.set_xscale("log")
            ticks = sorted({row.curve[1] for row in rows})
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        axes.set(xlabel=experiment.xlabel, ylabel=column.heading)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    _save(figure, f"{rows[0].group}: mean ± standard deviation over the runs", path)


def _plot_losses(group: str, rows: Sequence[Row], entries: Entries, path: Path) -> None:
    """Dev loss against the step, averaged over the runs of a row at the steps they share."""
    figure, (axes,) = _new_figure(1)
    figure.set_size_inches(7, 4.5)
    for row in rows:
        curves = [dict(map(tuple, entry.get("dev_loss") or ())) for entry in of_row(entries, row)]
        steps = sorted(set.intersection(*map(set, curves)))
        if steps:
            means = [statistics.fmean(curve[step] for curve in curves) for step in steps]
            axes.plot(steps, means, marker="o" if len(steps) <= 20 else None, markersize=3, label=row.name)
    axes.set(xlabel="step", ylabel="dev loss")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    _save(figure, f"{group}: initialisations of the prefix", path)


# ---- files -------------------------------------------------------------------------------------------------------


def write(experiment: Experiment, entries: Entries, stem: Path, command: str, caption: str) -> list[Path]:
    """STEM.json, STEM.md and the plots; each replaces the old file only when it is whole."""
    found = {"experiment": experiment.name, "command": command, "caption": caption}
    found |= {"own": dict(experiment.own)} if experiment.own else {}
    found["runs"] = entries
    files.write_json(stem.with_name(f"{stem.name}.json"), json.loads(json.dumps(found)))
    files.write_text(stem.with_name(f"{stem.name}.md"), as_markdown(experiment, entries, command, caption))
    return [stem.with_name(f"{stem.name}.md"), *draw(experiment, entries, stem)]
