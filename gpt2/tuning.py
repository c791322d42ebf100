"""What each tuning mode trains: building the model around its base, saving what was trained, loading it again."""

import argparse
import functools
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gpt2.frozen_lm import check_rows, check_shape
from gpt2.initialise import given_text, start_from_text, start_uniform, text_ids
from gpt2.prefix_config import PrefixConfig, max_positions
from gpt2.prefix_io import load_prefix, save_prefix
from gpt2.train_control import FAMILY, PrefixLM, make_prefix
from prefixlib import adapters, attention, checkpoint, files, gguf_base, layers
from prefixlib.base_model import OWN_MODEL, dropout_settings, load_config, load_model, save_whole
from prefixlib.errors import UserError

logger = logging.getLogger(__name__)


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
        dropout = dict.fromkeys(dropout_settings(load_config(name, **hub)), 0.0)
    return load_model(name, FAMILY, **hub, dtype=dtype, **dropout)


def base_record(name: str, base: nn.Module, args: argparse.Namespace) -> dict[str, Any]:
    """What a checkpoint says of its base model: name, and the hub commit or the GGUF file that was loaded."""
    revision = args.model_revision or getattr(base.config, "_commit_hash", None)
    return {"name": name, "revision": revision, **gguf_base.described(name)}


def make_model(args: argparse.Namespace, base: nn.Module, tokenizer, resuming: bool = False) -> nn.Module:
    """The model to train: the base with a prefix in front, or the base itself, whole, in part or with adapters.

    Just what the tuning mode trains requires gradients.
    """
    checkpointing, both = args.gradient_checkpointing == "yes", args.tuning_mode == "bothtune"
    if both or args.tuning_mode == "prefixtune":
        prefix = make_start(args, base, tokenizer, resuming)
        train_base = both or args.use_dropout == "yes" or checkpointing
        return PrefixLM(base, prefix, train_base=train_base, checkpointing=checkpointing, freeze=not both)
    check_rows(base)  # before the training, not when its result is to be decoded
    if args.tuning_mode == "finetune-top":
        layers.train_top(base, args.top_layers, embeddings=args.top_embeddings == "yes")
    elif args.tuning_mode == "adaptertune":
        adapters.insert(base, args.adapter_design, args.adapter_bottleneck)
        adapters.train_only_adapters(base)
    if checkpointing:
        attention.enable_checkpointing(base)
    return base


def prefix_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of PrefixConfig that the flags choose. P is the flag's: a text to start from has its own."""
    return {
        "preseqlen": args.preseqlen if args.optim_prefix == "yes" else 0,
        "mid_dim": args.mid_dim,
        "prefix_dropout": args.dropout,
        "prefix_mode": args.prefix_mode,
        "format_mode": args.format_mode,
        "optim_prefix": args.optim_prefix == "yes",
        "parametrize_emb": args.parametrize_emb,
        "use_deep": args.use_deep == "yes",
        "init_shallow": args.init_shallow == "yes",
        "init_text": given_text(args),
    }


def check_same_prefix(args: argparse.Namespace, earlier: PrefixConfig, directory: Path | str) -> None:
    """Raise UserError naming both values if the flags ask for another prefix than the checkpoint in `directory` has."""
    given, known = prefix_settings(args), earlier.as_dict()
    text, started = given.pop("init_text"), known.pop("init_text")
    if not args.prefix_model_path and text != started:  # a prefix taken over from another run has started long ago
        how = "did not start from a text" if started is None else f"started from the text {started!r}"
        raise UserError(f"{directory} {how}: --init_text (--init_shallow_word, --lowdata_token) says otherwise")
    if text is not None:
        del given["preseqlen"]  # it is the text's
    spelled = {True: "yes", False: "no"}

    def as_flags(settings: dict[str, Any]) -> dict[str, Any]:
        settings = {name: spelled[v] if isinstance(v, bool) else v for name, v in settings.items()}
        return {"dropout": settings.pop("prefix_dropout"), **settings}

    checkpoint.check_agrees(as_flags(given), as_flags(known), directory)


def make_start(args: argparse.Namespace, base: nn.Module, tokenizer, resuming: bool) -> nn.Module:
    """The prefix with the start that the flags ask for: random, from a text, or another checkpoint's weights.

    A resumed run has its weights already; it does not start again. Raises UserError for a model that it does not fit.
    """
    settings = prefix_settings(args)
    ids = None
    if settings["init_text"] is not None:
        ids = text_ids(tokenizer, settings["init_text"], max_positions(base.config) - 2)
        settings["preseqlen"] = len(ids)
    config = PrefixConfig.for_model(base.config, **settings)
    check_shape(base, config)
    if args.prefix_model_path:
        earlier = load_prefix(Path(args.prefix_model_path).expanduser())
        check_same_prefix(args, earlier.config, args.prefix_model_path)
        shape = {name: value for name, value in config.as_dict().items() if name.startswith(("n_", "head"))}
        checkpoint.check_agrees(shape, earlier.config.as_dict(), args.prefix_model_path)
    prefix = make_prefix(config)
    if args.prefix_model_path:
        prefix.load_state_dict(earlier.network)
    elif ids is not None and not resuming:
        logger.info("the prefix starts from a text of %d tokens, which is its length", len(ids))
        start_from_text(prefix, base, ids)
    elif args.init_random == "uniform" and not resuming:
        start_uniform(prefix)
    return prefix


def save_model(
    directory: Path, *, model: nn.Module, tokenizer, base: dict[str, Any], task: dict[str, Any], scores=None
) -> None:
    """Write what was trained: the prefix, the whole model in transformers' format with its tokenizer, or both.

    Of both, the model goes to DIRECTORY/model. With `scores` the weights are in place already and only the prefix's
    model card changes.
    """
    if not isinstance(model, PrefixLM):
        _save_base(directory, model, tokenizer, {**task, "base_model": base})
        return
    if task.get("tuning_mode") == "bothtune":
        tuned = {**task, "base_model": base}
        if scores is None:
            (directory / checkpoint.CONFIG).unlink(missing_ok=True)  # it vouches for another model than the new one
            directory.mkdir(parents=True, exist_ok=True)
            write = functools.partial(_save_base, model=model.base, tokenizer=tokenizer, task=tuned)
            files.replace_directory(directory / OWN_MODEL, write)
        task, base = {**task, "tuned_from": base["name"]}, {"name": OWN_MODEL, "revision": None}
    save_prefix(directory, model.prefix, base, task, scores, model=model.base)


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
