"""Your own pairs: rows of a file, a saved data set or the hub -> records, values unchanged (standard library only).

    for record in read(Path("train.jsonl"), columns=Columns()): ...

A row has a source, and a target or a list of references; or it is a conversation, whose last answer, if it ends in one,
is the target. Without flags these columns are read, in any case: `source` and `target`; `messages`; `conversations`
(ShareGPT); `prompt` and `completion`, as texts or as messages. For other names the error says which flags to pass.
formats.py reads the rows, conversations.py the messages; wording.py makes the model's prompt from a source.
"""

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from prefixlib.data.conversations import Chat, Message, as_chat, as_messages, holds_messages
from prefixlib.data.formats import rows
from prefixlib.data.readers import Group, Record, short
from prefixlib.data.wording import fill
from prefixlib.system import files
from prefixlib.system.errors import UserError

SOURCE, TARGET, REFERENCES = "source", "target", "references"
CONVERSATIONS = ("messages", "conversations")
PROMPT, COMPLETION, SYSTEM = "prompt", "completion", "system"
KNOWN = (  # columns of well-known data sets, for guesses in errors
    *(("question", "answer"), ("question", "answers"), ("input", "output"), ("instruction", "output")),
    *(("document", "summary"), ("article", "highlights"), ("query", "response"), ("prompt", "response")),
    *(
        ("instruction", "response"),
        ("text", "summary"),
        ("text", "label"),
        ("input", "target"),
        ("context", "response"),
    ),
)
ANSWERS = tuple(dict.fromkeys(answer for _, answer in KNOWN))
HALF = re.compile("[\ud800-\udfff]")
LEAVE_OUT = "; leave the row out, or give it one"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Columns:
    """The columns to read, and how to read them."""

    source: str | None = None  # None: one of the usual names
    target: str | None = None  # None: `target`, or the usual partner of the source's name
    template: str = ""  # with names of columns in braces: the source is made from it
    quotes: bool | None = None  # quotation marks of .csv and .tsv, as in separated.py

    @classmethod
    def of(cls, task: Mapping[str, Any], source: str | None, target: str | None, quotes: bool | None = None) -> Self:
        """The columns in these settings, else those that a checkpoint was trained on."""
        return cls(
            source or task.get("source_column") or None,
            target or task.get("target_column") or None,
            task.get("source_template") or "",
            quotes,
        )


USUAL = Columns()


class BadRow(ValueError):
    """Raised for a row that cannot be used, with the column, the expected and the actual value."""


def read(path: Path, blind: bool = False, columns: Columns = USUAL) -> Iterator[Record]:
    """The records of every row, in order: one for each target or reference, or one without a text.

    Rows without a text are for decoding (`blind`); for training every row must have one. Raises UserError that names
    the file, the row (a .jsonl's line, else counted from 1), the column and the value.
    """
    kinds: set[bool] = set()
    for number, row in rows(path, columns.quotes):
        place = f"row {number}"
        try:
            source, answer = _source(row, columns)
            kinds.add(isinstance(source, Chat))
            if len(kinds) > 1:
                raise BadRow("texts and conversations in one file; give all rows the same form")
            found = list(_records(place, row, source, answer, _target(row, columns), blind))
        except BadRow as error:
            raise UserError(f"{path}: {place}: {error}") from error.__cause__
        yield from found


def _records(
    place: str, row: Mapping[str, Any], source: str, answer: str | None, target: str, blind: bool
) -> Iterator[Record]:
    """The row's records: its target or the conversation's answer, then its references."""
    texts = [_text(target, _cell(row, target))] if _cell(row, target) is not None else []
    texts += [answer] if answer is not None else []
    references = _references(row)
    filled = [text for text in texts if text.strip()]
    if not blind and not filled and (texts or not any(text.strip() for text in references)):
        raise BadRow(_nothing_to_train_on(row, source, target, bool(texts)))
    extra = [text for text in dict.fromkeys(references) if text not in filled]
    for text in filled or extra or [""]:
        yield Record(source, text, True, (), "", place)
    for text in extra if filled else ():  # references count in scores; the target is trained on
        yield Record(source, text, False, (), "", place)


def _nothing_to_train_on(row: Mapping[str, Any], source: str, target: str, empty: bool) -> str:
    if isinstance(source, Chat) and not empty:
        return (
            "the conversation ends in a message that is not the assistant's, so there is no answer to train on; leave "
            f'that message out, or give a column "{target}"'
        )
    if isinstance(source, Chat) and empty and target not in row:
        return f"the conversation's last answer: expected a text to train on, found an empty text{LEAVE_OUT}"
    what = f"an empty text{LEAVE_OUT}" if empty else f"none (the row has {_names(row)})"
    guess = next((name for name in row if name.lower() in (*ANSWERS, COMPLETION)), None)
    remedy = f"; did you mean --target_column {guess}?" if guess and target not in row else ""
    talk = next((found for found in (_like(row, name) for name in CONVERSATIONS) if found), None)
    if talk and not isinstance(source, Chat) and target not in row:  # `source` may say where it comes from
        remedy = f"; did you mean --source_column {talk}?"
    remedy = LEAVE_OUT if target in row and not empty else remedy
    return f'column "{target}": expected a text to train on, found {what}{remedy}'


# ---- columns -----------------------------------------------------------------------------------------------------


def _source(row: Mapping[str, Any], columns: Columns) -> tuple[str, str | None]:
    """The row's source, and the answer at the end of a conversation."""
    if columns.template:
        try:
            filled = fill(columns.template, row, _filled_source(row, columns))
        except ValueError as error:
            raise BadRow(f"--source_template {columns.template!r}: {error}; found {_names(row)}") from error
        if filled is not None:
            _whole("--source_template", filled)
            return filled, None
    name = columns.source or _usual_source(row)
    value = None if name is None else _cell(row, name)
    if name is None or (value is None and not _has(row, name)):
        wanted = columns.source or SOURCE
        raise BadRow(f'no column "{wanted}", found {_names(row)} ({_guess(row, columns)})')
    if name.lower() == PROMPT and columns.source is None and holds_messages(value):
        completion = _cell(row, _like(row, COMPLETION) or COMPLETION)
        return _conversation(name, [*value, *(completion if holds_messages(completion) else ())], row)
    if name.lower() in CONVERSATIONS and isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            raise BadRow(f'column "{name}": expected messages, found text that is not JSON: {short(value)}') from None
    if isinstance(value, list):
        return _conversation(name, value, row)
    text = _text(name, value)
    if not text.strip():
        raise BadRow(f'column "{name}": expected a text, found an empty one{LEAVE_OUT}')
    return text, None


def _filled_source(row: Mapping[str, Any], columns: Columns) -> str | None:
    """The text for {source} in a template with other columns, if there is one."""
    value = _cell(row, columns.source or _like(row, SOURCE) or SOURCE)
    return value if isinstance(value, str) else None


def _conversation(name: str, messages: list[Any], row: Mapping[str, Any]) -> tuple[Chat, str | None]:
    try:
        known = _with_system(as_messages(messages), row)
        tools = _tools(row)
        answer = known[-1]["content"] if known and known[-1]["role"] == "assistant" else None
        if answer is not None and known[-1].get("tool_calls"):
            raise ValueError("the last answer calls a tool, which is no text to train on; leave it out")
        if answer is not None and messages[-1].get("weight") == 0:
            raise ValueError('the last answer has "weight": 0, not to be trained on; leave the row out, or take it out')
        chat = as_chat(known if answer is None else known[:-1], tools)
    except BadRow:
        raise
    except (ValueError, TypeError) as error:
        raise BadRow(f'column "{name}": {error}; found {short(messages)}') from error
    _whole(name, f"{chat}{answer}")
    return chat, answer


def _with_system(messages: list[Message], row: Mapping[str, Any]) -> list[Message]:
    """The messages after the system's, which some programs write into a column of its own."""
    system = row.get(SYSTEM)
    if not isinstance(system, str) or not system.strip():
        return messages
    if any(message["role"] == SYSTEM for message in messages):
        raise ValueError(f'a message of the system, and a column "{SYSTEM}"; keep one of the two')
    return [{"role": SYSTEM, "content": system}, *messages]


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    """The tools that the model may call, in a column of their own, perhaps as JSON text."""
    tools = row.get("tools")
    try:
        return (json.loads(tools) if isinstance(tools, str) and tools.strip() else tools) or None
    except ValueError:
        raise BadRow(f'column "tools": expected a list, found text that is not JSON: {short(tools)}') from None


def _usual_source(row: Mapping[str, Any]) -> str | None:
    names = [SOURCE, *CONVERSATIONS, *([PROMPT] if _like(row, COMPLETION) else [])]
    return next((found for found in (_like(row, name) for name in names) if found), None)


def _target(row: Mapping[str, Any], columns: Columns) -> str:
    """The name of the target's column."""
    if columns.target:
        return columns.target
    usual = _like(row, TARGET)
    if usual or columns.source:
        return usual or TARGET
    completion = _like(row, COMPLETION)
    prompted = completion and not columns.template and _usual_source(row) == _like(row, PROMPT)
    if prompted and not (holds_messages(row[completion]) and holds_messages(row[_like(row, PROMPT)])):
        return completion
    answers = [name for name in row if name.lower() in ANSWERS]
    if columns.template and len(answers) == 1 and f"{{{answers[0]}}}" not in columns.template:
        return answers[0]
    return TARGET


def _like(row: Mapping[str, Any], name: str) -> str | None:
    """The column with a usual name: the name itself, or the only column that differs from it in case alone."""
    if name in row:
        return name
    found = [column for column in row if column.lower() == name]
    return found[0] if len(found) == 1 else None


def _has(row: Mapping[str, Any], name: str) -> bool:
    """Whether the row has the column; `a.b` is the part b of the column a."""
    if name in row:
        return True
    first, _, rest = name.partition(".")
    return bool(rest) and isinstance(row.get(first), Mapping) and _has(row[first], rest)


def _cell(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column, None if it is absent; `a.b` as in `_has`."""
    if name in row or not _has(row, name):
        return row.get(name)
    first, _, rest = name.partition(".")
    return _cell(row[first], rest)


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "no column at all"


def _guess(row: Mapping[str, Any], columns: Columns) -> str:
    """A hint: the flags that would read this row."""
    if columns.source:
        near = [name for name in row if name.strip().lower() == columns.source.strip().lower()]
        return f"did you mean --source_column {near[0]}?" if near else "--source_column names another one"
    lower = {name.lower(): name for name in row}
    if {"instruction", "input", "output"} <= lower.keys():
        template = f"{{{lower['instruction']}}}\\n{{{lower['input']}}}"
        return f'pass --source_template "{template}" --target_column {lower["output"]}'
    for first, second in KNOWN:
        if first in lower and second in lower:
            return f"pass --source_column {lower[first]} --target_column {lower[second]}"
    for name, value in row.items():
        if isinstance(value, Mapping) and len(value) > 1:  # translations: a text in each language
            one, other = [f"{name}.{part}" for part in list(value)[:2]]
            return f"pass --source_column {one} --target_column {other}, or the other way round"
    return "--source_column names another one"


# ---- values ------------------------------------------------------------------------------------------------------


def _references(row: Mapping[str, Any]) -> list[str]:
    found = row.get(REFERENCES)
    if isinstance(found, str) and found.lstrip().startswith("["):  # a cell of a .csv
        with contextlib.suppress(ValueError):
            found = json.loads(found)
    if found is None or found == "":  # an empty cell of a .csv
        return []
    if not isinstance(found, list):
        raise BadRow(f'column "{REFERENCES}": expected a list of texts, found {short(found)}')
    return [text for text in (_text(REFERENCES, text) for text in found) if text.strip()]


def _text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return _whole(name, value)
    kind = {bool: "true or false", int: "a number", float: "a number", type(None): "nothing"}.get(type(value))
    shown = "" if value is None else f" {short(value)}"
    of_lists = f'; several texts go into the column "{REFERENCES}"' if name != REFERENCES else ""
    if name.lower() == COMPLETION:
        of_lists = "; messages need a prompt that is messages too"
    remedy = {
        bool: "; put it in quotation marks",
        int: "; put it in quotation marks",
        float: LEAVE_OUT if value != value else "; put it in quotation marks",
        type(None): LEAVE_OUT,
        list: of_lists,
        dict: f"; one of its parts is --source_column {name}.PART, as a target --target_column {name}.PART",
    }.get(type(value), "")
    raise BadRow(f'column "{name}": expected a text, found{f" {kind}" * bool(kind)}{shown}{remedy}')


def _whole(name: str, text: str) -> str:
    """The text. Raises BadRow for half a character in it: a lone surrogate, "\\ud83d"."""
    half = HALF.search(text)
    if half:
        raise BadRow(f'column "{name}": expected whole characters, not half of one ({half[0]!r}), found {short(text)}')
    return text


def write(path: Path, groups: Sequence[Group], outputs: Sequence[str], scores: Sequence[float]) -> None:
    """Write one object a line: source, output, references, score. Values from `read` are unchanged."""
    lines = []
    for group, output, score in zip(groups, outputs, scores, strict=True):
        source = group.source.messages if isinstance(group.source, Chat) else group.source
        tools = {"tools": group.source.tools} if isinstance(group.source, Chat) and group.source.tools else {}
        row = {SOURCE: source, **tools, "output": output, REFERENCES: list(group.references), "score": score}
        text = json.dumps(row, ensure_ascii=False)
        for end in "\x85\u2028\u2029":  # some readers end a line at these
            text = text.replace(end, f"\\u{ord(end):04x}")
        lines.append(f"{text}\n")
    files.write_text(path, "".join(lines))
