"""Every data set's file format -> (input, text) records, and their linearisation to text (standard library only).

    from prefixlib.readers import read_records, read_groups, training_text, prompt_text
    for record in read_records("webnlg", "data/webnlg_challenge_2017/train.json"): ...

Faithful to the original's training side: spaces, bars and letter case are part of the published results. Departures,
all of them repairs: a malformed line or entry is an error that names its place (the original dropped such lines in
training and crashed on them in decoding); decoding uses the training linearisation for every entry (the original left
the bars out of WebNLG's first entry); `-lrb-` in writingPrompts sources becomes `(`; lines end at newlines only, not at
Unicode's other separators; references are stripped in every mode (the original: data2text only).
A literal `<|endoftext|>` inside a text is refused: it would become the separator or the end of the text.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prefixlib.errors import UserError

SEPARATOR = "<|endoftext|>"  # GPT-2's bos = eos: stands between source and target, and ends the target
DATA_DIR = Path(__file__).resolve().parents[1] / "data"


@dataclass(frozen=True)
class Record:
    """One (input, text) pair."""

    source: str  # linearised input, without the outer template's spaces
    target: str  # one text as the file has it; "" where the file gives none
    trainable: bool  # False where training skips it (WebNLG comment != "good"); references keep it
    fields: tuple[str, ...]  # category words, relations or the stripped label, in order
    category: str  # WebNLG category, else ""


@dataclass(frozen=True)
class Group:
    """One distinct input with every reference, in file order."""

    source: str
    references: tuple[str, ...]
    category: str
    fields: tuple[str, ...]


@dataclass(frozen=True)
class Mode:
    """How one task's files are read and written out as `{before}source{after}SEP{before}target{after}SEP`."""

    read: Callable[[Path], Iterator[Record]]
    files: dict[str, str]  # split -> path under data/, the original's file names
    prepare: str = ""  # the data set's name for scripts/prepare_data.py, "" where it has none
    source_spaces: tuple[str, str] = (" ", " ")
    target_spaces: tuple[str, str] = (" ", " ")
    grouped: bool = True  # False: equal inputs stay apart, each with its own reference (classification)


# ---- linearisation -----------------------------------------------------------------------------------------------


def prompt_text(mode: str, source: str, separator: str) -> str:
    """The prompt of training and decoding, e.g. `" SRC <|endoftext|>"`; UserError if the source holds `separator`."""
    before, after = find_mode(mode).source_spaces
    return f"{before}{_without(separator, source)}{after}{separator}"


def training_text(mode: str, source: str, target: str, separator: str) -> tuple[str, str]:
    """Prompt and continuation, whose concatenation is the original's training line.

    The loss counts the continuation alone: target and final separator (and the space before it, where there is one).
    """
    before, after = find_mode(mode).target_spaces
    return prompt_text(mode, source, separator), f"{before}{_without(separator, target)}{after}{separator}"


def linearise_webnlg(triples: Iterable[tuple[str, str, str]]) -> str:
    """`" | S : p : O | S : p : O"`: a bar before every triple, nothing lower-cased."""
    return "".join(f" | {subject} : {relation} : {object_}" for subject, relation, object_ in triples)


def linearise_dart(triples: Iterable[tuple[str, str, str]]) -> str:
    """`"S : rel : O | S : rel : O"`: bars between triples only, relations lower-cased."""
    return " | ".join(f"{subject} : {relation.lower()} : {object_}" for subject, relation, object_ in triples)


def _without(separator: str, text: str) -> str:
    if separator in text:
        raise UserError(f"{separator!r} separates source and target and cannot stand inside a text: {_short(text)}")
    return text


# ---- reading -----------------------------------------------------------------------------------------------------


def find_mode(mode: str) -> Mode:
    """The table's row for a mode; UserError that lists the modes for any other name."""
    if mode not in MODES:
        raise UserError(f"--mode {mode}: unknown; one of {', '.join(MODES)}")
    return MODES[mode]


def data_file(mode: str, split: str, data_dir: str | Path | None = None) -> Path:
    """The mode's file for split train, valid or test, under `data_dir` (default: this repository's data/)."""
    files = find_mode(mode).files
    if split not in files:
        raise UserError(f"split {split!r} of mode {mode}: expected one of {', '.join(files)}")
    return Path(data_dir if data_dir is not None else DATA_DIR) / files[split]


def iter_records(mode: str, path: str | Path) -> Iterator[Record]:
    """Yield the file's records in file order (text formats one line at a time, JSON read whole).

    Raises UserError for a missing or empty file, text not in UTF-8, a malformed line or entry, a separator in a text.
    """
    row, path = find_mode(mode), Path(path)
    if not path.is_file():
        prepared = f"run `python scripts/prepare_data.py {row.prepare}`, or " if row.prepare else ""
        raise UserError(f"{path}: no such file for mode {mode}; {prepared}pass a file of your own")
    empty = True
    for record in row.read(path):
        empty = False
        yield record
    if empty:
        raise UserError(f"{path}: no examples in it; mode {mode} needs at least one")


def read_records(mode: str, path: str | Path) -> list[Record]:
    """All records of a file, in file order; raises as iter_records."""
    return list(iter_records(mode, path))


def group_records(records: Iterable[Record]) -> list[Group]:
    """One group per distinct (source, fields), in order of first occurrence, with its references in file order.

    References are stripped, whitespace-only ones dropped; texts that training skips are kept.
    """
    references: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    categories: dict[tuple[str, tuple[str, ...]], str] = {}
    for record in records:
        key = (record.source, record.fields)
        texts = references.setdefault(key, [])
        categories.setdefault(key, record.category)
        if record.target.strip():
            texts.append(record.target.strip())
    return [Group(key[0], tuple(texts), categories[key], key[1]) for key, texts in references.items()]


def read_groups(mode: str, path: str | Path) -> list[Group]:
    """The inputs of a file with their references, as they are decoded and scored; raises as iter_records.

    Distinct inputs, save where every line counts for itself (classification, whose accuracy is over the lines).
    """
    records = iter_records(mode, path)
    if find_mode(mode).grouped:
        return group_records(records)
    return [group for record in records for group in group_records([record])]


# ---- text files: one example a line ------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, line without its newline), blank lines included; a leading byte-order mark is dropped."""
    number = 0
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if SEPARATOR in line:
                    raise UserError(
                        f"{path}:{number}: {SEPARATOR!r} separates source and target; take it out of the text"
                    )
                yield number, line.removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}, after line {number}); convert it to UTF-8") from None


def _pairs(path: Path, bars: str, left: str, right: str) -> Iterator[tuple[str, str]]:
    """Yield the two halves of every non-blank `left{bars}right` line; UserError file:line for any other line."""
    for number, line in _lines(path):
        if not line.strip():
            continue
        parts = line.split(bars)
        if len(parts) != 2 or not parts[0].strip():
            raise UserError(f"{path}:{number}: expected {left}{bars}{right}, found {_short(line)}")
        yield parts[0], parts[1]


def _read_data2text(path: Path) -> Iterator[Record]:
    for source, target in _pairs(path, "||", "source", "target"):
        yield Record(source, target, True, tuple(field.split(":")[0].strip() for field in source.split("|")), "")


def _read_writing_prompts(path: Path) -> Iterator[Record]:
    for source, target in _pairs(path, "|||", "source", "target"):
        source = source.replace("-lrb-", "(").replace("-rrb-", ")")
        yield Record(source, target.replace("<newline>", "\n"), True, (), "")


def _labelled(bars: str, classify: bool) -> Callable[[Path], Iterator[Record]]:
    """Reader of `label{bars}text` lines: label -> text, or with `classify` text -> label."""

    def read(path: Path) -> Iterator[Record]:
        for label, text in _pairs(path, bars, "label", "text"):
            if bars == "|||":  # the sentiment files write line breaks so
                text = text.replace("< br / >", "\n")
            source, target = (text, label) if classify else (label, text)
            yield Record(source, target, True, () if classify else (label.strip(),), "")

    return read


def _read_parallel(path: Path) -> Iterator[Record]:
    """`X.source` and, beside it, `X.target`: line n of one belongs to line n of the other."""
    if not path.name.endswith("source"):
        raise UserError(f"{path}: expected a file ending in 'source', with its 'target' file beside it")
    targets_path = path.with_name(path.name[: -len("source")] + "target")
    if not targets_path.is_file():
        raise UserError(f"{targets_path}: no such file; {path.name} needs its targets beside it")
    sources, targets = _lines(path), _lines(targets_path)
    for number, source in sources:
        target = next(targets, (number, None))[1]
        if target is None:
            raise UserError(
                f"{targets_path}:{number}: expected a target for {path.name}:{number}, found the end of file"
            )
        for file, line in ((path, source), (targets_path, target)):
            if not line.strip() and (source + target).strip():
                raise UserError(f"{file}:{number}: expected one document a line, found a blank line")
        if source.strip():
            yield Record(source, target, True, (), "")
    for number, target in targets:
        if target.strip():
            raise UserError(
                f"{targets_path}:{number}: expected the end of file, as in {path.name}, found {_short(target)}"
            )


# ---- JSON files --------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); convert it to UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None


def _expect(condition: bool, path: Path, place: str, expected: str, found: object) -> None:
    if not condition:
        raise UserError(f"{path}: {place}: expected {expected}, found {_short(found)}")


def _text(path: Path, place: str, holder: object, key: str) -> str:
    """holder[key], which must be a string without the separator."""
    _expect(isinstance(holder, dict) and isinstance(holder.get(key), str), path, place, f'{{"{key}": text}}', holder)
    _expect(SEPARATOR not in holder[key], path, place, f"a text without {SEPARATOR!r}", holder[key])
    return holder[key]


def _list(path: Path, place: str, holder: object, key: str) -> list:
    """holder[key], which must be a list."""
    _expect(isinstance(holder, dict) and isinstance(holder.get(key), list), path, place, f'{{"{key}": [...]}}', holder)
    return holder[key]


def _read_webnlg(path: Path) -> Iterator[Record]:
    """WebNLG 2017 as `{"entries": [{"1": {...}}, {"2": {...}}, ...]}`."""
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
        texts = _list(path, place, entry, "lexicalisations")
        for n, text in enumerate(texts, start=1):
            lex = _text(path, f"{place}: lexicalisation {n}", text, "lex")
            yield Record(source, lex, text.get("comment") == "good", relations, category)
        if not texts:  # a blind test set: still one output to write
            yield Record(source, "", False, relations, category)


def _read_dart(path: Path) -> Iterator[Record]:
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
            _expect(SEPARATOR not in "".join(triple), path, place, f"triples without {SEPARATOR!r}", triple)
        source, relations = linearise_dart(triples), tuple(triple[1].lower() for triple in triples)
        texts = _list(path, place, entry, "annotations")
        for n, text in enumerate(texts, start=1):
            yield Record(source, _text(path, f"{place}: annotation {n}", text, "text"), True, relations, "")
        if not texts:  # a blind test set: still one output to write
            yield Record(source, "", False, relations, "")


def _short(found: object, limit: int = 60) -> str:
    shown = repr(found)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


# ---- the modes ---------------------------------------------------------------------------------------------------


def _splits(pattern: str, train: str = "train", valid: str = "valid", test: str = "test") -> dict[str, str]:
    return {"train": pattern.format(train), "valid": pattern.format(valid), "test": pattern.format(test)}


MODES: dict[str, Mode] = {
    "data2text": Mode(_read_data2text, _splits("e2e_data/src1_{}.txt"), "e2e"),
    "webnlg": Mode(_read_webnlg, _splits("webnlg_challenge_2017/{}.json", valid="dev"), "webnlg"),
    "triples": Mode(_read_dart, _splits("dart/dart-v1.1.1-full-{}.json", valid="dev"), "dart"),
    "writingPrompts": Mode(_read_writing_prompts, _splits("writingPrompts/{}_small.txt")),
    # no spaces at all: source and target are tokenised, cut and joined around the separator one by one
    "xsum": Mode(_read_parallel, _splits("xsum/{}.source", valid="val"), "xsum", ("", ""), ("", "")),
    "cnndm": Mode(_read_parallel, _splits("cnn_dm/{}.source", valid="val"), "cnn_dm", ("", ""), ("", "")),
    # the label's own trailing space, if any, is the only one beside the separator
    "sentiment": Mode(_labelled("|||", classify=False), _splits("IMDB/{}.txt", valid="dev"), "", (" ", ""), ("", "")),
    "topic": Mode(_labelled("||", classify=False), _splits("AG-news/{}1.tsv", valid="dev"), "", (" ", ""), ("", "")),
    "classify-sentiment": Mode(
        _labelled("|||", classify=True), _splits("IMDB/{}.txt", valid="dev"), "", (" ", " "), (" ", ""), grouped=False
    ),
    "classify-topic": Mode(
        _labelled("||", classify=True),
        _splits("AG-news/{}1.tsv", valid="dev"),
        "",
        (" ", " "),
        (" ", ""),
        grouped=False,
    ),
}
