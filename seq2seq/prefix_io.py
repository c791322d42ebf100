"""Prefix checkpoints of this tree: save a PrefixTuning, load one, read the original code's."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefixlib import checkpoint, record
from prefixlib.errors import UserError
from seq2seq.frozen_lm import Layers
from seq2seq.prefixTuning import BRANCHES, FAMILY, PrefixConfig, PrefixTuning, split_layers

# The original's checkpoints name no base model; its shape (layers, width) tells which one it was.
ORIGINAL_BASES = {(6, 768): "facebook/bart-base", (12, 1024): "facebook/bart-large"}


@dataclass(frozen=True)
class LoadedPrefix:
    """A prefix read from a checkpoint."""

    config: PrefixConfig
    base: dict[str, Any]  # {"name", "revision"}
    task: dict[str, Any]
    network: dict[str, Tensor]  # state dict of PrefixTuning
    flat: dict[str, Tensor]  # site -> keys and values (P, 2*L*H*D)

    def layers(self, device: torch.device) -> dict[str, Layers]:
        """Per site and layer keys and values (1, H, P, D): all that decoding needs."""
        return {site: split_layers(flat.to(device), self.config, site, rows=1) for site, flat in self.flat.items()}

    def settings(self) -> dict[str, Any]:
        """The settings under the names and in the spelling of the flags."""
        spelled = {name: {True: "yes", False: "no"}.get(value, value) for name, value in self.config.as_dict().items()}
        return {**spelled, "dropout": self.config.prefix_dropout}


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
        flat={site: flat.detach() for site, flat in prefix.flat().items()},
        versions=record.versions(),
        scores=scores,
    )


def load_prefix(directory: Path | str) -> LoadedPrefix:
    """Read a checkpoint of this package, or of the original code. Raises UserError if it is neither, or damaged."""
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise UserError(f"checkpoint {directory}: no such folder")
    if not checkpoint.is_checkpoint(directory):
        return _load_original(directory)
    read = checkpoint.load(directory, FAMILY)
    return LoadedPrefix(
        PrefixConfig.from_saved(read.prefix, directory), read.base, read.task, network=read.network, flat=read.flat
    )


def _load_original(directory: Path) -> LoadedPrefix:
    """config.json + pytorch_model.bin as the original wrote them: three branches, plain or deep."""
    saved, network = checkpoint.read_original_weights(directory)
    try:
        config = PrefixConfig(
            preseqlen=network["wte.weight"].shape[0],
            mid_dim=network["control_trans.0.weight"].shape[0],
            prefix_dropout=float(saved.get("prefix_dropout", 0.0)),
            use_deep="control_trans.4.weight" in network,
            **{branch.switch: True for branch in BRANCHES},
            init_shallow=False,
            encoder_layers=saved["encoder_layers"],
            decoder_layers=saved["decoder_layers"],
            encoder_heads=saved["encoder_attention_heads"],
            decoder_heads=saved["decoder_attention_heads"],
            d_model=saved["d_model"],
        )
    except KeyError as error:
        raise UserError(f"{directory} has no {error}: not a BART prefix of the original") from error
    prefix = PrefixTuning(config)
    if {name: p.shape for name, p in network.items()} != {name: p.shape for name, p in prefix.state_dict().items()}:
        raise UserError(f"{directory}: not a BART prefix of the original (its arrays have other names or shapes)")
    prefix.load_state_dict(network)
    base = {"name": ORIGINAL_BASES.get((config.decoder_layers, config.d_model)), "revision": None}
    flat = {site: flat.detach() for site, flat in prefix.flat().items()}
    return LoadedPrefix(config, base, {"tuning_mode": "prefixtune"}, network, flat)
