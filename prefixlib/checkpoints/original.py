"""Prefix checkpoints of the first implementation: config.json + pytorch_model.bin, of GPT-2 and of BART.

They name no base model (the shape tells which one it was), and the arrays often say more about the settings than
config.json. Nothing pickled is run.

Legend: P prefix length, L layers, H heads, D head size, E width, M mid_dim.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from prefixlib.checkpoints.checkpoint import CONFIG, REMEDY, check_arrays, check_numbers, is_checkpoint, unpickled
from prefixlib.system import schema
from prefixlib.system.errors import UserError, first_line

GPT2_BASES = {(12, 768): "gpt2", (24, 1024): "gpt2-medium", (36, 1280): "gpt2-large", (48, 1600): "gpt2-xl"}
BART_BASES = {(6, 768): "facebook/bart-base", (12, 1024): "facebook/bart-large"}  # (decoder layers, width)


class Config(TypedDict, total=False):
    """The values that are read from config.json, in both trees."""

    n_layer: int
    n_head: int
    n_embd: int
    mid_dim: int
    prefix_dropout: float
    format_mode: str
    encoder_layers: int
    decoder_layers: int
    encoder_attention_heads: int
    decoder_attention_heads: int
    d_model: int
    _my_arg_task_mode: str | None


@dataclass(frozen=True)
class OriginalPrefix:
    """A prefix as the first implementation saved it."""

    settings: dict[str, Any]  # of the tree's PrefixConfig
    network: dict[str, Tensor]  # state dict of the tree's prefix module
    base: dict[str, Any]  # {"name": None if the shape is not known, "revision"}
    task: dict[str, Any]


def is_original(directory: Path | str) -> bool:
    """Whether config.json belongs to a prefix of the first implementation: it names P."""
    return '"preseqlen"' in _config_text(directory)


def is_prefix(directory: Path | str) -> bool:
    """Whether `directory` holds a prefix, of this package or of the first implementation."""
    return is_checkpoint(directory) or is_original(directory)


def is_bart(directory: Path | str) -> bool:
    """Whether config.json belongs to an encoder-decoder."""
    return '"encoder_layers"' in _config_text(directory)


def _config_text(directory: Path | str) -> str:
    """The text of config.json, whole or damaged: the reader that parses it reports errors."""
    config = Path(directory) / "config.json"
    return config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""


def read_gpt2(directory: Path | str) -> OriginalPrefix:
    """Read a GPT-2 prefix of any kind of the first implementation. Raises UserError if it is none, or damaged."""
    saved, network = _read(Path(directory))
    with _shape_errors_as_user_errors(directory, "GPT-2"):
        settings = _gpt2_settings(saved, network)
        if settings["init_shallow"]:
            width = 2 * settings["n_layer"] * settings["n_embd"]
            network = {**network, "control_trans": _shallow(network["control_trans"], settings["preseqlen"], width)}
    name = GPT2_BASES.get((settings["n_layer"], settings["n_embd"]))
    task = {"mode": saved.get("_my_arg_task_mode"), "tuning_mode": "prefixtune"}
    return OriginalPrefix(settings, network, {"name": name, "revision": None}, task)


def _gpt2_settings(saved: Mapping[str, Any], network: Mapping[str, Tensor]) -> dict[str, Any]:
    """P as the arrays have it: the file's P can differ (starts from words)."""
    layers, heads, width = saved["n_layer"], saved["n_head"], saved["n_embd"]
    shallow = "control_trans" in network
    last = max((name for name in network if name.startswith("control_trans") and name.endswith("bias")), default=None)
    embedding = not shallow and (last is None or len(network[last]) == width)
    if shallow:
        length = network["control_trans"].numel() // (2 * layers * width)
    else:
        length = len(network["wte.weight"]) if "wte.weight" in network else 0
    return {
        "preseqlen": length,
        "mid_dim": saved.get("mid_dim", 512) if last is None else len(network["control_trans.0.weight"]),
        "prefix_dropout": float(saved.get("prefix_dropout", 0.0)),
        "prefix_mode": "embedding" if embedding else "activation",
        "format_mode": "infix" if "wte2.weight" in network else saved.get("format_mode", "cat"),
        "n_layer": layers,
        "n_head": heads,
        "head_dim": width // heads,
        "n_embd": width,
        "optim_prefix": shallow or "wte.weight" in network,
        "parametrize_emb": "Emb" if last is None else "MLP",
        "use_deep": last == "control_trans.4.bias",
        "init_shallow": shallow,
    }


def _shallow(trained: Tensor, length: int, width: int) -> Tensor:
    """Keys and values without an MLP as (P, 2*L*H*D): kept flat, or (2L, 1, H, P, D) if they started from words."""
    return trained.view(length, width) if trained.dim() == 1 else trained.squeeze(1).permute(2, 0, 1, 3).flatten(1)


def read_bart(directory: Path | str) -> OriginalPrefix:
    """Read a BART prefix, plain or deep, with its three branches. Raises UserError if it is none, or damaged."""
    saved, network = _read(Path(directory))
    with _shape_errors_as_user_errors(directory, "BART"):
        settings = {
            "preseqlen": network["wte.weight"].shape[0],
            "mid_dim": network["control_trans.0.weight"].shape[0],
            "prefix_dropout": float(saved.get("prefix_dropout", 0.0)),
            "use_deep": "control_trans.4.weight" in network,
            "use_encoder_prefix": True,
            "use_cross_prefix": True,
            "use_self_prefix": True,
            "init_shallow": False,
            "encoder_layers": saved["encoder_layers"],
            "decoder_layers": saved["decoder_layers"],
            "encoder_heads": saved["encoder_attention_heads"],
            "decoder_heads": saved["decoder_attention_heads"],
            "d_model": saved["d_model"],
        }
    name = BART_BASES.get((settings["decoder_layers"], settings["d_model"]))
    return OriginalPrefix(settings, network, {"name": name, "revision": None}, {"tuning_mode": "prefixtune"})


@contextlib.contextmanager
def _shape_errors_as_user_errors(directory: Path | str, kind: str) -> Iterator[None]:
    """Turn the errors of settings and arrays that do not match into a UserError."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{directory} has no {error}: not a {kind} prefix of the original") from error
    except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError) as error:
        raise UserError(
            f"{directory}: its settings and arrays are not those of a {kind} prefix of the original "
            f"({first_line(error)})"
        ) from error


def load_network(module: torch.nn.Module, found: OriginalPrefix, directory: Path | str, kind: str) -> None:
    """Load the arrays into a prefix module made from the settings. Raises UserError where names or shapes differ."""
    expected = {name: array.shape for name, array in module.state_dict().items()}
    shapes = {name: array.shape for name, array in found.network.items()}
    if shapes != expected:
        odd = ", ".join(sorted({name for name, _ in shapes.items() ^ expected.items()}))
        raise UserError(f"{directory}: not a {kind} prefix of the original (names or shapes differ in {odd})")
    check_numbers(found.network, Path(directory) / "pytorch_model.bin")
    module.load_state_dict(found.network)


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read config.json and pytorch_model.bin. Raises UserError if they are absent, damaged or not a prefix."""
    config_path, weights_path = directory / "config.json", directory / "pytorch_model.bin"
    if not (config_path.is_file() and weights_path.is_file()):
        raise UserError(
            f"{directory} is not a prefix checkpoint: neither {CONFIG} nor config.json + pytorch_model.bin"
            + _what_else(directory)
        )
    config = schema.read(config_path, Config, REMEDY)
    try:
        weights = unpickled(weights_path)
    except Exception as error:
        raise UserError(
            f"{directory} cannot be read as a checkpoint of the original: pytorch_model.bin: {first_line(error)}"
        ) from error
    if not isinstance(weights, dict) or not any(str(key).startswith(("control_trans", "wte")) for key in weights):
        raise UserError(f"{weights_path} holds no prefix (no control_trans or wte weights)")
    check_arrays(weights, weights_path)
    return config, weights


def _what_else(directory: Path) -> str:
    """A hint for errors: the content of a folder without a prefix, if it is known."""
    if (directory / "config.json").is_file() or (directory / "model" / "config.json").is_file():
        return "; it holds a whole model, tuned without a prefix"
    steps = [path.name.removeprefix("checkpoint-") for path in directory.glob("checkpoint-*")]
    inside = [directory / f"checkpoint-{step}" for step in sorted((s for s in steps if s.isdecimal()), key=int)]
    return f"; the run has not finished, but {inside[-1]} can be used" if inside else ""
