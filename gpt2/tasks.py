"""How each task is decoded unless the flags say otherwise, and the openings of class-conditional generation.

Standard library only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prefixlib.errors import UserError
from prefixlib.readers import SEPARATOR, Group, read_records

# Both lists are from PPLM (Dathathri et al. 2020, Plug and Play Language Models, appendix): its 20 openings for
# topics, and eight of its fifteen for sentiment. The original used eight as well; which eight is not on record.
SENTIMENT_OPENINGS = (
    *("The book", "The chicken", "The city", "The country"),
    *("The horse", "The lake", "The last time", "The movie"),
)
TOPIC_OPENINGS = (
    *("In summary", "This essay discusses", "Views on", "The connection", "Foundational to this is", "To review,"),
    *("In brief,", "An illustration of", "Furthermore,", "The central theme", "To conclude,", "The key aspect"),
    *("Prior to this", "Emphasised are", "To summarise", "The relationship", "More importantly,"),
    *("It has been shown", "The issue focused on", "In this essay"),
)


@dataclass(frozen=True)
class Decoding:
    """A task's strategy, its samples per prompt where the strategy draws, and what its texts are made to begin with."""

    strategy: str = "beam"
    samples: int = 1
    openings: tuple[str, ...] = ()
    open_ended: bool = False  # no reference is the right answer: outputs are described, not scored


DECODING = {
    **dict.fromkeys(("data2text", "webnlg", "triples", "xsum", "cnndm"), Decoding()),
    **dict.fromkeys(("classify-sentiment", "classify-topic"), Decoding("greedy")),
    "writingPrompts": Decoding("nucleus", open_ended=True),
    "sentiment": Decoding("nucleus", 3, SENTIMENT_OPENINGS, open_ended=True),
    "topic": Decoding("nucleus", 3, TOPIC_OPENINGS, open_ended=True),
}


def read_openings(path: Path) -> tuple[str, ...]:
    """One opening a line. Raises UserError for a missing or empty file, or one that is not UTF-8 text."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise UserError(f"--openings {path}: no such file; one opening a line is expected") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--openings {path}: not UTF-8 text ({error.reason}); convert it to UTF-8") from None
    openings = tuple(line.strip() for line in lines if line.strip())
    if not openings:
        raise UserError(f"--openings {path}: no opening in it")
    for number, line in enumerate(lines, start=1):
        if SEPARATOR in line:
            raise UserError(f"{path}:{number}: {SEPARATOR!r} separates label and text; take it out of the opening")
    return openings


def label_groups(mode: str, path: Path, openings: Sequence[str]) -> list[Group]:
    """Every label of the file, in alphabetical order, once per opening; a label is written as the file has it."""
    sources = {}
    for record in read_records(mode, path):
        sources.setdefault(record.fields, record.source)
    return [Group(sources[fields], (), "", fields) for fields in sorted(sources) for _ in openings]
