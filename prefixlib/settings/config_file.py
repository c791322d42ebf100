"""--config FILE: flags from a file; those of the command line override them (standard library; PyYAML for YAML).

FILE.yaml or .json     flag names and values: `learning_rate: 1e-4`, `bf16: yes`
results.json           of an earlier run: its settings
command.txt            of an earlier run: its command line
"""

import argparse
import difflib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixlib.system import schema
from prefixlib.system.errors import UserError

FLAG = "--config"


def expand(argv: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """`argv`, preceded by those flags of its --config file that it does not contain itself.

    Raises UserError for a file that cannot be read, and for a name that is not a flag of the parser.
    """
    words, path = _take(list(argv))
    if path is None:
        return words
    known = parser._option_string_actions
    given = {known[word.split("=")[0]].dest for word in words if word.split("=")[0] in known}
    found = []
    for name, value in _read(Path(path).expanduser(), known).items():
        if f"--{name}" not in known:
            guess = difflib.get_close_matches(f"--{name}", known, 1)
            raise UserError(f"{path}: --{name} is not a flag here{f'; did you mean {guess[0]}?' if guess else ''}")
        if known[f"--{name}"].dest in given:
            continue
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, (dict, list)):
                raise UserError(f"{path}: {name}: expected a value, found {one!r}")
            text = {True: "yes", False: "no"}[one] if isinstance(one, bool) else one
            found += [] if text is None else [f"--{name}={text}"]
    return found + words


def _take(words: list[str]) -> tuple[list[str], str | None]:
    """Split the words into those without --config, and its value."""
    for n, word in enumerate(words):
        if word.startswith(f"{FLAG}="):
            return words[:n] + words[n + 1 :], word.removeprefix(f"{FLAG}=")
        if word == FLAG and n + 1 < len(words):
            return words[:n] + words[n + 2 :], words[n + 1]
    return words, None


def _read(path: Path, known: Mapping[str, Any]) -> Mapping[str, Any]:
    """The flag names and values in the file."""
    if not path.is_file():
        raise UserError(f"{FLAG} {path}: no such file")
    if path.suffix == ".txt":
        return _of_command(path)
    if path.suffix == ".json":
        found = schema.read(path, dict[str, Any], "give a file of flag names and values")
        if not isinstance(found.get("run"), dict):
            return found
        # results.json also records the machine of the run
        settings = {name: value for name, value in found["run"].items() if f"--{name}" in known}
        return {name: value for name, value in settings.items() if value not in ("", [])}
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise UserError(f"{path}: expected flag names and values, such as `learning_rate: 1e-4`")
    return found


def _of_command(path: Path) -> dict[str, Any]:
    """The flags of the command line in a command.txt."""
    try:
        words = shlex.split(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not a command line: {error}") from None
    found: dict[str, Any] = {}
    start = next((n for n, word in enumerate(words) if word.endswith(".py")), -1) + 1
    for word, following in zip(words[start:], [*words[start + 1 :], ""], strict=True):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found.setdefault(name, []).append(value if equals else following)
    return found
