"""Decoded examples of a table's runs, each next to its input and a reference: NAME_examples.md, for reproduce.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paper.training_runs import Run
from prefixlib.system import files

COUNT = 20  # inputs shown


@dataclass(frozen=True)
class Decoded:
    """One run's outputs for the test inputs, in their order."""

    name: str  # the row's
    outputs: list[str]
    references: list[str]  # each input's first reference
    sources: list[str]


def read(run: Run) -> Decoded | None:
    """The outputs of a run; None if it has not been decoded, or its folder does not exist."""
    found = sorted(run.folder.glob("*_test_beam"))
    if not found:
        return None
    stem = str(found[0]).removesuffix("_beam")
    outputs, sources = (Path(f"{stem}_{kind}").read_text(encoding="utf-8").splitlines() for kind in ("beam", "src"))
    blocks = Path(f"{stem}_gold").read_text(encoding="utf-8").split("\n\n")
    return Decoded(run.row.name, outputs, [block.split("\n")[0] for block in blocks], sources)


def as_markdown(title: str, decoded: Sequence[Decoded], count: int = COUNT) -> str:
    """`count` of the test inputs, evenly spaced, with every run's output below the reference."""
    first = decoded[0]
    total = min(len(one.outputs) for one in decoded)
    shown = [n * total // min(count, total) for n in range(min(count, total))]
    lines = [f"### Decoded examples. {title}", "", f"{len(shown)} of {total} test inputs, evenly spaced."]
    for n in shown:
        lines += ["", f"**{_plain(first.sources[n].rsplit('<|', 1)[0])}**", "", "| | |", "|---|---|"]
        lines.append(f"| reference | {_plain(first.references[n])} |")
        lines += [f"| {one.name} | {_plain(one.outputs[n])} |" for one in decoded]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """The text without the characters that a Markdown table interprets."""
    return text.strip().replace("|", "\\|")


def write(title: str, runs: Sequence[Run], stem: Path) -> Path | None:
    """Write STEM_examples.md from the first decoded run of each row; without any, write nothing and return None."""
    firsts = {}
    for run in runs:
        decoded = None if run.row.key in firsts else read(run)
        if decoded:
            firsts[run.row.key] = decoded
    if not firsts:
        return None
    path = stem.with_name(f"{stem.name}_examples.md")
    files.write_text(path, as_markdown(title, list(firsts.values())))
    return path
