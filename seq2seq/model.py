"""The model object of encoder-decoders: this family's hooks of prefixlib.model.

    model = load("seq2seq/xsum_models/NAME")
    model.generate(["The document to summarise."])

Legend: P prefix length, L layers, H heads, D head size.
"""

import contextlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from prefixlib import model
from prefixlib.base_model.load import load_config
from prefixlib.checkpoints import checkpoint, original
from prefixlib.compute import attention
from prefixlib.data.readers import Record
from prefixlib.decoding.search import DecodingRule
from prefixlib.settings.flags import spelled
from prefixlib.settings.search import Search
from prefixlib.system.errors import UserError
from seq2seq import decoding
from seq2seq.frozen_lm import max_positions, shape_of, start_token
from seq2seq.prefix_lm import PrefixLM
from seq2seq.prefixTuning import FAMILY, PrefixConfig, PrefixTuning
from seq2seq.utils import INPUTS, Collator, Example, encode_sources

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedPrefix(model.SavedPrefix):
    """A prefix of this family read from a checkpoint."""

    config: PrefixConfig

    @property
    def flat(self) -> dict[str, Tensor]:
        """Site -> keys and values (P, 2*L*H*D)."""
        return {branch.site: self.stored[branch.saved] for branch in self.config.branches}

    def for_decoding(self) -> PrefixTuning:
        with torch.device("meta"):  # its parameters are the stored arrays themselves
            prefix = PrefixTuning(replace(self.config, init_shallow=True))
        arrays = {branch.network: self.stored[branch.saved] for branch in prefix.branches}
        prefix.load_state_dict(arrays, assign=True)
        return prefix.eval().requires_grad_(False)


class Model(model.Model):
    """An encoder-decoder with a trained prefix, or one that was tuned itself: see prefixlib.model."""

    FAMILY, TREE, LM = FAMILY, "seq2seq", PrefixLM

    @property
    def source_limit(self) -> int:
        """Most tokens of a source: as many as in training, else the task's; no more than the model has positions."""
        limit = self.task.get("max_source_length") or self.usual.lengths["max_source_length"]
        return min(limit, max_positions(self.base.config))

    def encode(self, sources: Sequence[Any], search: Search) -> list[list[int]]:
        texts = [group.source for group in self.groups(sources)]
        texts = texts if self.task_row.verbatim else [text.strip() for text in texts]
        return self.encode_texts(texts, self.source_limit)[0]

    def encode_texts(self, texts: Sequence[str], limit: int) -> tuple[list[list[int]], int]:
        """Token ids of sources, cut to `limit` tokens, special tokens included; and how many were cut."""
        if not texts:
            return [], 0
        inputs, cut = encode_sources(self.tokenizer, self.wording, texts, limit)
        if cut:
            logger.warning("%d of %d sources cut to %d tokens", cut, len(texts), limit)
        return inputs, cut

    def rule(self, search: Search) -> DecodingRule:
        return decoding.decoding_rule(search, self.tokenizer, self.base.config, self.task_row)

    def text_of(self, tokens: Sequence[int], stop: Sequence[str]) -> str:
        return decoding.to_text(self.tokenizer, tokens, self.task_row.verbatim, stop)

    @torch.no_grad()
    def past(self, inputs: Sequence[Sequence[int]]) -> decoding.Past:
        return decoding.Past(self.lm.layers())

    @staticmethod
    def join(pasts: Sequence[decoding.Past]) -> decoding.Past:
        return decoding.side_by_side([past.layers for past in pasts])

    def start(self, inputs: Sequence[Sequence[int]], past: decoding.Past) -> tuple[Any, list[list[int]]]:
        return decoding.start(self.base, inputs, past, self.lm.head)

    def mean_loss(self, records: Sequence[Record], batch_size: int) -> float:
        config, lengths = self.base.config, self.usual.lengths
        target = min(lengths["val_max_target_length"], max_positions(config))
        collate = Collator(
            self.tokenizer, config.pad_token_id, start_token(config), self.source_limit, target, self.wording
        )
        examples = [Example(record.source, (record.target,)) for record in records]
        total = count = 0.0
        for first in range(0, len(examples), batch_size):
            batch = collate(examples[first : first + batch_size])
            loss, tokens = self.lm.loss(*(batch[name].to(self.base.device) for name in INPUTS))
            total, count = total + loss.item(), count + tokens.item()
        return total / count

    def save_base(self, directory: Path) -> None:
        # the config that is saved names what plain transformers knows
        self.base.set_attn_implementation("sdpa" if self.base._supports_sdpa else "eager")
        super().save_base(directory)
        attention.install(self.base)

    @staticmethod
    def shape_of(base: nn.Module) -> dict[str, Any]:
        return _shape_or_none(base.config)

    @classmethod
    def load_base_of(cls, saved: SavedPrefix, directory: Path | str, name: str | None = None, **how: Any) -> Any:
        if how.pop("attn_implementation", None):
            raise UserError("attn_implementation: an encoder-decoder attends through this package's own function")
        return super().load_base_of(saved, directory, name, **how)

    @classmethod
    def read_prefix(cls, directory: Path | str) -> SavedPrefix:
        """Read a prefix of this package, or of the original code. Raises UserError if it is neither, or damaged."""
        directory = Path(directory).expanduser()
        if not directory.is_dir():
            raise UserError(f"checkpoint {directory}: no such folder")
        if checkpoint.is_checkpoint(directory):
            read = checkpoint.load(directory, FAMILY)
            config = checkpoint.rebuild(PrefixConfig, read.prefix, directory / checkpoint.CONFIG)
            stored = {b.saved: (config.preseqlen, math.prod(config.shape(b.site))) for b in config.branches}
            model.check_arrays(read, config, PrefixTuning, stored)
            return SavedPrefix(config, read.base, read.task, read.network, read.flat)
        found = original.read_bart(directory)
        prefix = PrefixTuning(checkpoint.rebuild(PrefixConfig, found.settings, directory))
        original.load_network(prefix, found, directory, "BART")
        return SavedPrefix(prefix.config, found.base, found.task, found.network, prefix.stored(None))


def _shape_or_none(config: PreTrainedConfig) -> dict[str, Any]:
    """The shape of a model; {} for one of the other family."""
    with contextlib.suppress(AttributeError):
        return shape_of(config)
    return {}


def shape_by_name(name: str, revision: str | None) -> dict[str, Any]:
    """The shape of the model `name`, from its config.json; {} for another family."""
    return _shape_or_none(load_config(name, revision=revision))


load, load_mixed = Model.load, Model.load_mixed
load_prefix, save_prefix = Model.read_prefix, Model.save_prefix


def saved_settings(directory: Path | str) -> dict[str, Any]:
    """What a checkpoint was trained with, under the flags' names and in their spelling; {} where it does not say.

    Raises UserError for a folder that is neither a prefix checkpoint nor a model's.
    """
    directory = Path(directory)
    if not original.is_prefix(directory) and checkpoint.model_folder(directory) is not None:
        return checkpoint.load_task(checkpoint.model_folder(directory))
    if checkpoint.is_checkpoint(directory):
        config = checkpoint.read_config(directory)
        prefix, task = config["prefix"], config["task"]
    else:
        saved = load_prefix(directory)
        prefix, task = saved.config.as_dict(), saved.task
    values = {name: spelled(value) for name, value in prefix.items()}
    return {**values, "dropout": values.get("prefix_dropout"), **task}
