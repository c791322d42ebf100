"""Score system outputs with the paper's metrics, as the official scorers compute them.

python scripts/score.py e2e --hypotheses OUTPUT --references GOLD
python scripts/score.py webnlg --hypotheses OUTPUT --split test --bootstrap 1000
python scripts/score.py xsum --compare A B --references test.target
"""

import argparse
import json
import logging
from pathlib import Path

from prefixlib.errors import UserError, one_line_errors

TASKS = ("e2e", "webnlg", "dart", "xsum", "cnn_dm", "classify-sentiment", "classify-topic")
MODES = ("data2text", "triples", "cnndm")  # the data modes' names for e2e, dart and cnn_dm
COMPARE_SAMPLES = 1000


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line -> flags; combinations that make no sense are refused by name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS + MODES, help="whose metrics to compute")
    outputs = parser.add_argument_group("system outputs, one per line in the order of the inputs (one of the two)")
    outputs.add_argument("--hypotheses", metavar="FILE", help="the outputs to score")
    outputs.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two systems' outputs; adds a paired test")
    gold = parser.add_argument_group("references (one of the two)")
    gold.add_argument(
        "--references",
        nargs="+",
        metavar="FILE",
        help="one file: a reference per line, or groups of lines each ended by a blank line (the *_gold files); "
        "several files: line i of each for output i, empty where there is none",
    )
    gold.add_argument("--split", choices=("valid", "test"), help="the task's own file (WebNLG's brings its categories)")
    gold.add_argument("--data_dir", metavar="DIR", help="with --split: folder of the data sets (default: data/)")
    gold.add_argument("--categories", metavar="FILE", help="with --references, WebNLG: one category per line")
    how = parser.add_argument_group("what to compute")
    how.add_argument("--metrics", nargs="+", metavar="NAME", help="only these of the task's metrics (default: all)")
    how.add_argument("--bootstrap", type=int, default=0, metavar="N", help="95%% intervals from N resamples; try 1000")
    how.add_argument("--seed", type=int, default=0, help="of the resampling (default 0)")
    how.add_argument("--output", metavar="FILE", help="also write the JSON here")
    args = parser.parse_args(argv)
    for one, other in (("hypotheses", "compare"), ("references", "split")):
        if (getattr(args, one) is None) == (getattr(args, other) is None):
            raise UserError(f"give either --{one} or --{other}")
    for flag, needs in (("data_dir", "split"), ("categories", "references")):
        if getattr(args, flag) is not None and getattr(args, needs) is None:
            raise UserError(f"--{flag} {getattr(args, flag)}: goes with --{needs} only")
    if args.bootstrap < 0:
        raise UserError(f"--bootstrap {args.bootstrap}: expected 0 (none) or the number of resamples")
    return args


def read_gold(args: argparse.Namespace, hypotheses: int) -> tuple[list[list[str]], list[str] | None]:
    """References of each hypothesis, and the categories where they are known."""
    from prefixlib.metrics.files import read_lines, read_references

    if args.references:
        categories = read_lines(args.categories, "--categories") if args.categories else None
        return read_references(args.references, hypotheses), categories
    from prefixlib.metrics.tasks import find_task
    from prefixlib.readers import data_file, read_groups

    mode = find_task(args.task).mode
    groups = read_groups(mode, data_file(mode, args.split, args.data_dir))
    return [list(group.references) for group in groups], [group.category for group in groups]


def measure_file(args: argparse.Namespace, path: str):
    """(figures, number of hypotheses, number of empty ones) of one file of outputs."""
    from prefixlib.metrics.files import read_lines
    from prefixlib.metrics.tasks import measure

    hypotheses = read_lines(path, "--hypotheses" if args.hypotheses else "--compare")
    references, categories = read_gold(args, len(hypotheses))
    if len(hypotheses) != len(references):
        gold = " ".join(args.references) if args.references else f"--split {args.split}"
        raise UserError(
            f"{path} has {len(hypotheses)} hypotheses but {gold} has {len(references)} inputs: one line per input"
        )
    figures = measure(args.task, hypotheses, references, categories, metrics=args.metrics)
    return figures, len(hypotheses), sum(not line for line in hypotheses)


def table(rows: list[list[str]]) -> str:
    """Rows of cells as aligned text columns, the first one flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )


def digits(figure) -> str:
    """Format with four significant decimals on a unit scale, two on a percent scale, as the papers print them."""
    return ".2f" if figure.metric.scale == 100 or figure.metric.name == "BLEU" else ".4f"


def score_one(args: argparse.Namespace) -> tuple[dict, str]:
    """Scores of --hypotheses: (for the JSON, as a table)."""
    from prefixlib.metrics.bootstrap import interval

    figures, count, empty = measure_file(args, args.hypotheses)
    result = {"task": args.task, "hypotheses": args.hypotheses, "count": count, "empty": empty, "scores": {}}
    rows = [["metric", "score"] + (["95% interval"] if args.bootstrap else [])]
    for figure in figures:
        value, form = figure.score(), digits(figure)
        result["scores"][figure.name] = value
        row = [figure.name, "n/a" if value is None else format(value, form)]
        if args.bootstrap:
            bounds = interval(figure, args.bootstrap, args.seed)
            result.setdefault("intervals", {})[figure.name] = bounds
            row.append("" if bounds is None else f"{bounds[0]:{form}} to {bounds[1]:{form}}")
        rows.append(row)
    return result, table(rows) + "\n" + notes(args, figures, {args.hypotheses: (count, empty)})


def compare(args: argparse.Namespace) -> tuple[dict, str]:
    """Scores of both files of --compare and a paired test per metric: (for the JSON, as a table)."""
    from prefixlib.metrics.bootstrap import paired

    measured = [measure_file(args, path) for path in args.compare]
    samples = args.bootstrap or COMPARE_SAMPLES
    result = {"task": args.task, "compare": args.compare, "samples": samples, "scores": {}}
    rows = [["metric", "A", "B", "B - A", "95% interval", "p"]]
    for a, b in zip(measured[0][0], measured[1][0], strict=True):
        test, form = paired(a, b, samples, args.seed), digits(a)
        result["scores"][a.name] = {"A": a.score(), "B": b.score(), **(test or {})}
        if test is None:
            rows.append([a.name, "n/a", "n/a", "", "", ""])
            continue
        bounds = f"{test['low']:{form}} to {test['high']:{form}}"
        values = [format(value, form) for value in (a.score(), b.score(), test["difference"])]
        rows.append([a.name, *values, bounds, f"{test['p']:.4f}"])
    counts = {path: each[1:] for path, each in zip(args.compare, measured, strict=True)}
    return result, table(rows) + "\n" + notes(args, measured[0][0], counts)


def notes(args: argparse.Namespace, figures, counts: dict[str, tuple[int, int]]) -> str:
    """What stands under the table: counts, what is not available and why, what the figures are."""
    from prefixlib.metrics.tasks import find_task

    lines = [
        f"{path}: {count} hypotheses" + (f", {empty} of them empty (scored as empty)" if empty else "")
        for path, (count, empty) in counts.items()
    ]
    missing = {figure.metric.name: figure.unavailable for figure in figures if figure.rows is None}
    lines += [f"{name} n/a; to have it: {reason}" for name, reason in missing.items()]
    if find_task(args.task).note:
        lines.append(find_task(args.task).note)
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Print the table, then the same figures as one line of JSON; --output gets the JSON too."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(message)s")
    result, text = compare(args) if args.compare else score_one(args)
    print(text)
    print(json.dumps(result, ensure_ascii=False))
    if args.output:
        from prefixlib.files import write_json

        write_json(Path(args.output), result)


if __name__ == "__main__":
    with one_line_errors():
        main()
