"""Prefix checkpoints of this tree: save a prefix module, load one, read the original code's."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gpt2.prefix_config import PrefixConfig
from gpt2.train_control import FAMILY, join_layers, make_prefix
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
    network: dict[str, Tensor]  # state dict of the prefix module
    stored: dict[str, Tensor]  # what decoding needs: see the module's `stored`

    @property
    def flat(self) -> Tensor:
        """Keys and values (P, 2*L*H*D)."""
        return self.stored["prefix"]

    def for_decoding(self) -> nn.Module:
        """A module that gives the same prefix, without the network wherever keys and values were stored."""
        if "prefix" not in self.stored:
            prefix = make_prefix(self.config)
            prefix.load_state_dict(self.network)
        else:
            shallow = {"prefix_mode": "activation", "init_shallow": True, "preseqlen": len(self.flat)}
            prefix = make_prefix(replace(self.config, **shallow))
            names = {"prefix": "control_trans", "wte2": "wte2.weight"}
            prefix.load_state_dict({names[name]: tensor for name, tensor in self.stored.items()})
        return prefix.eval().requires_grad_(False)


def save_prefix(
    directory: Path,
    prefix: nn.Module,
    base: Mapping[str, Any],
    task: Mapping[str, Any],
    scores: Mapping[str, Any] | None = None,
    *,
    model: nn.Module | None = None,
) -> None:
    """Write the network and what decoding needs of it; raises OSError if the disk does not take them.

    `model` is the base model, which an embedding prefix needs to be turned into keys and values.
    """
    checkpoint.save(
        directory,
        family=FAMILY,
        base=base,
        prefix=prefix.config.as_dict(),
        task=task,
        network=prefix.state_dict(),
        flat=prefix.stored(model),
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
    return LoadedPrefix(config, read.base, read.task, read.network, read.flat)


def _load_original(directory: Path) -> LoadedPrefix:
    """config.json + pytorch_model.bin as the original wrote them: every kind of prefix it had."""
    saved, network = checkpoint.read_original_weights(directory)
    try:
        config = _original_config(saved, network)
    except (KeyError, AttributeError) as error:
        raise UserError(f"{directory} has no {error}: not a GPT-2 prefix of the original") from error
    if config.init_shallow:
        network = {**network, "control_trans": _original_shallow(network["control_trans"], config)}
    prefix = make_prefix(config)
    expected = {name: array.shape for name, array in prefix.state_dict().items()}
    found = {name: array.shape for name, array in network.items()}
    if found != expected:
        odd = ", ".join(sorted({name for name, _ in found.items() ^ expected.items()}))
        raise UserError(f"{directory}: not a GPT-2 prefix of the original (names or shapes differ in {odd})")
    prefix.load_state_dict(network)
    base = {"name": ORIGINAL_BASES.get((config.n_layer, config.n_embd)), "revision": None}
    task = {"mode": saved.get("_my_arg_task_mode"), "tuning_mode": "prefixtune"}
    # trained embeddings become keys and values only once their base model is there
    stored = {} if config.prefix_mode == "embedding" else prefix.stored(None)
    return LoadedPrefix(config, base, task, network, stored)


def _original_config(saved: Mapping[str, Any], network: Mapping[str, Tensor]) -> PrefixConfig:
    """The settings, told from the arrays where they say more than the file, whose P can be another (word starts)."""
    layers, heads, width = saved["n_layer"], saved["n_head"], saved["n_embd"]
    shallow = "control_trans" in network
    last = max((name for name in network if name.startswith("control_trans") and name.endswith("bias")), default=None)
    embedding = not shallow and (last is None or len(network[last]) == width)
    if shallow:
        length = network["control_trans"].numel() // (2 * layers * width)
    else:
        length = len(network["wte.weight"]) if "wte.weight" in network else 0
    form = saved.get("format_mode", "cat")
    return PrefixConfig(
        preseqlen=length,
        mid_dim=saved.get("mid_dim", 512) if last is None else len(network["control_trans.0.weight"]),
        prefix_dropout=float(saved.get("prefix_dropout", 0.0)),
        prefix_mode="embedding" if embedding else "activation",
        format_mode="infix" if "wte2.weight" in network else form,
        n_layer=layers,
        n_head=heads,
        head_dim=width // heads,
        n_embd=width,
        optim_prefix=shallow or "wte.weight" in network,
        parametrize_emb="Emb" if last is None else "MLP",
        use_deep=last == "control_trans.4.bias",
        init_shallow=shallow,
    )


def _original_shallow(trained: Tensor, config: PrefixConfig) -> Tensor:
    """The original's keys and values without an MLP as (P, 2*L*H*D): kept flat, or (2L, 1, H, P, D) if from words."""
    if trained.dim() == 1:
        return trained.view(config.preseqlen, config.width)
    return join_layers(list(zip(trained[0::2], trained[1::2], strict=True)))
