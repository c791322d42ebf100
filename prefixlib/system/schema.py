"""Reading JSON files back, checked against a shape that is written as types (standard library only).

    class Base(TypedDict, total=False):
        name: str | None
        revision: str | None

    base = schema.read(path, Base, "use another checkpoint")

A shape is str, int, float, bool, None, a union of these, list[X], dict[str, X], Any, a TypedDict (other keys are
allowed) or a dataclass (other keys are refused).
"""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any

from prefixlib.system.errors import UserError

WORDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    types.NoneType: "null",
    list: "a list",
    dict: "an object in braces",
}


def read(path: Path | str, shape: Any, remedy: str) -> Any:
    """The JSON in the file `path`. Raises OSError if it cannot be read.

    Raises UserError, which ends with `remedy`, what to do, if it is damaged or of another shape.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        wrong = misfit(value, shape)
    except UnicodeDecodeError as error:
        wrong = f"not UTF-8 text: {error.reason}"
    except RecursionError:
        wrong = "nested too deeply"
    except ValueError as error:
        wrong = f"not JSON: {error}"
    if wrong:
        raise UserError(f"{path} is damaged ({wrong}); {remedy}")
    return value


def misfit(value: Any, shape: Any, place: str = "") -> str | None:
    """The first misfit of a value, in words that name its place (`a.b`, `a[0]`); None if all of it fits the shape."""
    if shape is Any:
        return None
    if typing.is_typeddict(shape) or dataclasses.is_dataclass(shape):
        return _misfit_of_object(value, shape, place)
    kind, inside = typing.get_origin(shape) or shape, typing.get_args(shape)
    if kind is types.UnionType:
        wrong = [misfit(value, each, place) for each in inside]
        return None if None in wrong else _not(value, " or ".join(map(_in_words, inside)), place)
    if kind in (list, dict):
        if not isinstance(value, kind):
            return _not(value, _in_words(kind), place)
        items = enumerate(value) if kind is list else value.items()
        parts = (misfit(part, inside[-1], f"{place}[{key!r}]") for key, part in items) if inside else ()
        return next(filter(None, parts), None)
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        return _not(value, _in_words(kind), place)
    return None


def _misfit_of_object(value: Any, shape: Any, place: str) -> str | None:
    if not isinstance(value, dict):
        return _not(value, _in_words(dict), place)
    kinds = typing.get_type_hints(shape)
    if dataclasses.is_dataclass(shape):
        fields = dataclasses.fields(shape)
        needed = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
        unknown = sorted(value.keys() - kinds.keys())
        if unknown:
            return f"{place + ': ' if place else ''}{', '.join(unknown)} not known"
    else:
        needed = shape.__required_keys__
    absent = sorted(needed - value.keys())
    if absent:
        return f"{place + ': ' if place else ''}no {', '.join(absent)}"
    dot = f"{place}." if place else ""
    parts = (misfit(value[name], kind, f"{dot}{name}") for name, kind in kinds.items() if name in value)
    return next(filter(None, parts), None)


def _in_words(kind: Any) -> str:
    return WORDS.get(typing.get_origin(kind) or kind, WORDS[dict])


def _not(value: Any, wanted: str, place: str) -> str:
    shown = repr(value)
    return f"{place or 'it'} is {shown[:40]}{'…' * (len(shown) > 40)}, not {wanted}"
