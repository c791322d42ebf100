"""Conversations as data: messages in the forms of other tools -> one form (standard library only).

A message has a role and a content. Two forms are read. OpenAI and transformers write `{"role": "user", "content":
"..."}`, where the content may be a list of text parts and an assistant's message may call tools; ShareGPT writes
`{"from": "human", "value": "..."}`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SHAREGPT = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "model": "assistant", "tool": "tool", "observation": "tool",
}  # fmt: skip
KEPT = ("name", "tool_calls", "tool_call_id")  # keys besides role and content that a chat template may show
Message = dict[str, Any]


class Chat(str):
    """A source that is a conversation: its messages as JSON text, so that it can be compared and stored like others.

    If there are `tools` that the model may call, they are part of the text.
    """

    __slots__ = ()

    @property
    def messages(self) -> list[Message]:
        found = json.loads(self)
        return found if isinstance(found, list) else found["messages"]

    @property
    def tools(self) -> list[Any] | None:
        found = json.loads(self)
        return None if isinstance(found, list) else found["tools"]


def as_chat(messages: Iterable[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> Chat:
    """A conversation from data: [{"role": "user", "content": "..."}, ...]. Raises ValueError for anything else."""
    found = as_messages(messages)
    if not found or found[-1]["role"] == "assistant":
        raise ValueError("a conversation to be answered ends in a message that is not the assistant's")
    return chat_of(found, tools)


def chat_of(messages: Sequence[Message], tools: Sequence[Any] | None = None) -> Chat:
    """A conversation of messages that already have the one form."""
    found = {"messages": list(messages), "tools": list(tools)} if tools else list(messages)
    return Chat(json.dumps(found, ensure_ascii=False))


def as_messages(messages: Any) -> list[Message]:
    """The messages in one form. Raises ValueError for anything but messages, and for parts that are not text."""
    if isinstance(messages, (str, Mapping)):
        raise ValueError("a conversation is a list of messages")
    return [_message(message) for message in messages]


def holds_messages(value: Any) -> bool:
    """Whether a cell looks like a conversation: a list of objects."""
    return isinstance(value, list) and bool(value) and all(isinstance(message, Mapping) for message in value)


def _message(message: Any) -> Message:
    wanted = 'a conversation is a list of {"role": text, "content": text}'
    if not isinstance(message, Mapping):
        raise ValueError(wanted)
    if "from" in message and "role" not in message:  # ShareGPT
        role = SHAREGPT.get(message["from"]) if isinstance(message["from"], str) else None
        if role is None:
            raise ValueError(f'"from" is one of {", ".join(SHAREGPT)}, not {message["from"]!r}')
        message = {"role": role, "content": message.get("value")}
    role, calls = message.get("role"), message.get("tool_calls")
    content = _content(message.get("content"))
    if content is None and calls:
        content = ""  # transformers' templates write None as a word
    if not isinstance(role, str) or content is None:
        raise ValueError(wanted)
    role = SHAREGPT.get(role.lower(), role)
    kept = {name: message[name] for name in KEPT if message.get(name)}
    if calls:
        kept["tool_calls"] = [_call(call) for call in calls]
    return {"role": role, "content": content, **kept}


def _content(content: Any) -> str | None:
    """A message's text; None if there is none."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    for part in content:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise ValueError(f'a content\'s parts are {{"type": "text", "text": text}}, not {kind!r}; leave others out')
    return "".join(part["text"] for part in content)


def _call(call: Any) -> Any:
    """A tool call with its arguments as data, as chat templates expect them; OpenAI writes them as JSON in a text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}
