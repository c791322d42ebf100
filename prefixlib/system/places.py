"""Where data, runs and commands are: in a checkout of the repository, or beside an installed package.

Standard library only. A wheel holds the packages alone: no data, no scripts.
"""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CHECKOUT = (REPOSITORY / "setup.py").is_file() and (REPOSITORY / "data").is_dir()
DEMO_DATA = REPOSITORY / "data" / "demo"


def data_folder() -> Path:
    """The folder of all data sets: the checkout's, else `data` in the current folder."""
    return (REPOSITORY if CHECKOUT else Path.cwd()) / "data"


def runs_folder(tree: Path, folder: str) -> Path:
    """Where the runs of a tree go: its own `folder` in a checkout, else `runs` in the current folder."""
    return tree / folder if CHECKOUT else Path.cwd() / "runs" / tree.name


def program(path: str) -> str:
    """The words that start a program of this repository, "gpt2/gen.py", here: by its path or as a module."""
    return f"python {path}" if CHECKOUT else f"python -m {path.removesuffix('.py').replace('/', '.')}"


def missing_demo() -> str | None:
    """Where the demo's data are, in one line, if they are not here; else None."""
    if DEMO_DATA.is_dir():
        return None
    return (
        "the demo's model and data are no part of the installed package: they are in the folder data/demo of the "
        "repository; run it in a clone, or pass --model_name_or_path and --data_dir"
    )
