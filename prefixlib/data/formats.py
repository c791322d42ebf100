"""Rows of the files that people have, whatever their names say (standard library only; datasets where needed).

    for number, row in rows(Path("train.jsonl")): ...

JSON may be lines, a list, objects one after the other, or one object that holds columns or the list; separated.py
reads tables. Both may be compressed with gzip, and are UTF-8 or UTF-16. `datasets` guesses types: it turns the text
"2020-01-01" into a date and NA into nothing. So it reads only data with types: .parquet, saved folders, the hub.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prefixlib.data import separated
from prefixlib.data.readers import short
from prefixlib.system.errors import UserError, first_line

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
TABLES = {".csv": ",", ".tsv": "\t"}  # the separator that a name suggests
JSON = (".jsonl", ".json", ".ndjson")
UNPACKED_BY = {  # by a file's first bytes
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}
HUB_SPLITS = {"train": "train", "valid": "validation", "test": "test"}
BETWEEN = re.compile(r"[\s,]*")  # separators between two values
Rows = Iterator[tuple[int, dict[str, Any]]]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a key that appears twice: json would silently keep the last one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for n, name in enumerate(names) if name in names[:n])
        raise ValueError(f'"{twice}" appears twice; keep one of the two')
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_once)


def place(given: str, split: str) -> Path:
    """Place that --train_file, --eval_file or --test_file names: an absolute path, or OWNER/NAME:SPLIT of the hub."""
    path = Path(given).expanduser()
    named = path.suffix.lower() in (*SUFFIXES, ".ndjson", ".gz")
    if path.exists() or named or path.is_absolute() or given.startswith((".", "~")) or given.count("/") > 1:
        return path.resolve()
    return Path(given if ":" in given else f"{given}:{HUB_SPLITS[split]}")


def is_hub(path: Path) -> bool:
    """Whether `path`, a result of `place`, is a name on the hub."""
    return not path.is_absolute() and ":" in path.name and not path.exists()


def rows(path: Path, quotes: bool | None = None) -> Rows:
    """Yield (number, row): a .jsonl file's line, else counted from 1. quotes: as in separated.py.

    Raises UserError if the file is absent or cannot be read.
    """
    if path.is_dir():
        return enumerate(_saved(path), start=1)
    if is_hub(path):
        return enumerate(_hub(path), start=1)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    data, kind = path.read_bytes(), path.suffix.lower()
    if data.startswith(b"\x1f\x8b"):
        data, kind = _decompressed(path, data), Path(path.stem).suffix.lower() if kind == ".gz" else kind
    if data.startswith(b"PAR1") or kind == ".parquet":
        return enumerate(_parquet(path), start=1)
    if data.startswith(b"PK\x03\x04"):
        raise UserError(f"{path}: a zip archive or a spreadsheet; unpack it, or save the sheet as .csv")
    program = next((program for start, program in UNPACKED_BY.items() if data.startswith(start)), None)
    if program:  # gzip in gzip, too
        raise UserError(f"{path}: its content is compressed; unpack it with {program}")
    text = _decoded(path, data)
    if kind in TABLES and not _holds_rows(text):
        return separated.read(path, text, TABLES[kind], quotes)
    if kind in (*JSON, *TABLES) or text.lstrip()[:1] in ("{", "["):
        return _json(path, text, lines=kind != ".json")
    if separated.has_table(text):
        return separated.read(path, text, ",", quotes)
    raise UserError(
        f"{path}: its name must end in {', '.join(SUFFIXES)}, or be a folder of save_to_disk; other names need JSON "
        "or a table whose first line names its columns, as in source<TAB>target"
    )


def _decompressed(path: Path, data: bytes) -> bytes:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged or cut: {first_line(error)}; compress or fetch it again") from None


def _decoded(path: Path, data: bytes) -> str:
    """The file's text, read without read_text, which changes line ends inside values. First bytes tell UTF-16."""
    name = json.detect_encoding(data)
    try:
        return data.decode(name)
    except UnicodeDecodeError as error:
        wanted = name.removesuffix("-sig").upper()
        raise UserError(
            f"{path}: not {wanted} text ({error.reason}); convert it to UTF-8: iconv -f LATIN1 -t UTF-8 {path.name}"
        ) from None


# ---- JSON --------------------------------------------------------------------------------------------------------


def _holds_rows(text: str) -> bool:
    """Whether a text begins with a JSON object, or with a list of them, whatever the name of its file."""
    start = BETWEEN.match(text).end()
    if text[start : start + 1] not in ("{", "["):
        return False
    try:
        found = DECODER.raw_decode(text, start)[0]
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) or any(isinstance(row, dict) for row in found)


def _json(path: Path, text: str, lines: bool) -> Rows:
    """Rows of JSON. lines: the name says JSON lines, so errors and rows are counted by line."""
    start = BETWEEN.match(text).end()
    if text[start : start + 1] == "[":
        return _objects(path, _listed(path, text, start))
    values = _values(path, text)
    first = next(values, None)
    second = next(values, None)
    if first is not None and second is None and isinstance(first[1], dict):
        return _objects(path, _within(path, *first))
    counted = _chain(first, second, values)
    return _objects(path, counted if lines else ((n, value) for n, (_, value) in enumerate(counted, start=1)))


def _chain(first: Any, second: Any, others: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    yield from (each for each in (first, second) if each is not None)
    yield from others


def _objects(path: Path, found: Iterable[tuple[int, Any]]) -> Rows:
    for number, row in found:
        if not isinstance(row, dict):
            raise UserError(f'{path}: row {number}: expected an object like {{"source": text}}, found {short(row)}')
        yield number, row


def _values(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """(line, value) of JSON values one after the other, with or without commas between them."""
    position, line = 0, 1
    while True:
        end = BETWEEN.match(text, position).end()
        line += text.count("\n", position, end)
        if end == len(text):
            return
        value, position = _value(path, text, end, f"row {line}")
        yield line, value
        line += text.count("\n", end, position)


def _listed(path: Path, text: str, start: int) -> Iterator[tuple[int, Any]]:
    """(number, value) of a list; a comma after its last value is allowed, a missing end is not."""
    position, number = BETWEEN.match(text, start + 1).end(), 0
    while text[position : position + 1] != "]":
        number += 1
        value, position = _value(path, text, position, "")
        yield number, value
        position = BETWEEN.match(text, position).end()
    if text[position + 1 :].strip():
        line = 1 + text.count("\n", 0, position + 1)
        raise UserError(f"{path}: line {line}: more text after the end of the list; leave one list in the file")


def _value(path: Path, text: str, start: int, place: str) -> tuple[Any, int]:
    try:
        return DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        said = "the file is cut" if error.pos >= len(text) else error.msg
        line = text.split("\n")[error.lineno - 1].strip()
        remedy = "; leave the comment out" if line.startswith(("//", "#")) else ""
        raise UserError(f"{path}: {place or f'line {error.lineno}'}: not JSON: {said}{remedy}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply; a number with thousands of digits
        raise UserError(f"{path}: {place or 'row 1'}: not a row of data: {error}") from None


def _within(path: Path, line: int, found: dict[str, Any]) -> Iterator[tuple[int, Any]]:
    """The rows of a file that is one object: columns, the list of rows under some name, or one row."""
    if found.keys() - {"index"} == {"columns", "data"}:  # pandas, orient="split"
        return enumerate((dict(zip(found["columns"], cells, strict=False)) for cells in found["data"]), start=1)
    values = list(found.values())
    if values and all(isinstance(value, dict) and value for value in values):  # pandas, by column or by row
        if all(key.isdigit() for value in values for key in value) and len({tuple(value) for value in values}) == 1:
            values = [list(value.values()) for value in values]
            return _from_columns(found, values)
        if all(key.isdigit() for key in found):
            return enumerate(values, start=1)
    if any(_is_list_of_messages(value) for value in values):  # one conversation; its tools are no rows
        return iter([(line, found)])
    lists = {name: value for name, value in found.items() if _is_list_of_rows(value)}
    if len(lists) > 1:
        raise UserError(
            f"{path}: holds several lists of rows ({', '.join(lists)}); give each of them a file of its own"
        )
    if lists:
        return enumerate(next(iter(lists.values())), start=1)
    columns = all(isinstance(value, list) and value and not isinstance(value[0], dict) for value in values)
    if values and columns:
        if len({len(value) for value in values}) > 1:
            sizes = ", ".join(f"{name}: {len(value)}" for name, value in found.items())
            raise UserError(f"{path}: columns of different lengths ({sizes}); give every row a value in each")
        return _from_columns(found, values)
    return iter([(line, found)])


def _from_columns(names: Iterable[str], values: list[list[Any]]) -> Iterator[tuple[int, Any]]:
    names = list(names)
    return enumerate((dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)), start=1)


def _is_list_of_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _is_list_of_messages(value: Any) -> bool:
    return _is_list_of_rows(value) and any({"role", "from"} & row.keys() for row in value)


# ---- read by the library datasets --------------------------------------------------------------------------------


def _parquet(path: Path) -> Iterable[dict[str, Any]]:
    import datasets

    how = {"data_files": str(path), "split": "train", "streaming": True}  # streamed: no copy is written to a cache
    return _library(path, lambda: list(datasets.load_dataset("parquet", **how)))


def _saved(path: Path) -> Iterable[dict[str, Any]]:
    """Load a folder of save_to_disk with one data set; the parts of a DatasetDict are separate folders."""
    import datasets

    found = _library(path, lambda: datasets.load_from_disk(str(path)))
    if isinstance(found, dict):
        raise UserError(f"{path} holds several data sets: pass one of them, {path.name}/{{{','.join(found)}}}")
    return found


def _hub(path: Path) -> Iterable[dict[str, Any]]:
    import datasets

    name, _, split = str(path).partition(":")
    return _library(path, lambda: datasets.load_dataset(name, split=split))


def hub_fingerprint(path: Path) -> str:
    """The fingerprint with which `datasets` identifies a data set of the hub."""
    return _hub(path)._fingerprint


def _library(path: Path, load: Any) -> Any:
    """Load with `datasets`; its errors become one line."""
    import datasets

    datasets.disable_progress_bars()
    try:
        return load()
    except Exception as error:  # several exception types: its own, pyarrow's and the hub's
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        wanted = "a data set of the hub, and no file of that name is here" if is_hub(path) else "a data set"
        raise UserError(f"{path}: cannot be read as {wanted}: {reason}") from error
