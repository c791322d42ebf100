"""From a source folder's files to the original's file formats, one split at a time. Used by scripts/prepare_data.py.

Every converter takes (source folder, split, target) and returns the file that holds the split in the original's format:
`target`, which it has written, or a file of the source folder that needs no change; None if there is no such split.
"""

import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from prefixlib.data import formats
from prefixlib.system.errors import UserError
from prepare.e2e_text import csv_lines
from prepare.webnlg_xml import LANGUAGE, TEST_FILE, filtered_json, webnlg_json, xml_files

log = logging.getLogger(__name__)

E2E_TABLES = {"train": "trainset.csv", "valid": "devset.csv", "test": "testset_w_refs.csv"}
E2E_CLEANED = {"train": "train-fixed.no-ol.csv", "valid": "devel-fixed.no-ol.csv", "test": "test-fixed.csv"}
HUB_NAMES = {"train": ("train",), "valid": ("validation", "val", "valid"), "test": ("test",)}
HUB_COLUMNS = (("document", "summary"), ("article", "highlights"))  # XSum's, CNN/DailyMail's


def find(source: Path, *names: str) -> Path | None:
    """The first of these names in the source folder, the folder itself included; the shallowest of several matches.

    Raises UserError if two are equally deep (two data sets in one folder): either would be a guess.
    """
    for name in names:
        if source.name == name:
            return source
        visible = [path for path in source.rglob(name) if not path.relative_to(source).parts[0].startswith(".")]
        matches = sorted(visible, key=lambda path: (len(path.parts), path))
        if len(matches) > 1 and len(matches[0].parts) == len(matches[1].parts):
            raise UserError(f"--source {source}: contains both {matches[0]} and {matches[1]}; name the folder of one")
        if matches:
            return matches[0]
    return None


def convert_e2e(source: Path, split: str, target: Path) -> Path | None:
    """Convert the challenge's csv or the cleaned release's, tokenised; else use a src1 file."""
    challenge, cleaned = find(source, E2E_TABLES[split]), find(source, E2E_CLEANED[split])
    if challenge and cleaned:
        raise UserError(f"--source {source}: contains both {challenge} and {cleaned}; name the folder of one")
    table = challenge or cleaned
    if not table:
        return find(source, target.name)
    with open(target, "w", encoding="utf-8", newline="\n") as file:
        for line in tqdm(csv_lines(table), desc=table.name, unit=" lines", disable=None):
            file.write(line + "\n")
    return target


def convert_webnlg(source: Path, split: str, target: Path, lang: str = LANGUAGE) -> Path | None:
    """The split's folder of XML, as JSON; else a JSON file; else, of the test split, its one XML file.

    Texts in other languages are left out.
    """
    folder = find(source, target.stem)
    if not folder or not folder.is_dir() or not xml_files(folder):
        ready = find(source, target.name)
        alone = find(source, TEST_FILE) if split == "test" else None
        text = filtered_json(ready, lang) if ready else None
        if text is None and (ready or not alone):
            return ready
        text = text or webnlg_json(alone.parent, lang)
    else:
        text = webnlg_json(folder, lang)
    target.write_text(text, encoding="utf-8", newline="\n")
    return target


def convert_dart(source: Path, split: str, target: Path) -> Path | None:
    """The unchanged JSON of the release."""
    return find(source, target.name)


def convert_documents(source: Path, split: str, target: Path) -> Path | None:
    """X.source with X.target; else the hub's json, jsonl or parquet as one line a document, without empty rows."""
    ready = find(source, target.name)
    alone = find(source, *(f"{name}{ending}" for name in HUB_NAMES[split] for ending in (".jsonl", ".json")))
    shards = [alone] if alone else find_shards(source, split)
    if ready or not shards:
        return ready
    left_out = 0
    with (
        open(target, "w", encoding="utf-8", newline="\n") as sources,
        open(target.with_suffix(".target"), "w", encoding="utf-8", newline="\n") as targets,
    ):
        found = itertools.chain.from_iterable(map(hub_rows, shards))
        for document, summary in tqdm(found, desc=shards[0].name, unit=" documents", disable=None):
            if document and summary:
                sources.write(document + "\n")
                targets.write(summary + "\n")
            else:
                left_out += 1
    if left_out:
        log.warning("%s: %d rows left out: no text or no summary", shards[0].name, left_out)
    return target


def find_shards(source: Path, split: str) -> list[Path]:
    """The parquet files of a split, in order: `SPLIT.parquet`, the hub's `SPLIT-00000-of-00001.parquet`, or those in a
    folder `SPLIT/`, as in the hub's converted copies. Raises UserError if some are absent.
    """
    for name in HUB_NAMES[split]:
        whole = find(source, f"{name}.parquet")
        if whole:
            return [whole]
        shards = sorted({*source.rglob(f"{name}-*-of-*.parquet"), *source.rglob(f"{name}/*.parquet")})
        counts = {shard.stem.rpartition("-of-")[2] for shard in shards if "-of-" in shard.stem}
        if any(count.isdigit() and int(count) != len(shards) for count in counts):
            wanted = "/".join(sorted(counts))
            raise UserError(f"--source {source}: {len(shards)} of {wanted} files {name}-*.parquet; get them all")
        if shards:
            return shards
    return []


def hub_rows(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (document, summary) of a file of rows, newlines as spaces; UserError names file and row."""
    for number, row in enumerate(_parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path), start=1):
        for columns in HUB_COLUMNS:
            if isinstance(row, dict) and all(isinstance(row.get(column), str) for column in columns):
                document, summary = (re.sub(r"\s*[\r\n]+\s*", " ", row[column]).strip() for column in columns)
                yield document, summary
                break
        else:
            found = list(row) if isinstance(row, dict) else row
            expected = " or ".join("+".join(columns) for columns in HUB_COLUMNS)
            raise UserError(f"{path}: row {number}: expected the texts {expected}, found {str(found)[:80]}")


def _parquet_rows(path: Path) -> Iterator[object]:
    yield from (row for _, row in formats.rows(path))


def _json_rows(path: Path) -> Iterable[object]:
    line_number = 0
    with open(path, encoding="utf-8-sig") as lines:
        try:
            if lines.read(1) == "[":
                lines.seek(0)
                yield from json.load(lines)
                return
            lines.seek(0)
            for line in lines:
                line_number += 1
                if line.strip():
                    yield json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{line_number or error.lineno}: not JSON: {error.msg}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error.reason}); convert it to UTF-8") from None
