"""File formats -> (input, text) records, and linearisations (standard library only). tasks.py says who uses which.

Readers take `blind`: in decoding, new inputs may come without the texts that belong to them.

Faithful to the original's training side: spaces, bars and letter case are part of the published results. Departures,
all of them repairs: a malformed line or entry is an error that names its place (the original dropped such lines in
training and crashed on them in decoding); decoding uses the training linearisation for every entry (the original left
the bars out of WebNLG's first entry); `-lrb-` in writingPrompts sources becomes `(`; lines end at newlines only, not at
Unicode's other separators; references are stripped in every mode (the original: data2text only).
A literal `<|endoftext|>` inside a text is refused: it would become the separator or the end of the text.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prefixlib.system.errors import UserError

SEPARATOR = "<|endoftext|>"  # GPT-2's bos = eos: it separates source and target, and ends the target


@dataclass(frozen=True)
class Record:
    """One (input, text) pair."""

    source: str  # linearised input, without the outer template's spaces
    target: str  # one text as the file has it; "" if it has none
    trainable: bool  # False where training skips it (WebNLG comment != "good"); references keep it
    fields: tuple[str, ...]  # category words, relations or the stripped label, in order
    category: str  # WebNLG category, else ""
    place: str = field(default="", compare=False)  # its place in the file: "line 3", "entry 3", "row 3"


@dataclass(frozen=True)
class Group:
    """One distinct input with every reference, in file order."""

    source: str
    references: tuple[str, ...]
    category: str
    fields: tuple[str, ...]
    places: tuple[str, ...] = field(default=(), compare=False)  # the places of its records


# ---- linearisation -----------------------------------------------------------------------------------------------


def linearise_meaning(fields: Mapping[str, str] | Iterable[tuple[str, str]]) -> str:
    """`"name : The Eagle | Type : pub"`: E2E's slots and values, from a mapping or pairs."""
    pairs = fields.items() if isinstance(fields, Mapping) else fields
    return " | ".join(f"{slot} : {value}" for slot, value in pairs)


def linearise_webnlg(triples: Iterable[tuple[str, str, str]]) -> str:
    """`" | S : p : O | S : p : O"`: a bar before every triple, nothing lower-cased."""
    return "".join(f" | {subject} : {relation} : {object_}" for subject, relation, object_ in triples)


def linearise_dart(triples: Iterable[tuple[str, str, str]]) -> str:
    """`"S : rel : O | S : rel : O"`: bars between triples only, relations lower-cased."""
    return " | ".join(f"{subject} : {relation.lower()} : {object_}" for subject, relation, object_ in triples)


def slots_of(source: str) -> tuple[str, ...]:
    """The slots of a linearised E2E input."""
    return tuple(field.split(":")[0].strip() for field in source.split("|"))


def relations_of(source: str) -> tuple[str, ...]:
    """The relations of linearised triples; parts that are not triples have none."""
    triples = (triple.split(" : ") for triple in source.removeprefix(" | ").split(" | "))
    return tuple(parts[1] for parts in triples if len(parts) >= 3)


def group_records(records: Iterable[Record], strip: bool = True) -> list[Group]:
    """One group per distinct (source, fields), in order of first occurrence, with its references in file order.

    References are stripped unless told otherwise, whitespace-only ones dropped; texts that training skips are kept.
    """
    references: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    categories: dict[tuple[str, tuple[str, ...]], str] = {}
    places: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for record in records:
        key = (record.source, record.fields)
        texts = references.setdefault(key, [])
        categories.setdefault(key, record.category)
        places.setdefault(key, []).append(record.place)
        if record.target.strip():
            texts.append(record.target.strip() if strip else record.target)
    return [
        Group(key[0], tuple(texts), categories[key], key[1], tuple(dict.fromkeys(places[key])))
        for key, texts in references.items()
    ]


# ---- text files: one example a line ------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, line without its newline), blank lines included; a leading byte-order mark is dropped."""
    number = 0
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as lines:  # a lone carriage return ends no line
            for number, line in enumerate(lines, start=1):
                if SEPARATOR in line:
                    raise UserError(
                        f"{path}:{number}: {SEPARATOR!r} separates source and target; take it out of the text"
                    )
                yield number, line.removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}, after line {number}); convert it to UTF-8") from None


def read_text(path: Path) -> str:
    """A whole file as one text, its line breaks as newlines. Raises UserError for bytes that are not UTF-8."""
    return "\n".join(line for _, line in _lines(path)).strip()


def is_blank(line: str) -> bool:
    """True for a line of spaces and tabs alone; Unicode's other separators are text."""
    return not line.strip(" \t\r\n")


def _pairs(path: Path, bars: str, left: str, right: str, blind: bool = False) -> Iterator[tuple[str, str, str]]:
    """Yield place and halves of every non-blank `left{bars}right` line; UserError file:line for any other line.

    blind: a file without any bars holds the inputs alone, one a line; their right half is "".
    """
    if blind and not any(bars in line for _, line in _lines(path)):
        yield from ((place, line, "") for place, line in _documents(path))
        return
    for number, line in _lines(path):
        if is_blank(line):
            continue
        parts = line.split(bars)
        if len(parts) != 2 or not parts[0].strip():
            raise UserError(f"{path}:{number}: expected {left}{bars}{right}, found {short(line)}")
        yield f"line {number}", parts[0], parts[1]


def _documents(path: Path) -> Iterator[tuple[str, str]]:
    """Yield place and text of one input a line, so that line n of the outputs belongs to it.

    Raises UserError for a blank line, except at the end.
    """
    blank = 0
    for number, line in _lines(path):
        if is_blank(line):
            blank = blank or number
        elif blank:
            raise UserError(f"{path}:{blank}: expected one input a line, found a blank line")
        else:
            yield f"line {number}", line


def read_data2text(path: Path, blind: bool = False) -> Iterator[Record]:
    for place, source, target in _pairs(path, "||", "source", "target", blind):
        yield Record(source, target, True, slots_of(source), "", place)


def read_writing_prompts(path: Path, blind: bool = False) -> Iterator[Record]:
    for place, source, target in _pairs(path, "|||", "source", "target", blind):
        source = source.replace("-lrb-", "(").replace("-rrb-", ")")
        yield Record(source, target.replace("<newline>", "\n"), True, (), "", place)


def labelled(bars: str, classify: bool) -> Callable[..., Iterator[Record]]:
    """Reader of `label{bars}text` lines: label -> text, or with `classify` text -> label."""

    def read(path: Path, blind: bool = False) -> Iterator[Record]:
        alone = blind and not any(bars in line for _, line in _lines(path))
        for place, label, text in _pairs(path, bars, "label", "text", blind):
            if alone and classify:  # the input is the text
                label, text = text, label
            if bars == "|||":  # the sentiment files write line breaks this way
                text = text.replace("< br / >", "\n")
            source, target = (text, label) if classify else (label, text)
            yield Record(source, target, True, () if classify else (label.strip(),), "", place)

    return read


def read_parallel(path: Path, blind: bool = False) -> Iterator[Record]:
    """`X.source` and, beside it, `X.target`: line n of one belongs to line n of the other.

    blind: the target file, or lines in it, may be missing, and a file of another name holds documents alone.
    """
    if not path.name.endswith("source") and not blind:
        raise UserError(f"{path}: expected a file ending in 'source', with its 'target' file beside it")
    targets_path = path.with_name(path.name.removesuffix("source") + "target")
    if not path.name.endswith("source") or not targets_path.is_file():
        if not blind:
            raise UserError(f"{targets_path}: no such file; {path.name} needs its targets beside it")
        yield from (Record(line, "", False, (), "", place) for place, line in _documents(path))
        return
    sources, targets = _lines(path), _lines(targets_path)
    for number, source in sources:
        target = next(targets, (number, None))[1]
        if target is None:
            raise UserError(
                f"{targets_path}:{number}: expected a target for {path.name}:{number}, found the end of file"
            )
        for file, line in ((path, source), (targets_path, target)):
            if is_blank(line) and not is_blank(source + target) and not (blind and file == targets_path):
                raise UserError(f"{file}:{number}: expected one document a line, found a blank line")
        if not is_blank(source):
            yield Record(source, target, True, (), "", f"line {number}")
    for number, target in targets:
        if not is_blank(target):
            raise UserError(
                f"{targets_path}:{number}: expected the end of file, as in {path.name}, found {short(target)}"
            )


# ---- JSON files --------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); convert it to UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise UserError(f"{path}: not a data file: its JSON is nested too deeply") from None
    except ValueError as error:  # a number with thousands of digits
        raise UserError(f"{path}: not a data file: {error}") from None


def _expect(condition: bool, path: Path, place: str, expected: str, found: object) -> None:
    if not condition:
        raise UserError(f"{path}: {place}: expected {expected}, found {short(found)}")


def _text(path: Path, place: str, holder: object, key: str) -> str:
    """The value holder[key], which must be a string without the separator."""
    _expect(isinstance(holder, dict) and isinstance(holder.get(key), str), path, place, f'{{"{key}": text}}', holder)
    _check_text(path, place, holder[key])
    return holder[key]


def _check_text(path: Path, place: str, text: str) -> None:
    """Raise UserError for a text that holds the separator, or half a character."""
    _expect(SEPARATOR not in text, path, place, f"a text without {SEPARATOR!r}", text)
    check_whole(path, place, text)


def check_whole(path: Path, place: str, text: str) -> None:
    """Raise UserError for a text with half a character in it: a lone surrogate, "\\ud83d"."""
    halves = [character for character in text if "\ud800" <= character <= "\udfff"]
    _expect(not halves, path, place, f"whole characters, not half of one ({''.join(halves)!r})", text)


def _list(path: Path, place: str, holder: object, key: str, blind: bool = False) -> list:
    """The value holder[key], which must be a list; blind: it may be missing."""
    if blind and isinstance(holder, dict) and key not in holder:
        return []
    _expect(isinstance(holder, dict) and isinstance(holder.get(key), list), path, place, f'{{"{key}": [...]}}', holder)
    return holder[key]


def read_webnlg(path: Path, blind: bool = False) -> Iterator[Record]:
    """WebNLG 2017 as `{"entries": [{"1": {...}}, {"2": {...}}, ...]}`."""
    languages: set[str] = set()
    for index, numbered in enumerate(_list(path, "top level", _read_json(path), "entries"), start=1):
        place = f"entry {index}"
        _expect(isinstance(numbered, dict) and len(numbered) == 1, path, place, f'{{"{index}": {{...}}}}', numbered)
        entry = next(iter(numbered.values()))
        triples = [
            tuple(_text(path, f"{place}: triple {n}", triple, key) for key in ("subject", "property", "object"))
            for n, triple in enumerate(_list(path, place, entry, "modifiedtripleset"), start=1)
        ]
        _expect(bool(triples), path, place, "at least one triple in modifiedtripleset", [])
        source, relations = linearise_webnlg(triples), tuple(triple[1] for triple in triples)
        category = str(entry.get("category", ""))
        texts = _list(path, place, entry, "lexicalisations", blind)
        for n, text in enumerate(texts, start=1):
            lex = _text(path, f"{place}: lexicalisation {n}", text, "lex")
            languages.add(str(text.get("lang") or "en"))
            if len(languages) > 1:
                raise UserError(
                    f"{path}: {place}: texts in several languages ({', '.join(sorted(languages))}); choose one with "
                    "python scripts/prepare_data.py webnlg --source FOLDER --lang en"
                )
            yield Record(source, lex, text.get("comment") == "good", relations, category, place)
        if not texts:  # a blind test set: still one output to write
            yield Record(source, "", False, relations, category, place)


def read_dart(path: Path, blind: bool = False) -> Iterator[Record]:
    """DART as `[{"tripleset": [[s, r, o], ...], "annotations": [{"text": ...}, ...]}, ...]`."""
    entries = _read_json(path)
    _expect(isinstance(entries, list), path, "top level", '[{"tripleset": [...], "annotations": [...]}, ...]', entries)
    for index, entry in enumerate(entries, start=1):
        place = f"entry {index}"
        triples = _list(path, place, entry, "tripleset")
        _expect(bool(triples), path, place, "at least one triple in tripleset", triples)
        for triple in triples:
            three = isinstance(triple, list) and len(triple) == 3 and all(isinstance(part, str) for part in triple)
            _expect(three, path, place, "[subject, relation, object] in tripleset", triple)
            _check_text(path, place, "".join(triple))
        source, relations = linearise_dart(triples), tuple(triple[1].lower() for triple in triples)
        texts = _list(path, place, entry, "annotations", blind)
        for n, text in enumerate(texts, start=1):
            yield Record(source, _text(path, f"{place}: annotation {n}", text, "text"), True, relations, "", place)
        if not texts:  # a blind test set: still one output to write
            yield Record(source, "", False, relations, "", place)


def short(found: object, limit: int = 60) -> str:
    """The value in Python's notation, in at most `limit` characters."""
    shown = repr(found)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
