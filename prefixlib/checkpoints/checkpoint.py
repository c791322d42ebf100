"""The prefix checkpoint: a small directory that holds the trained prefix and every setting needed to use it.

prefix_config.json         format number, base model, settings of the prefix module, task, sizes and hashes of the files
prefix_model.safetensors   the trainable network (what training continues from)
prefix_flat.safetensors    its keys and values, per site (P, 2*L*H*D), columns ordered layer0.K, layer0.V, layer1.K ...
README.md                  a model card
"""

import contextlib
import dataclasses
import hashlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from prefixlib.checkpoints import card
from prefixlib.data import data_digests
from prefixlib.data.wording import is_template
from prefixlib.methods.table import METHODS, OWN_MODEL, TASK
from prefixlib.settings.flags import QUANTIZATIONS, Flags, spelled
from prefixlib.system import files, schema
from prefixlib.system.errors import UserError, first_line

logger = logging.getLogger(__name__)

FORMAT = 1
CONFIG, NETWORK, FLAT = "prefix_config.json", "prefix_model.safetensors", card.FLAT
REMEDY = "use another checkpoint"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Gguf(TypedDict):
    """The GGUF file that a base model was made from."""

    file: str
    sha256: str


class Base(TypedDict, total=False):
    """Record of the base model."""

    name: str | None  # hub id or absolute folder
    revision: str | None
    fingerprint: dict[str, str]
    gguf: Gguf
    quantization: str


class Task(TypedDict, total=False):
    """The part of a training's record that decoding reads."""

    mode: str | None
    tuning_mode: str
    max_source_length: int | None
    categories: list[str]
    step: int
    lowdata_token: str
    source_column: str | None
    target_column: str | None
    source_template: str | None
    chat: bool
    separator: str | None
    finetuned_model_path: str | None
    tuned_from: str | None
    base_model: Base
    earlier_schedules: list[dict[str, Any]]
    data: data_digests.Digests
    earlier_data: list[data_digests.EarlierData]


class Described(TypedDict):
    """The entry of a checkpoint's file in prefix_config.json."""

    bytes: int
    sha256: str


class Config(TypedDict):
    """prefix_config.json."""

    family: str
    base_model: Base
    prefix: dict[str, Any]  # see `rebuild`
    task: Task
    files: dict[str, Described]


class TaskFile(TypedDict):
    """task_config.json."""

    task: Task


@dataclass(frozen=True)
class PrefixCheckpoint:
    """A checkpoint that was read and verified."""

    directory: Path
    family: str  # "decoder-only" or "encoder-decoder"
    base: dict[str, Any]  # {"name": hub id or absolute folder, "revision": str or None}
    prefix: dict[str, Any]  # arguments of the tree's PrefixConfig
    task: dict[str, Any]  # mode, seed and whatever else the run records
    network: dict[str, torch.Tensor]  # state dict of the prefix module
    flat: dict[str, torch.Tensor] | None  # site -> (P, 2*L*H*D); None in a checkpoint of the original


def save(
    directory: Path | str,
    *,
    family: str,
    base: Mapping[str, Any],
    prefix: Mapping[str, Any],
    task: Mapping[str, Any],
    network: Mapping[str, torch.Tensor],
    flat: Mapping[str, torch.Tensor],
    versions: Mapping[str, str],
    scores: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint into `directory` (made if absent): weights first, the config with their hashes last."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    described = {}
    for name, tensors in ((NETWORK, network), (FLAT, flat)):
        with files.replacing(directory / name) as partial:
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, partial)
            partial.chmod(0o644)  # safetensors makes files that only their owner can read
            described[name] = {"bytes": partial.stat().st_size, "sha256": _sha256(partial)}
    config = {
        "format": FORMAT,
        "family": family,
        "base_model": dict(base),
        "prefix": dict(prefix),
        "task": dict(task),
        "versions": dict(versions),
        "files": described,
    }
    card.write(directory, config, scores or {})
    files.write_json(directory / CONFIG, config)


def refresh_card(directory: Path | str, scores: Mapping[str, Any]) -> None:
    """Add these scores to the model card; scores of other names stay."""
    card.refresh(Path(directory), read_config(directory), scores)


def is_checkpoint(directory: Path | str) -> bool:
    """Whether `directory` contains a prefix checkpoint of this format, whole or damaged."""
    return (Path(directory) / CONFIG).is_file()


def model_folder(directory: Path | str) -> Path | None:
    """The folder of a model in `directory` that was itself tuned, without a prefix; None if there is none.

    It is the directory itself, or its `model/` for encoder-decoders that an earlier version wrote.
    """
    directory = Path(directory)
    folders = (directory, directory / OWN_MODEL)
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def load(directory: Path | str, family: str) -> PrefixCheckpoint:
    """Read and verify a checkpoint. Raises UserError if it is absent, damaged, newer, or of another family."""
    directory = Path(directory)
    config = read_config(directory)
    if config["family"] != family:
        raise UserError(f"{directory} holds a prefix of the kind {config['family']}; the kind {family} is needed here")
    network, flat = (_read_verified(directory / name, config["files"].get(name)) for name in (NETWORK, FLAT))
    return PrefixCheckpoint(
        directory, family, config["base_model"], config["prefix"], config["task"], network=network, flat=flat
    )


def read_config(directory: Path | str) -> dict[str, Any]:
    """The checkpoint's prefix_config.json. Raises UserError if it is absent, unreadable or of a newer format."""
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise UserError(f"{directory} is not a prefix checkpoint: {CONFIG} is missing")
    config = schema.read(path, TypedDict("Numbered", {"format": int}), REMEDY)
    if config["format"] > FORMAT:
        raise UserError(f"{path} has format {config['format']}; this version reads up to {FORMAT}: update the package")
    wrong = schema.misfit(config, Config)
    wrong = wrong or _odd_base(config["base_model"], "base_model") or _odd_task(config["task"])
    if config["format"] < 1:
        wrong = f"format is {config['format']}, not 1 to {FORMAT}"
    if wrong:
        raise UserError(f"{path} is damaged ({wrong}); {REMEDY}")
    return config


def _odd_task(task: Mapping[str, Any]) -> str | None:
    """The first wrong value in a checkpoint's task, in words; None if there is none. Types are checked before."""
    limit, template, how = (task.get(name) for name in ("max_source_length", "source_template", "tuning_mode"))
    if limit is not None and limit < 1:
        return f"task.max_source_length is {limit}, not at least 1"
    if template and not is_template(template):
        return f"task.source_template is {template[:40]!r}, not a text that holds {{source}} once, or names of columns"
    if how is not None and how not in METHODS:
        return f"task.tuning_mode is {how!r}, not one of {', '.join(METHODS)}"
    return _odd_base(task.get("base_model", {}), "task.base_model")


def _odd_base(base: Mapping[str, Any], place: str) -> str | None:
    """The first wrong value in a base model's record, in words; None if there is none. Types are checked before."""
    bits = base.get("quantization", QUANTIZATIONS[0])
    if bits not in QUANTIZATIONS:
        return f"{place}.quantization is {bits!r}, not one of {', '.join(QUANTIZATIONS)}"
    digest = base.get("gguf", {}).get("sha256")
    if digest is not None and not re.fullmatch("[0-9a-f]{64}", digest):
        return f"{place}.gguf.sha256 is {digest[:40]!r}, not 64 hexadecimal digits"
    return None


def rebuild(kind: type, saved: Any, path: Path | str, flags: type[Flags] | None = None) -> Any:
    """Rebuild the dataclass `kind` from its settings in the checkpoint file `path`.

    A setting that is also one of `flags` must be one of that flag's choices. Raises UserError for unknown, absent or
    impossible values.
    """
    unknown = set(saved if isinstance(saved, Mapping) else ()) - {field.name for field in dataclasses.fields(kind)}
    if unknown:
        raise UserError(f"{path}: its prefix settings are not known here ({', '.join(sorted(unknown))}); {REMEDY}")
    wrong = schema.misfit(saved, kind, "prefix")
    config = None if wrong else kind(**saved)
    for field in dataclasses.fields(kind) if not wrong else ():
        value, end = getattr(config, field.name), 2**31 if field.type is int else 1
        if field.type in (int, float) and not 0 <= value < end:
            wrong = f"prefix.{field.name} is {value}, not at least 0 and below {end}"
    for field in dataclasses.fields(flags) if flags and not wrong else ():
        choices, value = field.metadata["choices"], getattr(config, field.name, None)
        if choices and value is not None and value not in choices:
            wrong = f"prefix.{field.name} is {value!r}, not one of {', '.join(map(str, choices))}"
    if wrong:
        raise UserError(f"{path}: its prefix settings are damaged ({wrong}); {REMEDY}")
    return config


@contextlib.contextmanager
def odd_settings_refused(directory: Path | str) -> Iterator[None]:
    """Turn a prefix module's error about settings that have the right types but make no prefix into a UserError."""
    try:
        yield
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{directory}: its prefix settings make no prefix ({first_line(error)}); {REMEDY}") from error


def unpickled(path: Path | str) -> Any:
    """Load a file of torch.save without running code from it; a bad file raises several exception types."""
    with warnings.catch_warnings(action="ignore"):  # ignore torch's warnings about foreign files
        return torch.load(path, map_location="cpu", weights_only=True)


def check_arrays(found: Any, path: Path | str) -> None:
    """Raise UserError unless an unpickled file holds arrays under their names and nothing else."""
    whole = isinstance(found, dict) and all(isinstance(name, str) for name in found)
    if not whole or not all(isinstance(array, torch.Tensor) for array in found.values()):
        raise UserError(f"{path} holds something other than named arrays; {REMEDY}")


def check_numbers(found: Mapping[str, torch.Tensor], path: Path | str) -> None:
    """Raise UserError for an array that contains anything but finite floating-point numbers."""
    for name, array in found.items():
        if array.dtype not in FLOATS:
            wrong = f"holds {str(array.dtype).removeprefix('torch.')}, not floating-point numbers"
        elif not array.isfinite().all():
            wrong = "holds NaN or infinity, not finite numbers"
        else:
            continue
        raise UserError(f"{path}: its array {name} {wrong}; {REMEDY}")


def check_tensors(found: Mapping[str, Any], expected: Mapping[str, Sequence[int]], path: Path | str) -> None:
    """Raise UserError unless a file's tensors are finite and have the names and shapes that the settings imply."""
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    wanted = {name: tuple(shape) for name, shape in expected.items()}
    for name in sorted(shapes.keys() | wanted.keys()):
        if shapes.get(name) != wanted.get(name):
            raise UserError(
                f"{path} does not fit its {CONFIG}: {name} is {shapes.get(name, 'missing')}, the settings ask for "
                f"{wanted.get(name, 'none')}; {REMEDY}"
            )
    check_numbers(found, path)


def check_agrees(flags: Mapping[str, Any], settings: Mapping[str, Any], directory: Path | str) -> None:
    """Raise UserError naming both values if a flag that was given differs from the checkpoint's setting."""
    for name, given in flags.items():
        if given is not None and name in settings and settings[name] != given:
            raise UserError(
                f"--{name} {spelled(given)} contradicts {directory}, which was trained with {name} "
                f"{spelled(settings[name])}"
            )


def own_model_base(saved: Mapping[str, Any], task: Mapping[str, Any], directory: Path | str) -> dict[str, Any]:
    """The record of the base that a checkpoint in `directory` started from; `saved` is that of its base model now.

    They differ if the model was tuned together with the prefix: then the tuned model's folder records it.
    """
    if saved.get("name") != OWN_MODEL:
        return dict(saved)
    started = load_task(Path(directory) / OWN_MODEL).get("base_model", {})
    return dict(started) if started.get("name") not in (None, OWN_MODEL) else {"name": task.get("tuned_from")}


def save_task(directory: Path | str, task: Mapping[str, Any]) -> None:
    """Write task_config.json beside a fine-tuned model, which is saved in transformers' own format."""
    files.write_json(Path(directory) / TASK, {"format": FORMAT, "task": dict(task)})


def saved_task(directory: Path | str) -> dict[str, Any]:
    """The task record of a prefix or a tuned model; {} if the folder has none."""
    return read_config(directory)["task"] if is_checkpoint(directory) else load_task(directory)


def load_task(directory: Path | str) -> dict[str, Any]:
    """The task record of a fine-tuned model, from task_config.json or the original's config.json; {} if none."""
    path, config_path = Path(directory) / TASK, Path(directory) / "config.json"
    if path.is_file():
        task = schema.read(path, TaskFile, REMEDY)["task"]
        if _odd_task(task):
            raise UserError(f"{path} is damaged ({_odd_task(task)}); {REMEDY}")
        return task
    config = schema.read(config_path, dict[str, Any], REMEDY) if config_path.is_file() else {}
    mode = config.get("_my_arg_task_mode")
    return {"mode": mode} if isinstance(mode, str) else {}


def _read_verified(path: Path, described: Mapping[str, Any] | None) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise UserError(f"{path} is missing; {REMEDY}")
    if described is None or path.stat().st_size != described["bytes"] or _sha256(path) != described["sha256"]:
        raise UserError(f"{path} is damaged (it is not the file its {CONFIG} describes); {REMEDY}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); {REMEDY}") from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
