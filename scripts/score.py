"""Score system outputs with the paper's metrics, as the official scorers compute them.

python scripts/score.py e2e --hypotheses OUTPUT --references GOLD
python scripts/score.py webnlg --hypotheses OUTPUT --split test --bootstrap 1000
python scripts/score.py xsum --compare A B --references test.target
"""

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prefixlib.settings.flags import Parser, add_number
from prefixlib.system.errors import UserError, one_line_errors
from prefixlib.system.files import check_can_write, write_json

TASKS = ("e2e", "webnlg", "dart", "xsum", "cnn_dm", "classify-sentiment", "classify-topic", "text")
MODES = ("data2text", "triples", "cnndm")  # the data modes' names for e2e, dart and cnn_dm
COMPARE_SAMPLES = 1000
FEW_SAMPLES = 100  # with fewer, the bounds of a 95 % interval are one or two resamples
log = logging.getLogger("score")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line -> flags; combinations that make no sense are refused by name."""
    parser = Parser(description=__doc__)
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
        "several files: line i of each for output i, empty if there is none",
    )
    gold.add_argument("--split", choices=("valid", "test"), help="the task's own file (WebNLG's names the categories)")
    gold.add_argument("--data_dir", metavar="DIR", help="with --split: folder of the data sets (default: data/)")
    gold.add_argument("--categories", metavar="FILE", help="with --references, WebNLG: one category per line")
    how = parser.add_argument_group("what to compute")
    how.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help="only these of the task's metrics (default: all); one that is not available here is refused",
    )
    add_number(
        how, "--bootstrap", below=10**6, default=0, metavar="N", help="95%% intervals from N resamples; 1000 or more"
    )
    add_number(how, "--seed", default=0, help="seed of the resampling (default 0)")
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
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: expected 0 or more")
    if args.categories and args.task != "webnlg":
        raise UserError(f"--categories {args.categories}: goes with webnlg only, whose figures are split by category")
    if args.output:
        check_can_write(args.output, "--output")
    return args


@dataclass(frozen=True)
class Outputs:
    """One file of outputs with their references, equally many."""

    path: str
    hypotheses: list[str]
    references: list[list[str]]
    categories: list[str] | None

    def counts(self) -> dict[str, int]:
        """The numbers of outputs, of empty outputs, and of inputs without a reference."""
        bare = sum(not any(text.strip() for text in texts) for texts in self.references)
        empty = sum(not line for line in self.hypotheses)
        return {"count": len(self.hypotheses), "empty": empty, "without_references": bare}


def read_objects(path: str, names: Sequence[str]) -> list:
    """The first of the values `names` in every line of a .jsonl file, as mode text writes and reads them."""
    rows = []
    with open(path, encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                rows.append(next(row[name] for name in names if name in row))
            except (ValueError, TypeError, StopIteration):
                raise UserError(f"{path}:{number}: expected an object with {' or '.join(names)}") from None
    return rows


def read_gold(args: argparse.Namespace, hypotheses: int) -> tuple[list[list[str]], list[str] | None]:
    """References of each hypothesis, and the categories if they are known."""
    from prefixlib.metrics.files import read_lines, read_references

    if args.references and args.references[0].endswith(".jsonl"):
        if len(args.references) > 1:
            raise UserError("--references: one .jsonl file holds all references of an input, as a list")
        found = read_objects(args.references[0], ("references", "target"))
        return [texts if isinstance(texts, list) else [texts] for texts in found], None
    if args.references:
        categories = read_lines(args.categories, "--categories") if args.categories else None
        return read_references(args.references, hypotheses), categories
    from prefixlib.data.tasks import data_file, read_groups
    from prefixlib.metrics.tasks import find_task

    mode = find_task(args.task).mode
    groups = read_groups(mode, data_file(mode, args.split, args.data_dir))
    return [list(group.references) for group in groups], [group.category for group in groups]


def read_outputs(args: argparse.Namespace, path: str) -> Outputs:
    """A file of outputs with its references. Raises UserError if the numbers of lines differ."""
    from prefixlib.metrics.files import blank_end, read_lines

    flag = "--hypotheses" if args.hypotheses else "--compare"
    hypotheses = read_objects(path, ("output",)) if path.endswith(".jsonl") else read_lines(path, flag)
    references, categories = read_gold(args, len(hypotheses))
    if len(hypotheses) != len(references):
        gold = " ".join(args.references) if args.references else f"--split {args.split}"
        inputs = f"{len(references)} inputs"
        if args.references and len(references) == 1:  # perhaps a reference per line, and a blank line too many
            inputs = f"1 group of references{blank_end(read_lines(args.references[0], '--references'))}"
        outputs = f"{len(hypotheses)} hypotheses{blank_end(hypotheses)}"
        raise UserError(f"{path} has {outputs} but {gold} has {inputs}: one line per input")
    if args.categories:
        check_categories(args.categories, categories, len(hypotheses))
    return Outputs(path, hypotheses, references, categories)


def check_categories(path: str, categories: Sequence[str], hypotheses: int) -> None:
    """Raise UserError for another number of categories than hypotheses, or for one that WebNLG 2017 does not have."""
    from prefixlib.metrics.files import blank_end
    from prefixlib.metrics.tasks import SEEN_CATEGORIES, UNSEEN_CATEGORIES

    if len(categories) != hypotheses:
        raise UserError(
            f"{hypotheses} hypotheses but --categories {path} has {len(categories)} lines{blank_end(categories)}: "
            "one category per hypothesis"
        )
    for number, category in enumerate(categories, start=1):
        if category not in SEEN_CATEGORIES | UNSEEN_CATEGORIES:
            seen, unseen = (", ".join(sorted(names)) for names in (SEEN_CATEGORIES, UNSEEN_CATEGORIES))
            raise UserError(f"{path}:{number}: category {category!r} is unknown; seen: {seen}; unseen: {unseen}")


def measure(args: argparse.Namespace, outputs: Outputs):
    """The task's figures of one file of outputs. Raises UserError if one of --metrics is not available here."""
    from prefixlib.data.tasks import training_categories
    from prefixlib.metrics import tasks

    has_file = args.split and any(outputs.categories)
    seen = training_categories(tasks.find_task(args.task).mode, args.data_dir) if has_file else None
    how = {"seen_categories": seen or None, "metrics": args.metrics}
    found = tasks.measure(args.task, outputs.hypotheses, outputs.references, outputs.categories, **how)
    for figure in found if args.metrics else ():
        if figure.rows is None:
            name = figure.metric.name
            raise UserError(f"--metrics {name!r}: not available here; to have it: {figure.unavailable}")
    return found


def table(rows: list[list[str]]) -> str:
    """Rows of cells as aligned text columns, the first one flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )


def digits(figure) -> str:
    """Two decimals on a scale to 100, four on the others: two more than the papers print."""
    return ".2f" if figure.metric.span == "0-100" else ".4f"


def score_one(args: argparse.Namespace) -> tuple[dict, str]:
    """Scores of --hypotheses: (for the JSON, as a table)."""
    from prefixlib.metrics.bootstrap import interval

    outputs = read_outputs(args, args.hypotheses)
    figures = measure(args, outputs)
    result = {"task": args.task, "hypotheses": args.hypotheses, **outputs.counts(), "scores": {}}
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
    return result, table(rows) + "\n" + notes(args, figures, [outputs])


def compare(args: argparse.Namespace) -> tuple[dict, str]:
    """Scores of both files of --compare and a paired test per metric: (for the JSON, as a table)."""
    from prefixlib.metrics.bootstrap import paired

    both = [read_outputs(args, path) for path in args.compare]  # faults of B are reported before A is scored
    measured = [measure(args, outputs) for outputs in both]
    samples = args.bootstrap or COMPARE_SAMPLES
    result = {"task": args.task, "compare": args.compare, "samples": samples, "scores": {}}
    rows = [["metric", "A", "B", "B - A", "95% interval", "p"]]
    for a, b in zip(*measured, strict=True):
        test, form = paired(a, b, samples, args.seed), digits(a)
        result["scores"][a.name] = {"A": a.score(), "B": b.score(), **(test or {})}
        if test is None:
            rows.append([a.name, "n/a", "n/a", "", "", ""])
            continue
        bounds = f"{test['low']:{form}} to {test['high']:{form}}"
        values = [format(value, form) for value in (a.score(), b.score(), test["difference"])]
        rows.append([a.name, *values, bounds, f"{test['p']:.4f}"])
    return result, table(rows) + "\n" + notes(args, measured[0], both)


def notes(args: argparse.Namespace, figures, files: Sequence[Outputs]) -> str:
    """The lines under the table: counts, unavailable metrics with the reason, scales."""
    from prefixlib.metrics.tasks import find_task

    lines = []
    for outputs in files:
        counts = outputs.counts()
        empty = f", {counts['empty']} of them empty (scored as empty)" if counts["empty"] else ""
        lines.append(f"{outputs.path}: {counts['count']} hypotheses{empty}")
    bare = files[0].counts()["without_references"]
    if bare:
        lines.append(f"{bare} of the inputs have no reference (scored against an empty one)")
    missing = {figure.metric.name: figure.unavailable for figure in figures if figure.rows is None}
    lines += [f"{name} n/a; to have it: {reason}" for name, reason in missing.items()]
    spans = {figure.metric.name: figure.metric.span for figure in figures if figure.rows is not None}
    if spans:
        lines.append("scales: " + "; ".join(f"{name} {span}" for name, span in spans.items()))
    if find_task(args.task).note:
        lines.append(find_task(args.task).note)
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Print the table, then the same figures as one line of JSON; --output gets the JSON too."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("prefixlib.metrics.tasks").setLevel(logging.ERROR)  # see `notes`
    if 0 < args.bootstrap < FEW_SAMPLES:
        log.warning("--bootstrap %d is too few for 95 %% intervals: 1000 or more", args.bootstrap)
    result, text = compare(args) if args.compare else score_one(args)
    print(text)
    print(json.dumps(result, ensure_ascii=False))
    if args.output:
        write_json(Path(args.output), result)


if __name__ == "__main__":
    with one_line_errors():
        main()
