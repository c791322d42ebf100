"""The layers of the code: what may import what, and how long a file may be."""

import ast

import pytest

from tests.conftest import ROOT

# Each package may import those of the lines above its own.
LEVELS = [
    {"system"},
    {"data", "metrics", "methods", "compute"},
    {"settings"},
    {"base_model", "checkpoints", "runs", "decoding"},
]
LEVEL = {package: number for number, packages in enumerate(LEVELS) for package in packages}


def imports(path):
    """The dotted names that a file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(tree):
    return sorted((ROOT / tree).rglob("*.py"))


def test_packages_import_lower_ones_alone():
    arrows = set()
    for path in files("prefixlib"):
        package = path.relative_to(ROOT / "prefixlib").parts[0]
        for name in imports(path) if package in LEVEL else ():
            first, *rest = name.split(".")
            if first == "prefixlib" and rest[0] != package:
                assert LEVEL[rest[0]] < LEVEL[package], (path.name, name)
                arrows.add((package, rest[0]))
    assert {path.name for path in (ROOT / "prefixlib").iterdir() if (path / "__init__.py").exists()} == LEVEL.keys()
    assert 15 < len(arrows) <= 22


@pytest.mark.parametrize(
    ("tree", "others"), [("gpt2", ["seq2seq"]), ("seq2seq", ["gpt2"]), ("prefixlib", ["gpt2", "seq2seq"])]
)
def test_trees_do_not_import_each_other(tree, others):
    for path in files(tree):
        assert not {name.split(".")[0] for name in imports(path)} & set(others), path


@pytest.mark.parametrize("package", ["system", "data", "settings"])
def test_what_launchers_import_is_the_standard_library(package):
    """At the top of a module: a function may import more when it is called."""
    for path in files(f"prefixlib/{package}"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            heavy = {name.split(".")[0] for name in names} & {"torch", "transformers", "numpy", "datasets", "lightning"}
            assert not heavy, path


@pytest.mark.parametrize("tree", ["gpt2", "seq2seq", "prefixlib"])
def test_files_are_short(tree):
    long = {path.name: n for path in files(tree) if (n := path.read_text().count("\n")) > 400}
    assert long.keys() <= {"tasks.py"}, long  # rows of a table
