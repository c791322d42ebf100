"""Settings as data: every flag is one field of a frozen dataclass, from which the parser is made (standard library).

    @dataclass(frozen=True)
    class Settings(Training):
        objective_mode: int = flag(1, "a prefix's loss ...", OBJECTIVE, choices=range(5))

A field's annotation is the flag's type; bool is spelled yes / no on the command line. `Training` holds the flags that
both trees have. Each tree's flags.py adds its own; HELP there has the help of flags that mean the same and are worded
for the tree, and a field is declared again for another default, type or choice only.
"""

import argparse
import dataclasses
import difflib
import math
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from prefixlib.settings import config_file
from prefixlib.system.errors import UserError

DECODE = ("valid", "test", "both", "none")
QUANTIZATIONS = ("no", "4bit", "8bit", "int8")

# Bounds of a search, in both trees: beyond them numbers overflow, no token is left, or memory runs out.
SEARCH_BOUNDS: Mapping[str, Mapping[str, float]] = {
    "num_beams": {"above": 0, "below": 1001},
    "length_penalty": {"above": -11, "below": 11},
    "top_p": {"low": 1e-6},
    "temperature": {"low": 1e-3, "below": 1001},
}

TASK = "task and data"
MODEL = "base model"
METHOD = "method"
START = "initialisation of the prefix (default: random; section 7.4)"
TRAINING = "training"
RECORDS = "evaluation, checkpoints, what happens afterwards"
DECODING = "decoding"
RARE = "rarely needed"  # last in --help
USAGE = "%(prog)s [--FLAG VALUE ...]"
REPORTS = ("tensorboard", "wandb", "mlflow", "none")


def flag(
    default: Any,
    help: str,
    group: str,
    *,
    choices: Iterable[Any] | None = None,
    low: float | None = None,
    above: float | None = None,
    below: float | None = None,
    names: tuple[str, ...] = (),
    escapes: bool = False,
) -> Any:
    """A dataclass field that is a flag.

    low (included), above, below: the bounds of a number; every number must be finite. names: other spellings.
    escapes: the command line may write \\n and \\t for a line break and a tab, as always for a tuple of
    texts, whose flag may be given several times.
    """
    metadata = {"help": help, "group": group, "choices": choices and tuple(choices), "names": names, "escapes": escapes}
    return dataclasses.field(default=default, metadata={**metadata, "low": low, "above": above, "below": below})


def _guesses(word: str, known: Sequence[str]) -> list[str]:
    """A guess for an unknown flag: one that begins with it, has its initials, or is spelled nearly alike."""
    begun = [flag for flag in known if flag.startswith(f"{word}_")]
    initials = [flag for flag in known if "--" + "".join(part[0] for part in flag[2:].split("_") if part) == word]
    return (begun or initials or difflib.get_close_matches(word, known, 1))[:1]


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines, and ends each help with the default unless the text says it or there is none."""

    def _get_help_string(self, action: argparse.Action) -> str:
        said = "(default" in action.help or action.default in (None, (), argparse.SUPPRESS) or action.nargs == 0
        return action.help if said or action.required else f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """ArgumentParser that reports mistakes in one line with exit code 2 and accepts no shortened flags."""

    def __init__(self, **kwargs):
        super().__init__(**{"allow_abbrev": False, "formatter_class": _Help, **kwargs})

    def format_help(self) -> str:
        """As in argparse, but with the rarely needed flags last."""
        self._action_groups.sort(key=lambda group: group.title == RARE)
        return super().format_help()

    def parse_known_args(self, args=None, namespace=None):
        """As in argparse, after the flags of a --config file were put before the others."""
        words = list(sys.argv[1:] if args is None else args)
        takes_file = config_file.FLAG in self._option_string_actions
        return super().parse_known_args(config_file.expand(words, self) if takes_file else words, namespace)

    def error(self, message: str):
        self.exit(2, f"error: {message}{self._did_you_mean(message)} (see {self.prog} --help)\n")

    def _did_you_mean(self, message: str) -> str:
        """A guess for each unknown flag."""
        if not message.startswith("unrecognized arguments"):
            return ""
        unknown = [word.split("=")[0] for word in message.split() if word.startswith("--")]
        known = list(self._option_string_actions)
        guesses = [guess for word in unknown for guess in _guesses(word, known)]
        return f"; did you mean {', '.join(guesses)}?" if guesses else ""


@dataclass(frozen=True)
class Flags:
    """Base class of all sets of flags."""

    HELP: ClassVar[Mapping[str, str]] = {}  # name -> help that replaces the one of the inherited field

    @classmethod
    def help_of(cls, field: dataclasses.Field) -> str:
        """The help of a field in this class."""
        return cls.HELP.get(field.name, field.metadata["help"])

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        """Add a flag for every field, in groups."""
        if config_file.FLAG not in parser._option_string_actions:
            parser.add_argument(
                config_file.FLAG,
                metavar="FILE",
                help="flags from a file: FILE.yaml, or a run's settings.json, results.json or command.txt; the "
                "command line overrides them",
            )
        groups = {group.title: group for group in parser._action_groups}
        for field in fields(cls):
            about = field.metadata
            if about["group"] not in groups:
                groups[about["group"]] = parser.add_argument_group(about["group"])
            kind = _kind(field)
            options = {"type": kind, "choices": about["choices"], "default": field.default}
            options["help"] = cls.help_of(field)
            if kind is bool:
                choices = about["choices"] or (True, False)
                options |= {"type": str, "choices": tuple(map(spelled, choices)), "default": spelled(field.default)}
            if kind in (int, float) and not about["choices"]:
                options["metavar"] = "N"
            if kind is tuple:
                options |= {"action": _Collect, "type": unescaped}
            if about["escapes"]:
                options["type"] = unescaped
            groups[about["group"]].add_argument(f"--{field.name}", *about["names"], dest=field.name, **options)

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Self:
        """The settings that a parsed command line holds."""
        values = {field.name: getattr(args, field.name) for field in fields(cls)}
        switches = [field.name for field in fields(cls) if _kind(field) is bool]
        return cls(**values | {name: values[name] == "yes" if values[name] else None for name in switches})

    @classmethod
    def default(cls, name: str) -> Any:
        """The default of a setting."""
        return next(field.default for field in fields(cls) if field.name == name)

    def as_flags(self) -> dict[str, Any]:
        """The settings by flag name, spelled as on the command line; those that are None are left out."""
        values = {field.name: spelled(getattr(self, field.name)) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def check_values(self) -> None:
        """Raise UserError for a value outside its choices or bounds, or of another type, naming the flag."""
        for field in fields(self):
            value, about, kind = getattr(self, field.name), field.metadata, _kind(field)
            if value is None:
                if field.default is not None:
                    raise UserError(f"--{field.name}: a value is missing")
                continue
            shown = f"--{field.name} {spelled(value)}"
            if kind in (int, float):
                if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
                    raise UserError(f"{shown}: must be a number" + " without a fraction" * (kind is int))
                wanted = out_of_bounds(value, about["low"], about["above"], about["below"])
                if wanted:
                    raise UserError(f"{shown}: must be {wanted}")
            elif kind is tuple:
                if not isinstance(value, tuple) or not all(isinstance(text, str) and text for text in value):
                    raise UserError(f"--{field.name} {value!r}: must be texts that are not empty")
            elif not isinstance(value, kind):
                raise UserError(f"{shown}: must be {'yes or no' if kind is bool else 'a text'}, not {value!r}")
            if about["choices"] and value not in about["choices"]:
                raise UserError(f"{shown}: one of {', '.join(str(spelled(choice)) for choice in about['choices'])}")

    def check_only_with(self, rules: Iterable["Only"]) -> None:
        """Refuse a flag that differs from its default if another flag leaves it without effect.

        Published commands contain --preseqlen and --optim_prefix in every tuning mode, so no rule names them.
        """
        for rule in rules:
            other = getattr(self, rule.other)
            if getattr(self, rule.flag) != self.default(rule.flag) and other not in rule.values:
                shown = f"--{rule.other}" if other is None else f"--{rule.other} {spelled(other)}"
                refuse_together(f"no {shown}" if other is None else shown, f"--{rule.flag}", rule.why)


@dataclass(frozen=True)
class Only:
    """A flag that has an effect only with certain values of another one."""

    flag: str
    other: str
    values: tuple[Any, ...]
    why: str


def _kind(field: dataclasses.Field) -> type:
    """The type of a flag's value, without the None of an optional one."""
    if isinstance(field.type, types.UnionType):
        return next(kind for kind in field.type.__args__ if kind is not types.NoneType)
    return tuple if isinstance(field.type, types.GenericAlias) else field.type


class _Collect(argparse.Action):
    """A flag that may be given several times; `append` would want its default to be a list."""

    def __call__(self, parser, namespace, value, option_string=None):
        known = getattr(namespace, self.dest)
        setattr(namespace, self.dest, (*(known if isinstance(known, tuple) else ()), value))


def unescaped(text: str) -> str:
    r"""The text with \n and \t replaced by a line break and a tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def out_of_bounds(
    value: float, low: float | None = None, above: float | None = None, below: float | None = None
) -> str | None:
    """The rule that a number breaks, in words: finite, at least `low`, `above`, `below`; None if it breaks none.

    Whole numbers have 31 bits unless `below` says otherwise.
    """
    if isinstance(value, int) and below is None and abs(value) >= 2**31:
        return "between -2147483648 and 2147483648"
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if (low is None or value >= low) and (above is None or value > above) and (below is None or value < below):
        return None
    bounds = (("at least", low), ("above", above), ("below", below))
    return " and ".join(f"{words} {bound}" for words, bound in bounds if bound is not None)


def add_number(group: Any, flag: str, kind: type = int, *, help: str, **about: Any) -> None:
    """Add a number to a parser that is not made from settings, with its bounds: low, above, below.

    Parsing raises UserError that names flag and value. `about` may also contain arguments of add_argument.
    """
    bounds = {name: about.pop(name) for name in ("low", "above", "below") if name in about}

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            wanted = "a number" + " without a fraction" * (kind is int)
        else:
            wanted = out_of_bounds(value, **bounds)
        if wanted:
            raise UserError(f"{flag} {text[:40]}: must be {wanted}")
        return value

    group.add_argument(flag, type=parse, metavar=about.pop("metavar", "N"), help=help, **about)


def add_yes_no(group: Any, flag: str, default: str | None, help: str) -> None:
    """Add a switch to a parser that is not made from settings."""
    group.add_argument(flag, choices=("yes", "no"), default=default, help=help)


def spelled(value: Any) -> Any:
    """A value in the command line's spelling."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


def refuse_together(first: str, second: str, why: str) -> None:
    """Raise UserError for two flags that contradict each other."""
    raise UserError(f"{first} and {second} do not go together: {why}")


def text_or_file(flag: str, value: str) -> str:
    """The text of a flag, or for @FILE the file's content without its last newline.

    Raises UserError if the file can't be read.
    """
    if not value.startswith("@"):
        return value
    path = Path(value[1:]).expanduser()
    try:
        return path.read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{flag} {value}: {path} cannot be read ({reason})") from error


def explicit_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> set[str]:
    """The names of the flags in argv, as opposed to those left at their defaults."""
    unset = object()
    blank = argparse.Namespace(**{action.dest: unset for action in parser._actions})
    parsed = parser.parse_args(argv, namespace=blank)
    return {name for name, value in vars(parsed).items() if value is not unset}
