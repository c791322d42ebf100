"""WebNLG XML -> the JSON that the original reads, byte for byte for the 2017 release (standard library only).

Release 3.0 has Russian and English texts; a text without a language is English.
"""

import json
import logging
import re
import xml.etree.ElementTree as ET
from pathlib import Path

from prefixlib.system.errors import UserError

log = logging.getLogger(__name__)
LANGUAGE = "en"
TEST_FILE = "testdata_with_lex.xml"  # the test folder also holds its parts, and a copy without texts


def xml_files(folder: Path) -> list[Path]:
    """The folder's XML files in the order of the original's JSON: 1triples … 7triples, then by category."""
    if (folder / TEST_FILE).is_file():
        return [folder / TEST_FILE]
    numbered = {path: int((re.match(r"\d+", path.parent.name) or "0")[0]) for path in folder.rglob("*.xml")}
    return sorted(numbered, key=lambda path: (numbered[path], path.name))


def _triple(path: Path, entry_id: str | None, text: str | None) -> dict[str, str]:
    parts = (text or "").split(" | ")
    if len(parts) != 3:
        raise UserError(f"{path}: entry {entry_id}: expected subject | property | object, found {text!r}")
    subject, relation, object_ = (part.strip() for part in parts)
    return {"object": object_, "property": relation, "subject": subject}


def _entry(path: Path, entry: ET.Element, lang: str) -> dict:
    """One entry; fields that WebNLG 2017 does not have are empty, as in later releases' JSON."""
    entry_id = entry.get("eid")
    return {
        "category": entry.get("category", ""),
        "dbpedialinks": [],
        "lexicalisations": [
            {"comment": lex.get("comment", ""), "lang": "", "lex": lex.text or "", "xml_id": lex.get("lid", "")}
            for lex in entry.findall("lex")
            if (lex.get("lang") or LANGUAGE) == lang
        ],
        "links": [],
        "modifiedtripleset": [_triple(path, entry_id, t.text) for t in entry.findall("modifiedtripleset/mtriple")],
        "originaltriplesets": {
            "originaltripleset": [
                [_triple(path, entry_id, t.text) for t in triples.findall("otriple")]
                for triples in entry.findall("originaltripleset")
            ]
        },
        "shape": entry.get("shape", "NA"),
        "shape_type": entry.get("shape_type", "NA"),
        "size": entry.get("size", ""),
        "xml_id": entry_id or "",
    }


def webnlg_json(folder: Path, lang: str = LANGUAGE) -> str:
    """The JSON text of one split's XML folder, entries numbered from "1", with the texts of one language.

    Raises UserError naming file and entry, and if no text has the language.
    """
    entries, texts, kept = [], 0, 0
    for path in xml_files(folder):
        try:
            root = ET.parse(path).getroot()
        except ET.ParseError as error:
            raise UserError(f"{path}:{error.position[0]}: not XML: {error}") from None
        for entry in root.iter("entry"):
            found = _entry(path, entry, lang)
            texts += len(entry.findall("lex"))
            kept += len(found["lexicalisations"])
            entries.append({str(len(entries) + 1): found})
    check_language(folder, lang, texts, kept)
    return _as_text(entries)


def filtered_json(path: Path, lang: str = LANGUAGE) -> str | None:
    """The content of a JSON file with the texts of one language alone; None if it has no others.

    Raises UserError if no text has the language. The reader checks files of another form.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))["entries"]
        found = [text for entry in entries for part in entry.values() for text in part["lexicalisations"]]
        kept = [text for text in found if (text.get("lang") or LANGUAGE) == lang]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None
    check_language(path, lang, len(found), len(kept))
    if len(kept) == len(found):
        return None
    for entry in entries:
        for part in entry.values():
            part["lexicalisations"] = [t for t in part["lexicalisations"] if (t.get("lang") or LANGUAGE) == lang]
    return _as_text(entries)


def check_language(path: Path, lang: str, texts: int, kept: int) -> None:
    """Warn how many texts are left out. Raises UserError if these are all."""
    if texts and not kept:
        raise UserError(f"--lang {lang}: {path} has no text in it; texts without a language are {LANGUAGE}")
    if kept < texts:
        left_out = texts - kept
        log.warning("%s: %d of %d texts left out: they are not in the language %s", path, left_out, texts, lang)


def _as_text(entries: list[dict]) -> str:
    return json.dumps({"entries": entries}, indent=4, ensure_ascii=False)
