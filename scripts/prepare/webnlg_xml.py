"""WebNLG 2017 XML -> the JSON that the original reads, byte for byte (standard library only)."""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

from prefixlib.errors import UserError

TEST_FILE = "testdata_with_lex.xml"  # the test folder also holds parts of it, and itself without texts


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


def _entry(path: Path, entry: ET.Element) -> dict:
    """One entry; the fields that WebNLG 2017 does not have are there and empty, as in later releases' JSON."""
    entry_id = entry.get("eid")
    return {
        "category": entry.get("category", ""),
        "dbpedialinks": [],
        "lexicalisations": [
            {"comment": lex.get("comment", ""), "lang": "", "lex": lex.text or "", "xml_id": lex.get("lid", "")}
            for lex in entry.findall("lex")
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


def webnlg_json(folder: Path) -> str:
    """The JSON text of one split's XML folder, entries numbered from "1". Raises UserError naming file and entry."""
    entries = []
    for path in xml_files(folder):
        try:
            root = ET.parse(path).getroot()
        except ET.ParseError as error:
            raise UserError(f"{path}:{error.position[0]}: not XML: {error}") from None
        for entry in root.iter("entry"):
            entries.append({str(len(entries) + 1): _entry(path, entry)})
    return json.dumps({"entries": entries}, indent=4, ensure_ascii=False)
