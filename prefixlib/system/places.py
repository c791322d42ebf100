"""The places of data, runs and commands, in a checkout of the repository or with an installed package.

Standard library only. A wheel contains the packages alone: no data, no scripts.
"""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CHECKOUT = (REPOSITORY / "setup.py").is_file() and (REPOSITORY / "data").is_dir()
DEMO_DATA = REPOSITORY / "data" / "demo"


def data_folder() -> Path:
    """The folder of all data sets: the checkout's, else `data` in the current folder."""
    return (REPOSITORY if CHECKOUT else Path.cwd()) / "data"


def runs_folder(tree: Path, folder: str) -> Path:
    """The folder of a tree's runs: its own `folder` in a checkout, else `runs` in the current folder."""
    return tree / folder if CHECKOUT else Path.cwd() / "runs" / tree.name


def program(path: str) -> str:
    """The command that starts a program of this repository such as "gpt2/gen.py": by its path, or as a module."""
    return f"python {path}" if CHECKOUT else f"python -m {path.removesuffix('.py').replace('/', '.')}"


def missing_demo() -> str | None:
    """A line that says where to get the demo's data if they are missing; else None."""
    if DEMO_DATA.is_dir():
        return None
    return (
        "the demo's model and data are not part of the installed package: they are in the folder data/demo of the "
        "repository; run it in a clone, or pass --model_name_or_path and --data_dir"
    )
