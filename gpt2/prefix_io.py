"""Prefix checkpoints of this tree: save a PrefixTuning, load one, read the original code's."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gpt2.train_control import FAMILY, PrefixConfig, PrefixTuning
from prefixlib import checkpoint, record
from prefixlib.errors import UserError

# The original's checkpoints name no base model; its shape (layers, width) tells which one it was.
ORIGINAL_BASES = {(12, 768): "gpt2", (24, 1024): "gpt2-medium", (36, 1280): "gpt2-large", (48, 1600): "gpt2-xl"}


@dataclass(frozen=True)
class LoadedPrefix:
    """A prefix read from a checkpoint."""

    config: PrefixConfig
    base: dict[str, Any]  # {"name", "revision"}
    task: dict[str, Any]
    network: dict[str, Tensor]  # state dict of PrefixTuning
    flat: Tensor  # keys and values (P, 2*L*H*D)


def save_prefix(
    directory: Path,
    prefix: PrefixTuning,
    base: Mapping[str, Any],
    task: Mapping[str, Any],
    scores: Mapping[str, Any] | None = None,
) -> None:
    """Write the network and its flattened keys and values; raises OSError if the disk does not take them."""
    checkpoint.save(
        directory,
        family=FAMILY,
        base=base,
        prefix=prefix.config.as_dict(),
        task=task,
        network=prefix.state_dict(),
        flat={"prefix": prefix.flat().detach()},
        versions=record.versions(),
        scores=scores,
    )


def load_prefix(directory: Path | str) -> LoadedPrefix:
    """Read a checkpoint of this package, or of the original code. Raises UserError if it is neither, or damaged."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"checkpoint {directory}: no such folder")
    if not checkpoint.is_checkpoint(directory):
        return _load_original(directory)
    read = checkpoint.load(directory, FAMILY)
    config = PrefixConfig.from_saved(read.prefix, directory)
    return LoadedPrefix(config, read.base, read.task, read.network, read.flat["prefix"])


def _load_original(directory: Path) -> LoadedPrefix:
    """config.json + pytorch_model.bin as the original wrote them; only its standard prefix is known here."""
    saved, network = checkpoint.read_original_weights(directory)
    expected = {f"control_trans.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")} | {"wte.weight"}
    if network.keys() != expected:
        odd = ", ".join(sorted(network.keys() ^ expected))
        raise UserError(f"{directory}: not a standard activation prefix of the original (differs in {odd})")
    try:
        config = PrefixConfig(
            preseqlen=network["wte.weight"].shape[0],  # the file's own value can differ (low-data initialisation)
            mid_dim=network["control_trans.0.weight"].shape[0],
            prefix_dropout=float(saved.get("prefix_dropout", 0.0)),
            prefix_mode="activation",
            format_mode=saved.get("format_mode", "cat"),
            n_layer=saved["n_layer"],
            n_head=saved["n_head"],
            head_dim=saved["n_embd"] // saved["n_head"],
            n_embd=saved["n_embd"],
        )
    except KeyError as error:
        raise UserError(f"{directory}/config.json has no {error}: not a GPT-2 prefix of the original") from error
    if network["control_trans.2.bias"].shape[0] != 2 * config.n_layer * config.n_embd:
        raise UserError(f"{directory}: not an activation prefix (its network's output has another size)")
    if config.format_mode not in ("cat", "peek"):
        raise UserError(f"{directory}: format_mode {config.format_mode} is not available in this version")
    prefix = PrefixTuning(config)
    prefix.load_state_dict(network)
    base = {"name": ORIGINAL_BASES.get((config.n_layer, config.n_embd)), "revision": None}
    task = {"mode": saved.get("_my_arg_task_mode"), "tuning_mode": "prefixtune"}
    return LoadedPrefix(config, base, task, network, prefix.flat().detach())
