"""A trained checkpoint, ready to decode: the language model, its prefix if it has one, and what its training knew."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpt2 import flags
from gpt2.dataset import Encoded, Format, pad_sources
from gpt2.frozen_lm import check_rows
from gpt2.prefix_config import max_positions
from gpt2.prefix_io import load_prefix
from gpt2.train_control import FAMILY, Past
from gpt2.tuning import load_tuned
from prefixlib import checkpoint
from prefixlib.base_model import choose_base, load_model, load_tokenizer
from prefixlib.errors import UserError


@dataclass
class Generator:
    """A model ready to decode: the language model, its prefix if it has one, and what its training knew."""

    model: nn.Module
    tokenizer: Any
    layers: Sequence[tuple[Tensor, Tensor]] | None = None  # a prefix that all share: keys and values (1, H, P, D)
    seen_categories: Collection[str] = field(default_factory=tuple)  # categories of the training set (WebNLG)
    source_limit: int | None = None  # most tokens of a source (summaries)
    prefix: nn.Module | None = None  # a prefix that depends on the source
    form: Format = field(default_factory=Format)

    @classmethod
    def of(cls, model: nn.Module, tokenizer, prefix: nn.Module | None, task: Mapping[str, Any]) -> "Generator":
        """The base model behind its prefix module, or a whole model where `prefix` is None, as `task` trained it."""
        known = {"model": model, "tokenizer": tokenizer, "seen_categories": task.get("categories", ())}
        known["source_limit"] = source_limit(task)
        if prefix is None:
            return cls(**known, form=Format(word=task.get("lowdata_token", "")))
        known["form"] = prefix.config.form
        if prefix.config.needs_source:
            return cls(**known, prefix=prefix)
        with torch.no_grad():
            return cls(**known, layers=prefix.past(model, 1).layers)

    @property
    def prompt_room(self) -> int:
        """Positions that the model leaves beside the prefix."""
        shared = self.layers[0][0].shape[2] if self.layers else 0
        return max_positions(self.model.config) - (self.prefix.config.preseqlen if self.prefix else shared)

    def past(self, examples: Sequence[Encoded]) -> Past:
        """The prefixes of examples that have their own."""
        batch = {name: ids.to(self.model.device) for name, ids in pad_sources(examples).items()}
        return self.prefix.past(self.model, len(examples), **batch)


def load_generator(
    directory: Path, mode: str, model_name: str | None, cache_dir: str | None, dtype: torch.dtype
) -> Generator:
    """A prefix checkpoint on its base model, or the folder of a tuned model. Raises UserError on any mismatch."""
    if not checkpoint.is_prefix(directory) and (directory / "config.json").is_file():
        return _load_finetuned(directory, mode, model_name, cache_dir, dtype)
    prefix = load_prefix(directory)
    checkpoint.check_agrees({"mode": mode}, {"mode": prefix.task.get("mode") or mode}, directory)
    name, revision = choose_base(prefix.base, model_name, directory)
    model = load_model(name, FAMILY, revision=revision, cache_dir=cache_dir, dtype=dtype)
    tokenizer = load_tokenizer(name, revision=revision, cache_dir=cache_dir)
    config = type(prefix.config).for_model(
        model.config,
        **{key: value for key, value in prefix.config.as_dict().items() if not key.startswith(("n_", "head"))},
    )
    if config != prefix.config:
        raise UserError(f"the prefix in {directory} was trained for a model of another shape than {name}")
    model = _to_device(model)
    return Generator.of(model, tokenizer, prefix.for_decoding().to(model.device), {**prefix.task, "mode": mode})


def _load_finetuned(
    directory: Path, mode: str, model_name: str | None, cache_dir: str | None, dtype: torch.dtype
) -> Generator:
    if model_name is not None:
        raise UserError(f"--model_name_or_path {model_name} contradicts {directory}, which is a whole model itself")
    model, task = load_tuned(directory, mode, cache_dir=cache_dir, dtype=dtype)
    check_rows(model)
    tokenizer = load_tokenizer(str(directory), cache_dir=cache_dir)
    return Generator.of(_to_device(model), tokenizer, None, {**task, "mode": mode})


def source_limit(task: Mapping[str, Any]) -> int | None:
    """Most tokens of a source: what the checkpoint was trained with, else its mode's own."""
    return task.get("max_source_length") or flags.PART_LIMITS.get(task.get("mode"), {}).get("max_source_length")


def _to_device(model: nn.Module) -> nn.Module:
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
