"""Run the paper's experiments with the launchers a user would run, and write their tables.

python scripts/reproduce.py table1                       # GPT-2 medium on E2E, WebNLG, DART; --size large
python scripts/reproduce.py table1 --rows "e2e-*" --seeds 1
python scripts/reproduce.py lowdata --demo yes           # the bundled models, minutes on a CPU
python scripts/reproduce.py rates --size smollm2 --test_sources 200   # a small real model; then lowdata, unseen, ...
python scripts/reproduce.py tables                       # print the tables of all stored results
python scripts/reproduce.py summary                      # the results on a base model of your own, into README.md

table1: GPT-2 fine-tuned, top-2 layers, adapters, prefix. table2: BART-large on XSum. xsum: the paper's flags for it and
those of the original README. extrapolation: XSum news to sports and within news, WebNLG's unseen categories. lowdata:
50 to 500 examples. length, embedding-only, infix, init: the ablations. With --size smollm2 or --model_name_or_path:
rates (first: it chooses the others' learning rates), lowdata, unseen (WebNLG), init, length, placement.

Finished runs are not repeated, interrupted ones are resumed, and a run whose recipe has changed is made anew (the old
one is kept beside it). Each table is results/NAME.json, .md and, for figures, .png.
"""

import argparse
import fnmatch
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from page_parts import replace_part
from paper import decoded_examples, real_model, report, summary
from paper.experiments import EXPERIMENTS, ONE_SIZE, Experiment, Row, build
from paper.training_runs import Run, RunFailed, Settings, read_json, runs_of
from prefixlib.settings.flags import Parser, add_number, add_yes_no
from prefixlib.system.errors import UserError, one_line_errors
from prefixlib.system.places import REPOSITORY

SIZES = ("medium", "large")  # the paper's
NAMES = tuple(dict.fromkeys((*EXPERIMENTS, *real_model.EXPERIMENTS, "tables", "summary")))
PASSED_ON = ("max_steps", "bf16", "gradient_checkpointing", "num_processes")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command line -> settings. Raises UserError for flags that make no sense."""
    parser = Parser(description=__doc__)
    parser.add_argument("experiment", choices=NAMES, help="which one (`tables` and `summary` run nothing)")
    which = parser.add_argument_group("which runs")
    which.add_argument(
        "--size",
        choices=(*SIZES, *real_model.SIZES),
        default="medium",
        help="of GPT-2 (default: medium), or a small base model of another kind: see --model_name_or_path",
    )
    which.add_argument(
        "--model_name_or_path",
        help="a decoder-only base model of your own (hub name, folder, FILE.gguf) instead of the paper's: tables with "
        f"its name for {', '.join(real_model.EXPERIMENTS)}, sized for small machines",
    )
    add_number(which, "--budget_examples", above=0, help="own base model: training examples of unseen, length, ...")
    add_number(which, "--test_sources", above=0, help="own base model: decode only the first N test inputs")
    which.add_argument("--rows", nargs="+", metavar="ROW", help="only these, e.g. e2e-prefix or 'webnlg-*'")
    add_number(which, "--seeds", above=0, help="runs of each row (default: 3; low data, as the paper, 2 for each set)")
    add_number(which, "--samples", above=0, help="low data: sets sampled of each size (default: 5, as the paper)")
    add_yes_no(
        which,
        "--demo",
        "no",
        "on the bundled models and data, 1 seed and 2 low-data sets unless --seeds, --samples say otherwise",
    )
    where = parser.add_argument_group("where things are")
    where.add_argument("--runs_dir", type=Path, help="checkpoints go to RUNS_DIR/TABLE/RUN (default: runs/reproduce)")
    where.add_argument("--output_dir", type=Path, help="tables and plots (default: results; demo: RUNS_DIR/results)")
    where.add_argument("--data_dir", type=Path, help="folder with e2e_data/, xsum/, ... (default: data)")
    where.add_argument("--gpt2_model", help="hub name or folder (default: gpt2-medium or gpt2-large, by --size)")
    where.add_argument("--bart_model", help="hub name or folder (default: bart-large)")
    how = parser.add_argument_group("passed on to every training")
    add_number(how, "--max_steps", above=0, help="stop each training after this many steps: a trial, not a result")
    add_yes_no(how, "--bf16", None, "bfloat16 arithmetic (default: no; own base model: if it is fast here)")
    add_yes_no(how, "--gradient_checkpointing", "no", "recompute activations: less memory, more time")
    add_number(how, "--num_processes", above=0, help="processes per training, one per GPU")
    parser.add_argument("--dry_run", action="store_true", help="print every command and stop")
    add_yes_no(how, "--keep_weights", "yes", "own base model; `no` removes a run's weights once it is decoded")
    args = parser.parse_args(argv)
    _check_base(args)
    if args.demo == "yes":
        for name in ("data_dir", "gpt2_model", "bart_model"):
            if getattr(args, name) is not None:
                raise UserError(f"--demo yes and --{name} do not go together: the demo brings its own model and data")
        if args.size != "medium":
            raise UserError(f"--demo yes and --size {args.size} do not go together: the demo has one GPT-2")
    return args


def _check_base(args: argparse.Namespace) -> None:
    """Fill in the base model that --size names. Raises UserError for flags that do not fit it."""
    if args.size in real_model.SIZES:
        if args.model_name_or_path:
            raise UserError(f"--size {args.size} and --model_name_or_path do not go together: both name a base model")
        args.model_name_or_path = real_model.SIZES[args.size]
    own = args.model_name_or_path is not None
    if args.experiment in ("tables", "summary"):
        return
    if own and args.experiment not in real_model.EXPERIMENTS:
        known = ", ".join(real_model.EXPERIMENTS)
        raise UserError(f"{args.experiment} has no rows for a base model of your own; one of {known}")
    if not own and args.experiment not in EXPERIMENTS:
        raise UserError(
            f"{args.experiment} is for a base model of your own: pass --size smollm2 or --model_name_or_path"
        )
    others = ("gpt2_model", "bart_model", "demo") if own else ("budget_examples", "test_sources", "keep_weights")
    for name in others:
        if getattr(args, name) not in (None, {"demo": "no", "keep_weights": "yes"}.get(name)):
            first = "--model_name_or_path (or --size)" if own else f"--size {args.size}"
            raise UserError(f"{first} and --{name} do not go together: a base model of your own is not the paper's")
    if own and args.bf16 is None:
        args.bf16 = real_model.precision()
    if args.budget_examples and args.experiment not in real_model.BUDGETS:
        raise UserError(f"--budget_examples: {args.experiment} has training sets of fixed sizes")


def make_settings(args: argparse.Namespace) -> Settings:
    """The settings that all runs share."""
    given = {name: getattr(args, name) for name in PASSED_ON if getattr(args, name) not in (None, "no")}
    own = args.model_name_or_path
    runs_dir = (args.runs_dir or REPOSITORY / "runs" / "reproduce").expanduser().resolve()
    return Settings(
        runs_dir,
        args.data_dir and args.data_dir.expanduser().resolve(),
        _local(own or args.gpt2_model) or f"gpt2-{args.size}",
        _local(args.bart_model) or "bart-large",
        args.demo == "yes",
        own is not None,
        args.keep_weights == "yes",
        given,
    )


def _local(model: str | None) -> str | None:
    """A model folder's full path, as runs start from the repository's root; a hub name unchanged."""
    return str(Path(model).expanduser().resolve()) if model and Path(model).expanduser().exists() else model


def label_of(args: argparse.Namespace) -> str:
    """The ending of an experiment's folder and files if its settings are not the paper's own."""
    if args.model_name_or_path:
        label = "_" + re.sub(r"[^\w.-]+", "-", Path(args.model_name_or_path).name)
        for letter, number in (("n", args.budget_examples), ("t", args.test_sources), ("max", args.max_steps)):
            label += f"_{letter}{number}" if number else ""
        return label
    large = "_large" if args.size == "large" else ""
    demo = "_demo" if args.demo == "yes" else ""
    return large + demo + (f"_max{args.max_steps}" if args.max_steps else "")


def choose_rows(experiment: Experiment, patterns: Sequence[str] | None) -> list[Row]:
    """The rows in --rows, else all but those on request. Raises UserError for a pattern that matches none."""
    rows = experiment.rows
    if patterns is None:
        return [row for row in rows if not row.on_request]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(row.key, pattern) for row in rows):
            raise UserError(f"--rows {pattern}: {experiment.name} has {', '.join(row.key for row in rows)}")
    return [row for row in rows if any(fnmatch.fnmatchcase(row.key, pattern) for pattern in patterns)]


def all_runs(experiment: Experiment, args: argparse.Namespace) -> list[Run]:
    """The runs of every row; first one of each row, then the second of each, ..."""
    demo = args.demo == "yes"
    seeds = args.seeds or (1 if demo else experiment.seeds)
    samples = args.samples or (2 if demo else experiment.samples)
    settings, label = make_settings(args), label_of(args)
    rounds: list[tuple[int, Run]] = []
    for row in experiment.rows:
        rounds += enumerate(runs_of(experiment, row, settings, label, seeds, samples))
    return [run for _, run in sorted(rounds, key=lambda pair: pair[0])]


def print_commands(runs: Sequence[Run]) -> None:
    """Print every command, with missing files in a comment."""
    for run in runs:
        missing = run.missing()
        print(f"# {run.row.group}: {run.row.name}, seed {run.seed}" + (f"  (now: {missing})" if missing else ""))
        for words in run.steps():
            print("python " + shlex.join(words))


def carry_out(runs: Sequence[Run], write) -> list[str]:
    """Make every run that is not done, writing the table after each; returns one line for each that failed."""
    failures: dict[str, str] = {}
    for number, run in enumerate(runs, start=1):
        place = f"# {number} of {len(runs)}: {run.folder.parent.name}/{run.name}"
        try:
            if run.is_done():
                print(f"{place} is done", flush=True)
                continue
            print(place, flush=True)
            run.execute()
        except RunFailed as error:
            failures.setdefault(str(error), run.name)  # a missing file is reported once, not for every seed
            print(f"# {run.name}: {error}", file=sys.stderr, flush=True)
        write()
    return [f"{name}: {reason}" for reason, name in failures.items()]


def paper_size(args: argparse.Namespace) -> str:
    return "demo" if args.demo == "yes" else args.size


def results_stem(args: argparse.Namespace, name: str) -> Path:
    """The path of experiment `name`'s results under this command line, without an ending."""
    runs_dir = args.runs_dir or REPOSITORY / "runs" / "reproduce"
    default = runs_dir / "results" if args.demo == "yes" else REPOSITORY / "results"
    return (args.output_dir or default).expanduser().resolve() / (name + label_of(args))


def own_base(args: argparse.Namespace) -> real_model.Base:
    """The base model of the user's choice, with the rates that `rates` has chosen so far."""
    name = args.model_name_or_path
    shape = real_model.shape_of(name)
    searched = argparse.Namespace(**{**vars(args), "budget_examples": None})
    stem = results_stem(searched, "rates")
    path = stem.with_name(f"{stem.name}.json")  # not with_suffix: the model's name may contain a dot
    found = report.read_results(path)["runs"] if path.is_file() else {}
    rates = real_model.chosen_rates(found)
    return real_model.Base(real_model.shown(name), shape, args.budget_examples, args.test_sources, rates, args.bf16)


def build_own(args: argparse.Namespace) -> Experiment:
    return real_model.build(args.experiment, own_base(args))


def reproduce(args: argparse.Namespace) -> int:
    """Run one experiment and write its table."""
    experiment = build_own(args) if args.model_name_or_path else build(args.experiment, paper_size(args))
    keys = {row.key for row in choose_rows(experiment, args.rows)}
    everything = all_runs(experiment, args)
    runs = [run for run in everything if run.row.key in keys]
    if args.dry_run:
        print_commands(runs)
        return 0
    settings, stem = runs[0].settings, results_stem(args, experiment.name)
    command = "python scripts/reproduce.py " + shlex.join(_shown(args))
    caption = (
        "The bundled demo models and data: nothing here compares with the paper's numbers." if settings.demo else ""
    )
    if args.model_name_or_path:
        caption = real_model.caption(own_base(args))
    if args.max_steps:
        caption += f" Every training was cut at {args.max_steps} steps: a trial of the commands, not a result."

    def write() -> list[Path]:
        entries = report.collect(experiment, everything, keys, stem.with_name(f"{stem.name}.json"))
        written = report.write(experiment, entries, stem, command, caption.strip())
        shown = decoded_examples.write(experiment.title, everything, stem) if settings.own_base else None
        return [*written, shown] if shown else written

    if settings.own_base:
        from prefixlib.base_model import gguf_base

        gguf_base.find(settings.gpt2_model)  # a missing file or package is reported once, not by every run
    write()  # before hours of training, to find a broken file or a full disk
    failures = carry_out(runs, write)
    written = write()
    print(written[0].read_text(encoding="utf-8"))
    print("# written: " + ", ".join(map(str, written)))
    for line in failures:
        print(f"error: {line}", file=sys.stderr)
    return 1 if failures else 0


def _shown(args: argparse.Namespace) -> list[str]:
    """The command line of a table, without the folders of this machine."""
    words = [args.experiment]
    if args.model_name_or_path and args.size not in real_model.SIZES:
        words += ["--model_name_or_path", real_model.shown(args.model_name_or_path)]
    for name in ("size", "budget_examples", "test_sources", "seeds", "samples", "demo", *PASSED_ON):
        if getattr(args, name) not in (None, "no", "medium"):
            words += [f"--{name}", str(getattr(args, name))]
    return words


def print_tables(folder: Path) -> int:
    """The Markdown of every experiment: from its results if there are any, else with "not run" in every row."""
    for name in EXPERIMENTS:
        for size in SIZES[:1] if name in ONE_SIZE else SIZES:
            experiment = build(name, size)
            path = folder / f"{name}{'' if size == 'medium' else '_large'}.json"
            if not path.is_file() and size == "large" and name != "table1":
                continue
            found = report.read_results(path) if path.is_file() else {"runs": {}}
            command = found.get("command") or f"python scripts/reproduce.py {name}" + " --size large" * (
                size == "large"
            )
            print(report.as_markdown(experiment, found["runs"], command, found.get("caption", "")))
    for path in sorted(folder.glob("*.json")):
        found = read_json(path)
        if "own" in found:  # tables with a base model of the user's choice
            experiment = real_model.rebuild(found["experiment"], found["own"])
            runs = report.read_results(path)["runs"]
            print(report.as_markdown(experiment, runs, found["command"], found["caption"]))
    return 0


def write_summary(folder: Path) -> int:
    """Print the summary, and write it into the README.md beside the folder of results."""
    text = summary.summary(folder)
    print(text)
    if (folder.parent / "README.md").is_file():
        replace_part(folder.parent / "README.md", "results", text)
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        results = (args.output_dir or REPOSITORY / "results").expanduser()
        if args.experiment == "tables":
            return print_tables(results)
        if args.experiment == "summary":
            return write_summary(results)
        if args.demo == "yes":
            os.environ.setdefault("OMP_NUM_THREADS", "1")  # a second thread slows down such small models
        return reproduce(args)
    except RunFailed as error:
        raise UserError(str(error)) from None


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
