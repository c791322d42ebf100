"""What each tuning mode trains: building the model around its base, saving what was trained, loading it again."""

import argparse
import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gpt2.prefix_io import load_prefix, save_prefix
from gpt2.train_control import FAMILY, PrefixConfig, PrefixLM, PrefixTuning
from prefixlib import adapters, attention, checkpoint, files, layers
from prefixlib.base_model import OWN_MODEL, load_config, load_model, save_whole
from prefixlib.errors import UserError


def load_base(name: str, args: argparse.Namespace) -> nn.Module:
    """The base model in the precision and with the dropout that the run wants."""
    # frozen weights need no float32 master copy under bf16; weights that are trained do
    dtype = torch.bfloat16 if args.bf16 == "yes" and args.tuning_mode == "prefixtune" else torch.float32
    hub = {"revision": args.model_revision, "cache_dir": args.cache_dir}
    without_dropout = {}
    if args.tuning_mode == "prefixtune" and args.gradient_checkpointing == "yes" and args.use_dropout == "no":
        # layers are checkpointed in train mode only, so there the dropout has to be taken out of the model
        settings = load_config(name, **hub).to_dict()
        without_dropout = {key: 0.0 for key, value in settings.items() if "drop" in key and isinstance(value, float)}
    return load_model(name, FAMILY, **hub, dtype=dtype, **without_dropout)


def base_record(name: str, base: nn.Module, args: argparse.Namespace) -> dict[str, Any]:
    """What a checkpoint says of its base model: name, and the hub commit that was loaded."""
    return {"name": name, "revision": args.model_revision or getattr(base.config, "_commit_hash", None)}


def make_model(args: argparse.Namespace, base: nn.Module) -> nn.Module:
    """The model to train: the base with a prefix in front, or the base itself, whole, in part or with adapters.

    Just what the tuning mode trains requires gradients.
    """
    if args.tuning_mode in ("finetune", "finetune-top", "adaptertune"):
        if args.tuning_mode == "finetune-top":
            layers.train_top(base, args.top_layers, embeddings=args.top_embeddings == "yes")
        elif args.tuning_mode == "adaptertune":
            adapters.insert(base, args.adapter_design, args.adapter_bottleneck)
            adapters.train_only_adapters(base)
        if args.gradient_checkpointing == "yes":
            attention.enable_checkpointing(base)
        return base
    config = PrefixConfig.for_model(
        base.config,
        preseqlen=args.preseqlen,
        mid_dim=args.mid_dim,
        prefix_dropout=args.dropout,
        prefix_mode=args.prefix_mode,
        format_mode=args.format_mode,
    )
    prefix = PrefixTuning(config)
    if args.prefix_model_path:
        earlier = load_prefix(Path(args.prefix_model_path).expanduser())
        checkpoint.check_agrees(
            {name: getattr(config, name) for name in ("preseqlen", "mid_dim", "n_layer", "n_embd")},
            earlier.config.as_dict(),
            args.prefix_model_path,
        )
        prefix.load_state_dict(earlier.network)
    checkpointing, both = args.gradient_checkpointing == "yes", args.tuning_mode == "bothtune"
    trained = [parameter for parameter in base.parameters() if both and parameter.requires_grad]
    lm = PrefixLM(
        base, prefix, train_base=both or args.use_dropout == "yes" or checkpointing, checkpointing=checkpointing
    )
    for parameter in trained:  # PrefixLM freezes its base
        parameter.requires_grad_(True)
    return lm


def save_model(
    directory: Path, *, model: nn.Module, tokenizer, base: dict[str, Any], task: dict[str, Any], scores=None
) -> None:
    """Write what was trained: the prefix, the whole model in transformers' format with its tokenizer, or both.

    Of both, the model goes to DIRECTORY/model. With `scores` the weights are in place already and only the prefix's
    model card changes.
    """
    if not isinstance(model, PrefixLM):
        _save_base(directory, model, tokenizer, {**task, "base_model": base})
        (directory / checkpoint.CONFIG).unlink(missing_ok=True)  # of an earlier run, or it would be what is decoded
        return
    if task.get("tuning_mode") == "bothtune":
        if scores is None:
            (directory / checkpoint.CONFIG).unlink(
                missing_ok=True
            )  # no prefix vouches for a model it wasn't tuned with
            write = functools.partial(
                _save_base, model=model.base, tokenizer=tokenizer, task={**task, "base_model": base}
            )
            directory.mkdir(parents=True, exist_ok=True)
            files.replace_directory(directory / OWN_MODEL, write)
        task, base = {**task, "tuned_from": base["name"]}, {"name": OWN_MODEL, "revision": None}
    save_prefix(directory, model.prefix, base, task, scores)


def _save_base(directory: Path, model: nn.Module, tokenizer, task: dict[str, Any]) -> None:
    save_whole(directory, model, tokenizer)
    checkpoint.save_task(directory, task)


def load_weights(directory: Path, model: nn.Module) -> None:
    """The counterpart of `save_model`, for resuming."""
    if not isinstance(model, PrefixLM):
        model.load_state_dict(load_model(str(directory), FAMILY, dtype=torch.float32).state_dict())
        return
    saved = load_prefix(directory)
    model.prefix.load_state_dict(saved.network)
    if saved.base["name"] == OWN_MODEL:
        model.base.load_state_dict(load_model(str(directory / OWN_MODEL), FAMILY, dtype=torch.float32).state_dict())


def load_tuned(directory: Path, mode: str, **how: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A model that was tuned itself (wholly, in its top layers, with adapters) and its task, for decoding.

    `how` goes to `load_model`. Raises UserError if it is none, was trained for another mode, or needs its prefix.
    """
    task = checkpoint.load_task(directory)
    if task.get("tuning_mode") == "bothtune":
        raise UserError(f"{directory} was tuned together with a prefix: pass {directory.parent}, which holds both")
    checkpoint.check_agrees({"mode": mode}, {"mode": task.get("mode") or mode}, directory)
    return load_model(str(directory), FAMILY, **how), task
