"""From a source to the model's prompt: the source itself, in a prompt template, or in the model's chat template.

A conversation that is too long loses its earliest turns, never the last one. A turn begins at a user's message. The
system's message before the first turn stays as long as the last turn fits with it.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from prefixlib.data.conversations import Chat, Message, chat_of
from prefixlib.data.readers import short
from prefixlib.system.errors import UserError

SLOT = "{source}"  # in a template
SLOTS = re.compile(r"\{([^{}\n]+)\}")
logger = logging.getLogger(__name__)


class Filled(str):
    """A source made from a template with several columns: no template is applied to it again."""

    __slots__ = ()


def fill(template: str, row: Mapping[str, Any], source: str | None = None) -> Filled | None:
    """Fill a row's texts into a template with columns' names, and `source` into {source}.

    Returns None for a template of {source} without columns, whose other braces are text. Raises ValueError for an
    unknown column if there is no {source}, and for a value that is not a text.
    """
    names = SLOTS.findall(template)
    columns = {name for name in names if name in row and f"{{{name}}}" != SLOT}
    if SLOT in template and not columns:
        return None
    absent = [name for name in names if name not in row]
    if SLOT not in template and absent:
        raise ValueError(f"no column {', '.join(map(repr, absent))}")
    values = {name: "" if row[name] is None else row[name] for name in columns}
    wrong = next((name for name, value in values.items() if not isinstance(value, str)), None)
    if wrong is not None:
        raise ValueError(f'column "{wrong}": expected a text, found {short(values[wrong])}')
    if SLOT in template:
        values[SLOT[1:-1]] = source or ""
    if not any(value.strip() for value in values.values()):
        raise ValueError(f"columns {', '.join(map(repr, values))}: expected a text, found empty ones")
    return Filled(SLOTS.sub(lambda slot: values.get(slot[1], slot[0]), template))


def is_template(text: str) -> bool:
    """Whether a text has one place for the source, or names of columns in braces."""
    return text.count(SLOT) <= 1 and SLOTS.search(text) is not None


def check_template(template: str | None) -> None:
    """Raise UserError for a template without a place for the source, or with several."""
    if template is not None and not is_template(template):
        raise UserError(
            f"--source_template {template!r}: must hold {SLOT} once, where the source is put in, or names of columns, "
            'as in "{instruction}\\n{input}"'
        )


@dataclass(frozen=True)
class Encoded:
    """The token ids of a conversation. The last `closing` of them open the answer; `cut` did not fit."""

    ids: list[int]
    closing: int
    cut: int = 0


@dataclass(frozen=True)
class Wording:
    """Turns sources into the model's prompts."""

    template: str = ""
    chat: bool = False

    @classmethod
    def of(cls, task: Mapping[str, Any]) -> "Wording":
        """The wording of a checkpoint's training."""
        return cls(task.get("source_template") or "", task.get("chat", False))

    def source(self, given: Any) -> Any:
        """A source from an argument of `generate`; a mapping of columns fills the template. Raises UserError."""
        if not isinstance(given, Mapping) or not self.template:
            return given
        try:
            return fill(self.template, given, given.get(SLOT[1:-1])) or given[SLOT[1:-1]]
        except (ValueError, KeyError) as error:
            raise UserError(f"{short(given)} does not fit the template {self.template!r}: {error}") from error

    def text(self, source: str, tokenizer: Any) -> str:
        """The text of a source. Raises UserError for an unexpected conversation."""
        if self.chat:
            return _rendered(messages_of(source), tokenizer, _tools(source))
        if isinstance(source, Chat):
            raise UserError(f"this model was trained on texts, not on conversations: {short(str(source))}")
        around = SLOT in self.template and not isinstance(source, Filled)
        return self.template.replace(SLOT, source) if around else source

    def ending(self, source: str, tokenizer: Any) -> str:
        """The text that follows the last message's words in a conversation's text; "" for other sources.

        It is the common end of the texts with two different last messages.
        """
        if not self.chat:
            return ""
        messages = messages_of(source)
        said, tools = messages[-1]["content"], _tools(source)
        last = {**messages[-1], "content": said + ("x" if said.endswith("\u2603") else "\u2603")}
        text, other = (_rendered([*messages[:-1], end], tokenizer, tools) for end in (messages[-1], last))
        if other == text:
            raise UserError(f"the base model's chat template leaves out the last message: {short(messages[-1])}")
        return text[len(text) - _alike(text[::-1], other[::-1]) :]

    def encode(
        self, sources: Sequence[str], tokenizer: Any, rooms: Sequence[int], limit: int | None = None, **how: Any
    ) -> list[Encoded]:
        """Conversations as token ids, each in at most its room, and in `limit` tokens besides the closing ones.

        Turns are left out from the beginning. If the last turn alone is too long, the end of its last message is
        cut, but not what follows that in the template. how: for the tokenizer.
        """
        found = []
        for source, room, whole in zip(sources, rooms, self._encoded(sources, tokenizer, how), strict=True):
            room = room if limit is None else min(room, limit + whole.closing)
            shortest = whole
            for kept in _shortened(messages_of(source)) if len(whole.ids) > room else ():
                (shortest,) = self._encoded([chat_of(kept, _tools(source))], tokenizer, how)
                if len(shortest.ids) <= room:
                    break
            ids = cut_end(shortest.ids, room, shortest.closing)
            found.append(Encoded(ids, shortest.closing, len(whole.ids) - len(ids)))
        return found

    def _encoded(self, sources: Sequence[str], tokenizer: Any, how: Mapping[str, Any]) -> list[Encoded]:
        """Whole conversations. Texts are tokenised a second time without their endings, to count the closing tokens."""
        texts = [self.text(source, tokenizer) for source in sources]
        endings = [self.ending(source, tokenizer) for source in sources]
        starts = [text[: len(text) - len(ending)] for text, ending in zip(texts, endings, strict=True)]
        ids, begun = (tokenizer(part, **how)["input_ids"] if part else [] for part in (texts, starts))
        return [Encoded(row, max(len(row) - _alike(row, start), 1)) for row, start in zip(ids, begun, strict=True)]


PLAIN = Wording()


def cut_end(ids: list[int], room: int, closing: int = 1) -> list[int]:
    """Cut to `room` tokens and keep the last `closing` ones. Raises UserError if these alone do not fit."""
    if len(ids) <= room:
        return ids
    if room < closing:
        raise UserError(f"the chat template's end alone takes {closing} tokens; there is room for {room}")
    return ids[: room - closing] + ids[-closing:]


def messages_of(source: str) -> list[Message]:
    """The messages of a conversation; a text is a user's message."""
    return source.messages if isinstance(source, Chat) else [{"role": "user", "content": source}]


def _tools(source: str) -> list[Any] | None:
    return source.tools if isinstance(source, Chat) else None


def _shortened(messages: Sequence[Message]) -> Iterable[list[Message]]:
    """Yield the conversation with fewer and fewer of its earliest turns, at last also without the system's message."""
    turns = [n for n, message in enumerate(messages) if message["role"] == "user"]
    system = list(takewhile(lambda message: message["role"] in ("system", "developer"), messages))
    yield from ([*system, *messages[start:]] for start in turns if start > len(system))
    if system and turns:
        yield list(messages[turns[-1] :])


def _rendered(messages: list[Message], tokenizer: Any, tools: Any) -> str:
    """The chat template's text. Raises UserError if there is no template, it refuses, or it leaves out tools."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("the base model has no chat template, which `messages` need: give a column of texts instead")
    how = {"tokenize": False, "add_generation_prompt": True, **({"tools": tools} if tools else {})}

    def render(part: list[Message], **other: Any) -> str:
        try:
            return tokenizer.apply_chat_template(part, **{**how, **other})
        except Exception as error:  # the template itself may raise: roles that do not alternate, no system message
            raise UserError(f"the base model's chat template refuses {short(part)}: {error}") from error

    text = render(messages)
    for n, message in enumerate(messages):
        bare = {name: value for name, value in message.items() if name != "tool_calls"}
        bare = {**bare, "content": f"{message['content']}x"} if message["role"] == "tool" else bare
        if bare != message and render([*messages[:n], bare, *messages[n + 1 :]]) == text:
            raise UserError(
                f"the base model's chat template leaves out tools: {short(message)}; write what they say as text, or "
                "use a base model whose template shows them"
            )
    if tools and render(messages, tools=None) == text:
        raise UserError(f"the base model's chat template leaves out the column tools: {short(tools)}; take it out")
    return text


def _alike(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The length of the common beginning of two sequences."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
