"""Reading hypotheses and references: one text per line, or references in groups that blank lines end."""

from collections.abc import Sequence
from pathlib import Path

from prefixlib.system.errors import UserError


def read_lines(path: str | Path, flag: str) -> list[str]:
    """The lines of a UTF-8 file, stripped, empty ones kept; a byte-order mark and carriage returns are dropped.

    Lines end at newlines only, not at Unicode's other separators. Raises UserError (naming `flag`) for a missing or
    empty file and for bytes that are not UTF-8, with their line.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from error
    if not text.strip():
        raise UserError(f"{flag} {path}: the file is empty")
    lines = text.replace("\r\n", "\n").split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.strip() for line in lines]


def blank_end(lines: Sequence[str]) -> str:
    """The note on blank lines at the end, which are easily overlooked, for a message on the number of lines."""
    count = next((n for n, line in enumerate(reversed(lines)) if line), len(lines))
    if not count:
        return ""
    return " (the last line is blank)" if count == 1 else f" (the last {count} lines are blank)"


def _grouped(lines: list[str]) -> list[list[str]]:
    """Groups of lines, each ended by a blank line (the last one by the end of the file too)."""
    groups, current = [], []
    for line in lines:
        if line:
            current.append(line)
        else:
            groups.append(current)
            current = []
    return [*groups, current] if current else groups


def read_references(paths: list[str | Path], hypotheses: int) -> list[list[str]]:
    """The references of each hypothesis.

    One file: a reference per line if it has as many lines as there are hypotheses, else groups of lines, each ended by
    a blank line. Several files: line i of each belongs to hypothesis i, and is empty if there is no such reference.
    Raises UserError as read_lines, and for parallel files of different lengths (naming both).
    """
    files = [read_lines(path, "--references") for path in paths]
    for path, lines in zip(paths[1:], files[1:], strict=True):
        if len(lines) != len(files[0]):
            first, other = (f"{len(each)} lines{blank_end(each)}" for each in (files[0], lines))
            raise UserError(f"--references {paths[0]} has {first} but {path} has {other}")
    if len(files) > 1:
        return [list(texts) for texts in zip(*files, strict=True)]
    lines = files[0]
    if len(lines) == hypotheses or "" not in lines:
        return [[line] for line in lines]
    return _grouped(lines)
