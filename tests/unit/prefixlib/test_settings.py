"""Settings of both trees: what stands once, and who is handed all of them."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

import gpt2.flags
import seq2seq.flags
import seq2seq.train_e2e

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("kind", "again"),
    [
        (gpt2.flags.Settings, ["mode", "prefix_mode", "format_mode"]),
        (
            seq2seq.flags.Settings,
            ["mode", "preseqlen", "optim_prefix", "use_dropout", "epoch", "max_grad_norm", "save_steps"],
        ),
        (seq2seq.train_e2e.TableSettings, ["mode"]),
    ],
)
def test_a_flag_is_declared_again_for_another_value_alone(kind, again):
    """Another help text is an entry of HELP."""
    inherited = {field.name: field for base in kind.__mro__[1:-1] for field in reversed(fields(base))}
    declared = [field for field in fields(kind) if field.name in kind.__annotations__ and field.name in inherited]
    assert [field.name for field in declared] == again
    for field in declared:
        before = inherited[field.name]
        values = [(one.default, one.type, one.metadata["choices"]) for one in (field, before)]
        assert values[0] != values[1], field.name
    own = {name: text for name, text in kind.HELP.items() if kind is not seq2seq.train_e2e.TableSettings}
    for name, text in own.items():
        assert inherited[name].metadata["help"] != text
        assert name not in again


def test_few_functions_take_all_settings():
    """Entries, the builder of a model, the loop and its module, and what finds a run to resume."""
    found = []
    for tree in ("gpt2", "seq2seq", "prefixlib"):
        for path in sorted((ROOT / tree).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef):
                    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                    kinds = [ast.unparse(one.annotation) for one in given if one.annotation]
                    whole = [
                        kind for kind in kinds if re.search(r"\b(Settings|Training)\b", kind) and "type[" not in kind
                    ]
                    found += [f"{path.relative_to(ROOT)}: {node.name}"] * bool(whole)
    assert len(found) <= 15, found
