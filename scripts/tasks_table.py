"""Write the tables of docs/tasks.md, from prefixlib/data/tasks.py, the metrics' rows and the classes of flags.

python scripts/tasks_table.py
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2.flags import DEFAULT_MODEL, Decoding
from gpt2.flags import Settings as GPT2Settings
from page_parts import replace_part
from prefixlib.data import readers
from prefixlib.data.tasks import ROWS, data_file, iter_records, prompt_text, training_text
from prefixlib.metrics.tasks import TASKS as METRICS
from prefixlib.runs.launch import Launch
from prefixlib.settings.flags import RARE, spelled
from prefixlib.system.errors import one_line_errors
from prefixlib.system.places import DEMO_DATA, REPOSITORY
from seq2seq.flags import DEFAULT_MODEL as SEQ2SEQ_DEFAULT_MODEL
from seq2seq.flags import Settings as Seq2SeqSettings

PAGE = REPOSITORY / "docs" / "tasks.md"
SEPARATOR = "<eot>"  # short for <|endoftext|>
LONGEST_EXAMPLE = 90


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Markdown; None is an empty cell."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [["" if cell is None else str(cell).replace("|", r"\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"


def code(text: object) -> str:
    return f"`{text}`"


def tasks_part() -> str:
    """The tables about tasks."""
    parts = (
        ("Names and files", _names()),
        ("The text that a decoder-only model sees", _texts()),
        ("Lengths and decoding in gpt2/", _gpt2()),
        ("Lengths and decoding in seq2seq/", _seq2seq()),
        ("Metrics", _metrics()),
        ("The paper's settings: `--recipe paper`", _paper()),
    )
    return "\n".join(f"### {title}\n\n{text}" for title, text in parts)


def _names() -> str:
    rows = []
    for row in ROWS:
        files = _braces(list(row.files.values()))
        if row.read is readers.read_parallel:
            files = files.replace(".source", ".{source,target}")
        names = (row.gpt2 and code(row.name), row.seq2seq and code(row.seq2seq.name))
        folders = [code(f"{tree}/{its.folder}/") for tree, its in (("gpt2", row.gpt2), ("seq2seq", row.seq2seq)) if its]
        rows.append((*names, code(files), row.prepare and code(row.prepare), ", ".join(folders)))
    head = ("`--mode` in gpt2/", "in seq2seq/", "files under data/", "`prepare_data.py`", "runs go to")
    return table(head, rows)


def _braces(paths: Sequence[str]) -> str:
    """Paths that differ in one place, in a shell's notation: `a/{train,valid,test}.txt`."""
    before = _beginning(paths)
    before = before[: max(before.rfind("/"), before.rfind("_"), before.rfind("-")) + 1]
    after = _beginning([path[::-1] for path in paths])[::-1]
    return before + "{" + ",".join(path.removeprefix(before).removesuffix(after) for path in paths) + "}" + after


def _beginning(texts: Sequence[str]) -> str:
    """The longest beginning that all texts share."""
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    return "".join(letters[0] for letters in alike)


def _texts() -> str:
    rows = []
    for row in (row for row in ROWS if row.gpt2):
        layout = "".join(training_text(row.name, "SOURCE", "TARGET", SEPARATOR))
        path = data_file(row.name, "train", DEMO_DATA)
        source = row.example if row.verbatim else next(iter_records(row.name, path)).source
        example = prompt_text(row.name, source, SEPARATOR).replace("\n", r"\n")
        if len(example) > LONGEST_EXAMPLE:
            example = f"{example[:LONGEST_EXAMPLE]}…"
        rows.append((code(row.name), code(layout), code(example), "yes" if row.linearise else None))
    head = ("`--mode`", f"`{SEPARATOR}` is the end of text", "a prompt of the bundled data", "`generate` takes data")
    return table(head, rows)


def _gpt2() -> str:
    rows = []
    for row in (row for row in ROWS if row.gpt2):
        its, lengths = row.gpt2, row.gpt2.lengths.values()
        how = {
            "beam": f"{its.num_beams} beams",
            "greedy": "greedy",
            "nucleus": f"nucleus, top_p {Decoding.default('top_p')}",
        }[its.strategy]
        rows.append((code(row.name), how, its.samples, len(its.openings) or None, *(lengths or (None,) * 3)))
    head = ("`--mode`", "decoding", "outputs per prompt", "openings", *map(_flag_of, ("source", "train", "val")))
    most = Decoding.default("length")
    return f"An output has at most {most} tokens (`--length`).\n\n{table(head, rows)}"


def _flag_of(part: str) -> str:
    """The flag that limits a part of the text, as a column's header."""
    return code("--max_source_length" if part == "source" else f"--{part}_max_target_length")


def _seq2seq() -> str:
    fields = ("num_beams", "min_length", "max_length", "no_repeat_ngram_size", "early_stopping", "length_penalty")
    flags = (*fields[:-1], "length_pen")
    rows = []
    for its in (row.seq2seq for row in ROWS if row.seq2seq):
        rows.append((code(its.name), *(spelled(getattr(its, name)) for name in fields), *its.lengths.values()))
    lengths = next(row.seq2seq.lengths for row in ROWS if row.seq2seq)
    return table(["`--mode`", *(code(f"--{name}") for name in (*flags, *lengths))], rows)


def _metrics() -> str:
    rows = []
    for row in ROWS:
        names = [code(row.name)] if row.gpt2 else []
        if (row.seq2seq and row.seq2seq.name != row.name) or not names:
            names.append(code(row.seq2seq.name))
        if not row.metrics:
            rows.append((", ".join(names), "distinct-1, distinct-2", None, None))
            continue
        found = METRICS[row.metrics]
        asked = ", ".join(metric.name for metric in found.on_request)
        split = "seen, unseen, all" if found.by_category else None
        rows.append((", ".join(names), ", ".join(metric.name for metric in found.metrics), asked, split))
    return table(("task", "metrics", "with `score.py --metrics`", "categories"), rows)


def _paper() -> str:
    rows = []
    for row in ROWS:
        for tree, recipes in row.paper.items():
            name = row.name if tree == "gpt2" else row.seq2seq.name
            for tuned, flags in recipes.items():
                shown = " ".join(f"--{flag} {spelled(value)}" for flag, value in flags.items())
                rows.append((f"{tree}/", code(name), tuned, code(shown)))
    note = "`--recipe paper` uses the row of the `--tuning_mode`; pass the flags of another row (0.1 %) yourself.\n\n"
    return note + table(("tree", "`--mode`", "`--tuning_mode`", "flags"), rows)


def flags_part() -> str:
    """Every flag of the training launchers and of gen.py, in groups."""
    kinds = {"gpt2/": GPT2Settings, "seq2seq/": Seq2SeqSettings}
    trees = {tree: _fields(kind) for tree, kind in kinds.items()}
    groups: dict[str, list[Sequence[Any]]] = {}
    for name in dict.fromkeys(name for fields in trees.values() for name in fields):
        found = {tree: fields[name] for tree, fields in trees.items() if name in fields}
        group = next(iter(found.values())).metadata["group"]
        helps = {tree: kinds[tree].help_of(field) for tree, field in found.items()}
        if len(set(helps.values())) == 1:
            help_ = next(iter(helps.values()))
        else:
            help_ = "; ".join(f"{tree}: {text}" for tree, text in helps.items())
        defaults = [_default(found[tree]) if tree in found else None for tree in trees]
        groups.setdefault(group, []).append((_names_of(found), *defaults, _choices(found), help_))
    parts = [
        f"### {_capital(group)}\n\n" + table(("flag", "gpt2/", "seq2seq/", "values", "meaning"), rows)
        for group, rows in sorted(groups.items(), key=lambda entry: entry[0] == RARE)
    ]
    for title, kind in (("Launching, both trees", Launch), ("Decoding with gen.py", Decoding)):
        rows = [
            (_names_of({"": field}), _default(field), _choices({"": field}), kind.help_of(field))
            for field in _fields(kind).values()
        ]
        parts.append(f"### {title}\n\n" + table(("flag", "default", "values", "meaning"), rows))
    models = f"Default models: {DEFAULT_MODEL} in gpt2/, {SEQ2SEQ_DEFAULT_MODEL} in seq2seq/.\n"
    return "\n".join([models, *parts])


def _fields(kind: type) -> Mapping[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(kind)}


def _names_of(found: Mapping[str, dataclasses.Field]) -> str:
    field = next(iter(found.values()))
    others = dict.fromkeys(name for one in found.values() for name in one.metadata["names"])
    return ", ".join(code(name) for name in (f"--{field.name}", *others))


def _default(field: dataclasses.Field) -> str:
    return "–" if field.default in (None, "", ()) else code(spelled(field.default))


def _choices(found: Mapping[str, dataclasses.Field]) -> str | None:
    """The values to choose from; those of --mode are in the first table."""
    field = next(iter(found.values()))
    if field.name == "mode":
        return "see above"
    choices = dict.fromkeys(spelled(value) for one in found.values() for value in one.metadata["choices"] or ())
    if not choices and isinstance(field.default, bool):
        choices = ("yes", "no")
    return ", ".join(map(str, choices))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def main(page: Path = PAGE) -> None:
    replace_part(page, "tasks", tasks_part())
    replace_part(page, "flags", flags_part())


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
