"""What each tuning mode trains: building the model around its base, saving what was trained, loading it again."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gpt2.prefix_io import load_prefix, save_prefix
from gpt2.train_control import FAMILY, PrefixConfig, PrefixLM, PrefixTuning
from prefixlib import attention, checkpoint
from prefixlib.base_model import load_config, load_model
from prefixlib.errors import UserError


def load_base(name: str, args: argparse.Namespace) -> nn.Module:
    """The base model in the precision and with the dropout that the run wants."""
    # frozen weights need no float32 master copy under bf16; weights that are trained do
    dtype = torch.bfloat16 if args.bf16 == "yes" and args.tuning_mode == "prefixtune" else torch.float32
    hub = {"revision": args.model_revision, "cache_dir": args.cache_dir}
    dropout = {}
    if args.use_custom_teacher_dropout == "yes":
        if not hasattr(load_config(name, **hub), "resid_pdrop"):
            raise UserError(f"--use_custom_teacher_dropout yes: {name} has no residual dropout (resid_pdrop) to set")
        dropout = {"resid_pdrop": args.dropout}
    if args.tuning_mode == "prefixtune" and args.gradient_checkpointing == "yes" and args.use_dropout == "no":
        # layers are checkpointed in train mode only, so there the dropout has to be taken out of the model
        settings = load_config(name, **hub).to_dict()
        dropout = {key: 0.0 for key, value in settings.items() if "drop" in key and isinstance(value, float)}
    return load_model(name, FAMILY, **hub, dtype=dtype, **dropout)


def base_record(name: str, base: nn.Module, args: argparse.Namespace) -> dict[str, Any]:
    """What a checkpoint says of its base model: name, and the hub commit that was loaded."""
    return {"name": name, "revision": args.model_revision or getattr(base.config, "_commit_hash", None)}


def make_model(args: argparse.Namespace, base: nn.Module) -> nn.Module:
    """The model to train: the base with a prefix in front, or the base itself with every weight trainable."""
    if args.tuning_mode == "finetune":
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
    checkpointing = args.gradient_checkpointing == "yes"
    return PrefixLM(base, prefix, train_base=args.use_dropout == "yes" or checkpointing, checkpointing=checkpointing)


def save_model(
    directory: Path, *, model: nn.Module, tokenizer, base: dict[str, Any], task: dict[str, Any], scores=None
) -> None:
    """Write what was trained: the prefix alone, or the whole model in transformers' format with its tokenizer."""
    if isinstance(model, PrefixLM):
        save_prefix(directory, model.prefix, base, task, scores)
    else:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        checkpoint.save_task(directory, {**task, "base_model": base})


def load_weights(directory: Path, model: nn.Module) -> None:
    """The counterpart of `save_model`, for resuming."""
    if isinstance(model, PrefixLM):
        model.prefix.load_state_dict(load_prefix(directory).network)
    else:
        model.load_state_dict(load_model(str(directory), FAMILY, dtype=torch.float32).state_dict())
