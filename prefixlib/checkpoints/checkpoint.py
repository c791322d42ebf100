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
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from prefixlib.data import data_digests
from prefixlib.data.wording import is_template
from prefixlib.methods.table import METHODS, OWN_MODEL, TASK
from prefixlib.metrics import shown
from prefixlib.settings.flags import QUANTIZATIONS, Flags, spelled
from prefixlib.settings.training import decode_command
from prefixlib.system import files, schema
from prefixlib.system.errors import UserError, first_line

logger = logging.getLogger(__name__)

FORMAT = 1
CONFIG, NETWORK, FLAT, CARD = "prefix_config.json", "prefix_model.safetensors", "prefix_flat.safetensors", "README.md"
SCORES = "| score | value |\n|---|---|\n"  # heads the last part of a model card
# First words of a model card's text: they tell it from a README.md that a user wrote.
CARD_MARK = "A trained prefix (Li & Liang 2021, arXiv 2101.00190) for "
OTHER_CARD = "MODEL_CARD.md"  # where README.md is the user's own
RESULTS = "results.json"
# A finished run's folder, as patterns: what --overwrite_output_dir yes removes before the new run writes its own, and
# what no run replaces without it. Logs are not replaced but added to.
RUN_FILES = (
    *(CONFIG, NETWORK, FLAT, TASK, "model", "best", RESULTS, "loss.png"),
    *("config.json", "generation_config.json", "model*.safetensors*"),
    *("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("spiece.model", "sentencepiece*.model", "source.spm", "target.spm"),
)
# What transformers' Trainer keeps in a checkpoint-N for resuming, and what this code adds to it.
LOOP_FILES = (
    *("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "training_args.bin", "trainer_state.json"),
    "loss_sums.json",
)


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
    """What is recorded of a training, as far as decoding reads it."""

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
    """What prefix_config.json says of a file beside it."""

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
    task: dict[str, Any]  # mode, seed and what else the run wants to remember
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
    """Write a checkpoint into `directory` (made if absent): weights first, last the config with their hashes."""
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
    _write_card(directory, config, scores or {})
    files.write_json(directory / CONFIG, config)


def refresh_card(directory: Path | str, scores: Mapping[str, Any]) -> None:
    """Write the model card again with these scores too; those of other names that it has stay."""
    directory = Path(directory)
    card = card_path(directory)
    text = card.read_text(encoding="utf-8") if card and card.is_file() else ""
    earlier = dict(re.findall(r"^\| (.+?) \| (.+) \|$", text.partition(SCORES)[2], re.MULTILINE))
    _write_card(directory, read_config(directory), {**earlier, **scores})


def card_path(directory: Path) -> Path | None:
    """Where the model card goes: README.md, unless that is the user's own; None where MODEL_CARD.md is, too."""
    for name in (CARD, OTHER_CARD):
        path = directory / name
        if not path.exists() or (path.is_file() and CARD_MARK in path.read_text(encoding="utf-8", errors="replace")):
            return path
    return None


def _write_card(directory: Path, config: Mapping[str, Any], scores: Mapping[str, Any]) -> None:
    """Write the model card; no README.md that is the user's own is replaced by it."""
    card = card_path(directory)
    if card is None:
        logger.warning("%s: %s and %s are no model cards: no card is written", directory, CARD, OTHER_CARD)
        return
    if card.name != CARD and not card.exists():
        logger.warning("%s: %s is no model card and stays: the card is %s", directory, CARD, OTHER_CARD)
    files.write_text(card, _model_card(directory, config, scores))


def clear_run(directory: Path, patterns: Sequence[str]) -> None:
    """Remove what an earlier run left in `directory`: RUN_FILES, its model cards, and its own `patterns`.

    What others put there stays, in its checkpoints' folders too.
    """
    for path in files.matching(directory, (*RUN_FILES, *patterns)):
        if path.is_dir() and not path.is_symlink():
            clear_checkpoint(path)
        else:
            path.unlink(missing_ok=True)
    _remove_card(directory)


def clear_checkpoint(directory: Path) -> None:
    """Remove a checkpoint's own files, and its folder where nothing else is in it."""
    files.clear_run(directory, (*RUN_FILES, *LOOP_FILES))
    for folder in (directory, directory / OWN_MODEL):
        _remove_card(folder)
        with contextlib.suppress(OSError):  # it is not empty, or not there
            folder.rmdir()


def _remove_card(directory: Path) -> None:
    card = card_path(directory)
    if card is not None:
        card.unlink(missing_ok=True)


def replace_folder(directory: Path, write: Callable[[Path], None]) -> None:
    """Let `write` put a new checkpoint in the place of the one in `directory`, whose other files stay.

    Killed at any moment, one of the two is there.
    """

    def fill(folder: Path) -> None:
        folder.mkdir(parents=True)
        if card_path(directory) != directory / CARD:  # the user's own: the new card finds another name
            shutil.copy2(directory / CARD, folder / CARD)
        write(folder)

    files.replace_directory(directory, fill)


def earlier_run(directory: Path, patterns: Sequence[str]) -> list[str]:
    """Names in `directory` that a run which starts there would replace: RUN_FILES, and its own `patterns` first.

    A results.json counts where it holds a run; other content is merged with. The model card finds a place of its own.
    """
    found = [path.name for path in files.matching(directory, (*patterns, *RUN_FILES))]
    if RESULTS in found:
        held = schema.read(directory / RESULTS, dict[str, Any], "move it away")
        if not held.keys() & {"training", "decoding", "train", "test"}:
            found.remove(RESULTS)
    return found


def is_checkpoint(directory: Path | str) -> bool:
    """True where a prefix checkpoint of this format, whole or damaged, lies in `directory`."""
    return (Path(directory) / CONFIG).is_file()


def model_folder(directory: Path | str) -> Path | None:
    """Where `directory` holds a model that was tuned itself, without a prefix; None if it holds none.

    That is the directory itself, or its `model/` in what earlier versions wrote for encoder-decoders.
    """
    directory = Path(directory)
    folders = (directory, directory / OWN_MODEL)
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def load(directory: Path | str, family: str) -> PrefixCheckpoint:
    """Read and verify a checkpoint. Raises UserError if it is absent, damaged, newer, or not of `family`."""
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
        raise UserError(f"{directory} is no prefix checkpoint: {CONFIG} is missing")
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
    """What is wrong with a checkpoint's task beyond the types of its values; None if nothing is."""
    limit, template, how = (task.get(name) for name in ("max_source_length", "source_template", "tuning_mode"))
    if limit is not None and limit < 1:
        return f"task.max_source_length is {limit}, not at least 1"
    if template and not is_template(template):
        return f"task.source_template is {template[:40]!r}, not a text that holds {{source}} once, or names of columns"
    if how is not None and how not in METHODS:
        return f"task.tuning_mode is {how!r}, not one of {', '.join(METHODS)}"
    return _odd_base(task.get("base_model", {}), "task.base_model")


def _odd_base(base: Mapping[str, Any], place: str) -> str | None:
    """What is wrong with the record of a base model beyond the types of its values; None if nothing is."""
    bits = base.get("quantization", QUANTIZATIONS[0])
    if bits not in QUANTIZATIONS:
        return f"{place}.quantization is {bits!r}, not one of {', '.join(QUANTIZATIONS)}"
    digest = base.get("gguf", {}).get("sha256")
    if digest is not None and not re.fullmatch("[0-9a-f]{64}", digest):
        return f"{place}.gguf.sha256 is {digest[:40]!r}, not 64 hexadecimal digits"
    return None


def rebuild(kind: type, saved: Any, path: Path | str, flags: type[Flags] | None = None) -> Any:
    """The dataclass `kind` from what the checkpoint file `path` holds of it.

    A setting that `flags` has, too, must be one of that flag's choices. Raises UserError for unknown, absent or odd
    values.
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
    """Turn what a prefix module raises for settings of the right types that make no prefix into a UserError."""
    try:
        yield
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{directory}: its prefix settings make no prefix ({first_line(error)}); {REMEDY}") from error


def unpickled(path: Path | str) -> Any:
    """What torch.save put into a file, without running any code from it; a bad file raises several exception types."""
    with warnings.catch_warnings(action="ignore"):  # ignore torch's warnings about foreign files
        return torch.load(path, map_location="cpu", weights_only=True)


def check_arrays(found: Any, path: Path | str) -> None:
    """Raise UserError unless an unpickled file holds arrays under their names and nothing else."""
    whole = isinstance(found, dict) and all(isinstance(name, str) for name in found)
    if not whole or not all(isinstance(array, torch.Tensor) for array in found.values()):
        raise UserError(f"{path} holds something else than arrays with names; {REMEDY}")


def check_numbers(found: Mapping[str, torch.Tensor], path: Path | str) -> None:
    """Raise UserError for an array that is not made of floating-point numbers, all of them finite."""
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

    They differ where the model was tuned together with the prefix: then the tuned model's folder says it.
    """
    if saved.get("name") != OWN_MODEL:
        return dict(saved)
    started = load_task(Path(directory) / OWN_MODEL).get("base_model", {})
    return dict(started) if started.get("name") not in (None, OWN_MODEL) else {"name": task.get("tuned_from")}


def save_task(directory: Path | str, task: Mapping[str, Any]) -> None:
    """Write task_config.json beside a fine-tuned model, which is saved in transformers' own format."""
    files.write_json(Path(directory) / TASK, {"format": FORMAT, "task": dict(task)})


def saved_task(directory: Path | str) -> dict[str, Any]:
    """What a prefix or a tuned model was trained for; {} where the folder does not say."""
    return read_config(directory)["task"] if is_checkpoint(directory) else load_task(directory)


def load_task(directory: Path | str) -> dict[str, Any]:
    """What a fine-tuned model was trained for: from task_config.json, or the original's config.json; {} if unknown."""
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


def _model_card(directory: Path, config: Mapping[str, Any], scores: Mapping[str, Any]) -> str:
    """A README for whoever is handed the directory alone: its paths are relative to the directory."""

    def relative(value: Any) -> Any:
        return os.path.relpath(value, directory) if isinstance(value, str) and os.path.isabs(value) else value

    mode = config["task"].get("mode", "MODE")
    decode = decode_command(config["family"], mode, "THIS_DIRECTORY")
    settings = {**config["prefix"], **config["task"]}
    for name in (data_digests.DATA, data_digests.EARLIER):
        settings.pop(name, None)
    rows = "\n".join(f"| {name} | {relative(value)} |" for name, value in settings.items())
    scored = "\n".join(f"| {name} | {shown(value)} |" for name, value in scores.items()) or "| not scored | |"
    base, kind = config["base_model"].get("name"), "a frozen"
    if "tuned_from" in config["task"]:
        base, kind = config["task"]["tuned_from"], "the tuned model in `model/`, a"
    base = relative(base)
    return (
        f"# Prefix for {base}\n\n"
        f"{CARD_MARK}{kind} {config['family']} model, "
        f"task `{mode}`.\n\n"
        f"Decode with it:\n\n    {decode}\n\n"
        f"`{FLAT}` holds the keys and values alone: per site (P, 2*L*H*D), "
        "columns ordered layer0.K, layer0.V, layer1.K ...\n\n"
        "Paths are relative to this directory; scores are on the scale of the paper's tables for the task.\n\n"
        f"| setting | value |\n|---|---|\n{rows}\n\n{SCORES}{scored}\n"
    )
