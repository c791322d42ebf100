"""Your own pairs: rows of a file, of a saved data set or of the hub -> records, values unchanged.

    for record in read(Path("train.jsonl"), Columns()): ...

A row has a source, and a target or a list of references; or it has `messages`, a conversation whose last answer, if it
ends in one, is the target. .jsonl, .json, .csv and .tsv are read here, for `datasets` guesses types: of the text
"2020-01-01" it makes a date, of NA nothing. It reads the others: .parquet, folders of save_to_disk, names on the hub.
(Standard library only; datasets is imported where it is needed.)
"""

import csv
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from prefixlib import files
from prefixlib.errors import UserError
from prefixlib.readers import Group, Record, check_whole, short

SOURCE, TARGET, REFERENCES, MESSAGES = "source", "target", "references", "messages"
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
HUB_SPLITS = {"train": "train", "valid": "validation", "test": "test"}
SLOT = "{source}"  # in a template


@dataclass(frozen=True)
class Columns:
    """Which columns are read."""

    source: str | None = None  # None: `source`, or `messages` where there is none
    target: str = TARGET

    @classmethod
    def of(cls, task: Mapping[str, Any], source: str | None, target: str | None) -> Self:
        """Those that are given, else those that a checkpoint was trained on."""
        return cls(source or task.get("source_column") or None, target or task.get("target_column") or TARGET)


USUAL = Columns()
logger = logging.getLogger(__name__)


class Chat(str):
    """A source that is a conversation: its messages as JSON text, so that it can be compared and stored like others."""

    __slots__ = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        return json.loads(self)


def as_chat(messages: Iterable[Mapping[str, str]]) -> Chat:
    """A conversation given as data: [{"role": "user", "content": "..."}, ...]. Raises ValueError for anything else."""
    found = list(messages)
    for message in found:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError('a conversation is a list of {"role": text, "content": text}')
    if not found or found[-1]["role"] == "assistant":
        raise ValueError("a conversation to be answered ends in a message that is not the assistant's")
    return Chat(json.dumps([{k: m[k] for k in ("role", "content")} for m in found], ensure_ascii=False))


@dataclass(frozen=True)
class Wording:
    """What the model reads of a source: the source itself, a template around it, or what its chat template makes."""

    template: str = ""
    chat: bool = False

    @classmethod
    def of(cls, task: Mapping[str, Any]) -> Self:
        """As the training of a checkpoint had it."""
        return cls(task.get("source_template") or "", task.get("chat", False))

    def text(self, source: str, tokenizer: Any) -> str:
        """The text of a source. Raises UserError where a conversation is given and none is expected."""
        if self.chat:
            return self._rendered(source, tokenizer)
        if isinstance(source, Chat):
            raise UserError(f"this model was trained on texts, not on conversations: {short(str(source))}")
        return self.template.replace(SLOT, source) if self.template else source

    def ending(self, source: str, tokenizer: Any) -> str:
        """The end of a conversation's text behind its last message: what opens the answer; "" for other sources."""
        if not self.chat:
            return ""
        text, said = self._rendered(source, tokenizer), self._messages(source)[-1]["content"]
        said = said if said in text else said.strip()  # many templates strip
        return text[text.rindex(said) + len(said) :] if said in text else ""

    def _messages(self, source: str) -> list[dict[str, str]]:
        return source.messages if isinstance(source, Chat) else [{"role": "user", "content": source}]

    def _rendered(self, source: str, tokenizer: Any) -> str:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "the base model has no chat template, which `messages` need: give a column of texts instead"
            )
        try:
            return tokenizer.apply_chat_template(self._messages(source), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # the template itself may raise: roles that do not alternate, no system message
            raise UserError(f"the base model's chat template refuses {short(str(source))}: {error}") from error


PLAIN = Wording()


def warn_of_lost_characters(tokenizer: Any, texts: Iterable[str]) -> None:
    """Warn where a tokenizer does not give a text back unchanged: T5's, for example, has no line break."""
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if found != text:
            logger.warning("the tokenizer does not keep every character: of %s it makes %s", short(text), short(found))
            return


def check_template(template: str | None) -> None:
    """Raise UserError for a template that no source would stand in."""
    if template is not None and template.count(SLOT) != 1:
        raise UserError(f"--source_template {template!r}: must hold {SLOT} once, where the source is put in")


# ---- where rows are ----------------------------------------------------------------------------------------------


def place(given: str, split: str) -> Path:
    """What --train_file, --eval_file or --test_file names: an absolute path, or OWNER/NAME:SPLIT on the hub."""
    path = Path(given).expanduser()
    is_path = path.exists() or path.suffix in SUFFIXES or path.is_absolute() or given.startswith((".", "~"))
    if is_path or given.count("/") > 1:
        return path.resolve()
    return Path(given if ":" in given else f"{given}:{HUB_SPLITS[split]}")


def is_hub(path: Path) -> bool:
    """True for what `place` gives for a name on the hub."""
    return not path.is_absolute() and ":" in path.name and not path.exists()


def read(path: Path, blind: bool = False, columns: Columns = USUAL) -> Iterator[Record]:
    """The records of every row, in order: one for each target or reference, one without a text where there is none.

    That is for decoding (`blind`); for training every row must have a text.
    Raises UserError that names the file, the row (a .jsonl's line, else counted from 1), the column and what was found.
    """
    kinds: set[bool] = set()
    for number, row in rows(path):
        place = f"row {number}"
        source, answer = _source(path, place, row, columns)
        kinds.add(isinstance(source, Chat))
        if len(kinds) > 1:
            raise UserError(f"{path}: {place}: texts and conversations in one file; give all rows the same form")
        texts = [text for text in (_optional(path, place, row, columns.target), answer) if text is not None]
        references = _references(path, place, row)
        filled = [text for text in texts if text.strip()]
        if not blind and not filled and (texts or not any(text.strip() for text in references)):
            what = "an empty text" if texts else f"none (the row has {', '.join(map(repr, row))})"
            raise UserError(f'{path}: {place}: column "{columns.target}": expected a text to train on, found {what}')
        extra = [text for text in dict.fromkeys(references) if text not in filled]
        for text in filled or extra or [""]:
            yield Record(source, text, True, (), "")
        for text in extra if filled else ():  # they count in scores; trained on is the target
            yield Record(source, text, False, (), "")


def _source(path: Path, place: str, row: Mapping[str, Any], columns: Columns) -> tuple[str, str | None]:
    """The row's source, and the answer that a conversation ends in."""
    name = columns.source or (MESSAGES if SOURCE not in row and MESSAGES in row else SOURCE)
    if name not in row:
        raise UserError(
            f'{path}: {place}: no column "{name}", found {", ".join(map(repr, row)) or "no column at all"} '
            "(--source_column names another one)"
        )
    if not isinstance(row[name], list):
        text = _text(path, place, name, row[name])
        if not text.strip():
            raise UserError(f'{path}: {place}: column "{name}": expected a text, found an empty one')
        return text, None
    messages = row[name]
    last = messages[-1] if messages else None
    answer = last.get("content") if isinstance(last, Mapping) and last.get("role") == "assistant" else None
    try:
        chat = as_chat(messages if answer is None else messages[:-1])
    except (ValueError, TypeError) as error:
        raise UserError(f'{path}: {place}: column "{name}": {error}; found {short(messages)}') from error
    check_whole(path, f'{place}: column "{name}"', str(chat))
    return chat, None if answer is None else _text(path, place, name, answer)


def _optional(path: Path, place: str, row: Mapping[str, Any], name: str) -> str | None:
    return None if row.get(name) is None else _text(path, place, name, row[name])


def _references(path: Path, place: str, row: Mapping[str, Any]) -> list[str]:
    found = row.get(REFERENCES)
    if found is None or found == "":  # an empty cell of a .csv
        return []
    if not isinstance(found, list):
        raise UserError(f'{path}: {place}: column "{REFERENCES}": expected a list of texts, found {short(found)}')
    return [text for text in (_text(path, place, REFERENCES, text) for text in found) if text.strip()]


def _text(path: Path, place: str, name: str, value: Any) -> str:
    where = f'{place}: column "{name}"'
    if not isinstance(value, str):
        kind = {bool: "true or false", int: "a number", float: "a number", type(None): "nothing"}.get(type(value))
        shown = "" if value is None else f" {short(value)}"
        raise UserError(f"{path}: {where}: expected a text, found{f' {kind}' * bool(kind)}{shown}")
    check_whole(path, where, value)
    return value


def write(path: Path, groups: Sequence[Group], outputs: Sequence[str], scores: Sequence[float]) -> None:
    """One object a line: source, output, references, score. What `read` gave stands there as it was."""
    lines = []
    for group, output, score in zip(groups, outputs, scores, strict=True):
        source = group.source.messages if isinstance(group.source, Chat) else group.source
        row = {SOURCE: source, "output": output, REFERENCES: list(group.references), "score": score}
        text = json.dumps(row, ensure_ascii=False)
        for end in "\x85\u2028\u2029":  # some readers end a line there
            text = text.replace(end, f"\\u{ord(end):04x}")
        lines.append(f"{text}\n")
    files.write_text(path, "".join(lines))


# ---- rows of each kind of file -----------------------------------------------------------------------------------


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) of everything that `place` can name. Raises UserError where it is absent or cannot be read."""
    if path.is_dir():
        return enumerate(_saved(path), start=1)
    if is_hub(path):
        return enumerate(_hub(path), start=1)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _separated, ".tsv": _separated, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: its name must end in {', '.join(readers)}, or be a folder of save_to_disk")
    return readers[path.suffix.lower()](path)


def _objects(path: Path, found: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, row in found:
        if not isinstance(row, dict):
            raise UserError(f'{path}: row {number}: expected an object like {{"source": text}}, found {short(row)}')
        yield number, row


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # not read_text, which would change line ends inside values
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); convert it to UTF-8") from None


def _parsed(path: Path, text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: {place or f'line {error.lineno}'}: not JSON: {error.msg}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply; a number with thousands of digits
        raise UserError(f"{path}: {place or 'the file'}: not a row of data: {error}") from None


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = enumerate(_decoded(path).split("\n"), start=1)
    return _objects(path, ((n, _parsed(path, line, f"row {n}")) for n, line in lines if line.strip()))


def _json(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    found = _parsed(path, _decoded(path), "")
    if not isinstance(found, list):
        raise UserError(f"{path}: expected a list of objects, found {short(found)}")
    return _objects(path, enumerate(found, start=1))


def _separated(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Comma- or tab-separated values with a head line, quoted as RFC 4180 says: a quoted value may have line breaks."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default of 128 KiB is less than a document can have
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    lines = csv.reader(_line_ends(path), delimiter=delimiter, strict=True)
    number, head = 0, None
    try:
        for cells in lines:
            if not cells:
                continue
            if head is None:
                head = cells
                if len(head) == 1 and ";" in head[0]:
                    raise UserError(f'{path}: columns seem to be separated by ";"; a {path.suffix} file has ","')
                continue
            number += 1
            if len(cells) != len(head):
                raise UserError(
                    f"{path}: row {number}: {len(cells)} values for the {len(head)} columns of the first line"
                )
            yield number, dict(zip(head, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}: row {number + 1}, line {lines.line_num}: {error}") from None


def _line_ends(path: Path) -> Iterator[str]:
    """The lines of a file, split at newlines alone, with their ends."""
    parts = _decoded(path).split("\n")
    yield from (f"{part}\n" for part in parts[:-1])
    if parts[-1]:
        yield parts[-1]


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import datasets

    how = {"data_files": str(path), "split": "train", "streaming": True}  # streamed, no copy goes into a cache
    return enumerate(_library(path, lambda: list(datasets.load_dataset("parquet", **how))), start=1)


def _saved(path: Path) -> Iterable[dict[str, Any]]:
    """A folder of save_to_disk, of one data set; of several (a DatasetDict) its parts are folders of their own."""
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
    """What `datasets` tells a data set of the hub from another one by."""
    return _hub(path)._fingerprint


def _library(path: Path, load: Any) -> Any:
    """What `datasets` reads; what goes wrong becomes one line."""
    import datasets

    datasets.disable_progress_bars()
    try:
        return load()
    except Exception as error:  # several exception types: its own, pyarrow's and the hub's
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        wanted = "a data set of the hub, and no file of that name is here" if is_hub(path) else "a data set"
        raise UserError(f"{path}: cannot be read as {wanted}: {reason}") from error
