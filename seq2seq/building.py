"""A new model to train: the base model, a prefix and its start; or what is tuned inside the base model.

Legend: P prefix length, L layers, H heads, D head size.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefixlib.base_model.load import (
    check_tokenizer,
    dropout_settings,
    fingerprint,
    load_config,
    load_model,
    load_tokenizer,
    resolve_model_name,
)
from prefixlib.compute import attention
from prefixlib.methods.starts import Given, regress, start_from_checkpoint, start_random
from prefixlib.methods.table import METHODS
from prefixlib.system.errors import UserError
from seq2seq.flags import DEFAULT_MODEL, Settings
from seq2seq.frozen_lm import install, key_values_of_text, max_positions
from seq2seq.model import Model, load_prefix
from seq2seq.prefix_lm import PrefixLM
from seq2seq.prefixTuning import FAMILY, PrefixConfig, PrefixTuning

logger = logging.getLogger(__name__)


def new(settings: Settings, *, resuming: bool = False, texts: Sequence[str] = ()) -> Model:
    """The model that a run trains: a base with a new prefix, or the base itself, whole, in part, or its adapters.

    Just what the tuning mode trains requires gradients. The prefix starts at random, from a text, or at the weights of
    --prefix_model_path; that of a resumed run gets its weights later, so it does not start from a text again. The
    tokenizer must be able to write `texts`. Raises UserError for a base model or a start that does not fit.
    """
    name = resolve_model_name(settings.model_name_or_path or DEFAULT_MODEL)
    hub = {"revision": settings.model_revision, "cache_dir": settings.cache_dir}
    tokenizer = load_tokenizer(name, **hub)
    method = METHODS[settings.tuning_mode]
    without = not method.tunes_base and not settings.use_dropout
    dropout = dropout_settings(load_config(name, **hub))
    # a layer that is left out (LayerDrop, M2M100) would leave out its prefix: a step could be without any gradient
    off = {key: 0.0 for key in dropout if without or (settings.has_prefix and "layerdrop" in key)}
    base = load_model(name, FAMILY, **hub, quantization=settings.quantization, **off)
    check_tokenizer(name, tokenizer, base, texts)
    mark, prefix = fingerprint(base, tokenizer), None  # before adapters are put in
    if settings.has_prefix:
        install(base)
        path = settings.checkpoint if settings.prefix_model_path else None
        chosen = settings.prefix_settings()
        prefix = make_start(base, tokenizer, settings.start, chosen, settings.start_text(), path, resuming=resuming)
    method.apply(base, vars(settings))
    lm = PrefixLM(base, prefix, freeze=not method.tunes_base)
    if settings.gradient_checkpointing:
        attention.enable_checkpointing(base)
    task = {
        "mode": settings.mode,
        "tuning_mode": settings.tuning_mode,
        "seed": settings.seed,
        "max_source_length": settings.lengths(max_positions(base.config))["max_source_length"],
        **settings.data_settings(),
        **settings.tuning_settings(),
    }
    record_ = {"name": name, "revision": settings.model_revision, "fingerprint": mark}
    if settings.quantization:
        record_["quantization"] = settings.quantization
    return Model(lm, tokenizer, task, record_)


def make_start(
    base: nn.Module,
    tokenizer: Any,
    name: str,
    chosen: Mapping[str, Any],
    text: str | None = None,
    path: Path | None = None,
    *,
    resuming: bool = False,
) -> PrefixTuning:
    """The prefix with the start `name` of STARTS.

    chosen: the settings of its PrefixConfig. text, path: the text or the checkpoint that it starts from.
    A resumed run reads its weights later; it does not start again. Raises UserError for a model that it does not fit.
    """
    given = Given(base)
    if name == "text":
        given.ids, limit = text_ids(tokenizer, text), max_positions(base.config)
        if not 0 < len(given.ids) <= limit:
            raise UserError(f"the initial text has {len(given.ids)} tokens; it needs 1 to {limit}")
    config = PrefixConfig.for_model(base.config, **{**chosen, "preseqlen": len(given.ids) or chosen["preseqlen"]})
    if name == "checkpoint":
        saved = load_prefix(path)
        known, wanted = saved.config.as_dict(), config.as_dict()
        differing = [f"{name} {known[name]}, not {wanted[name]}" for name in known if known[name] != wanted[name]]
        if differing:
            raise UserError(f"--prefix_model_path {path} was trained with other settings: {', '.join(differing)}")
        given.network = saved.network
    prefix = PrefixTuning(config)
    if not resuming:
        STARTS[name](prefix, given)
    return prefix


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """The text's tokens, without special ones."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# ---- starts of a prefix (paper section 7.4) ----------------------------------------------------------------------


def start_from_text(prefix: PrefixTuning, given: Given) -> list[float]:
    """Start the prefix at the keys and values of P tokens: copied without an MLP, else the MLPs are trained onto them.

    The training is the original's: Adam on the networks, not the embeddings, mean squared error; returns its losses.
    """
    target = key_values_of_text(given.base, list(given.ids))
    if prefix.config.init_shallow:
        with torch.no_grad():
            for branch in prefix.branches:
                getattr(prefix, branch.network).copy_(target[branch.site])
        return []
    networks = nn.ModuleList(getattr(prefix, branch.network) for branch in prefix.branches)

    def loss() -> Tensor:
        flat = prefix.flat()
        return sum(nn.functional.mse_loss(prefix.dropout(flat[site]), target[site]) for site in flat)

    return regress(prefix, networks.parameters(), loss, len(given.ids))


# Every start of a prefix, by the name that `Settings.start` gives: (prefix, what it is made of) -> None.
STARTS: Mapping[str, Callable[[PrefixTuning, Given], Any]] = {
    "random": start_random,
    "text": start_from_text,
    "checkpoint": start_from_checkpoint,
}
