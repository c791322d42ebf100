"""The model object of decoder-only language models: this family's hooks of prefixlib.model.

    model = load("gpt2/webnlg_models/NAME")
    model.generate([" | Aarhus_Airport : cityServed : Aarhus"])

Legend: P prefix length, L layers, H key/value heads, D head size.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpt2 import decoding
from gpt2.dataset import Encoded, Format, TableToTextDataset, encode_inputs, pad_sources, truncate_all
from gpt2.flags import Settings
from gpt2.frozen_lm import check_rows, max_positions, shape_of, without_weights
from gpt2.prefix_lm import PrefixLM, mean_loss
from gpt2.train_control import FAMILY, Past, PrefixConfig, make_prefix
from prefixlib import model
from prefixlib.base_model.load import load_config, load_model
from prefixlib.checkpoints import checkpoint, original, peft_format
from prefixlib.compute import attention
from prefixlib.data.readers import Group, Record
from prefixlib.decoding.search import DecodingRule
from prefixlib.settings.search import Search
from prefixlib.system.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedPrefix(model.SavedPrefix):
    """A prefix of this family read from a checkpoint."""

    config: PrefixConfig

    @property
    def flat(self) -> Tensor:
        """Keys and values (P, 2*L*H*D)."""
        return self.stored["prefix"]

    def for_decoding(self) -> nn.Module:
        if "prefix" not in self.stored:
            prefix = make_prefix(self.config)
            prefix.load_state_dict(self.network)
        else:
            shallow = {"prefix_mode": "activation", "init_shallow": True, "preseqlen": len(self.flat)}
            prefix = make_prefix(replace(self.config, **shallow))
            names = {"prefix": "control_trans", "wte2": "wte2.weight"}
            prefix.load_state_dict({names[name]: tensor for name, tensor in self.stored.items()})
        return prefix.eval().requires_grad_(False)


class Model(model.Model):
    """A decoder-only model with a trained prefix, or one that was tuned itself: see prefixlib.model."""

    FAMILY, TREE, LM = FAMILY, "gpt2", PrefixLM

    @property
    def format(self) -> Format:
        """Which parts of an example the text holds, and what the prefix is made of."""
        if self.prefix is None:
            return Format(word=self.task.get("lowdata_token", ""), wording=self.wording)
        return Format(self.prefix.config.format_mode, self.prefix.config.optim_prefix, wording=self.wording)

    @property
    def text_positions(self) -> int:
        """Positions for prompt and output: those that the prefix does not use."""
        return max_positions(self.base.config) - (self.prefix.config.preseqlen if self.prefix else 0)

    @property
    def source_limit(self) -> int | None:
        """Most tokens of a source: as in training, else the task's; None if there is no limit."""
        of_task = self.usual.lengths.get("max_source_length") if self.task.get("mode") else None
        return self.task.get("max_source_length") or of_task

    @property
    def has_own_pasts(self) -> bool:
        return self.prefix is not None and self.prefix.config.needs_source

    def encode(self, sources: Sequence[Any], search: Search) -> list[Encoded]:
        return self.fit(self.encode_groups(self.groups(sources), search), search)

    def encode_groups(self, groups: Sequence[Group], search: Search) -> list[Encoded]:
        """The inputs of groups; of conversations, as many turns as leave room for the output."""
        rooms = [self._room(search)] * len(groups)
        return encode_inputs(self.task_row.name, groups, self.tokenizer, self.format, self.source_limit, rooms)

    def _room(self, search: Search) -> int:
        """Positions for a prompt. Raises UserError if an output leaves none."""
        length = self.rule(search).max_new_tokens
        limit = self.text_positions - length
        if limit < 2:
            raise UserError(
                f"--length {length}: the model has only {self.text_positions} positions for prompt and output"
            )
        return limit

    def fit(self, inputs: Sequence[Encoded], search: Search) -> list[Encoded]:
        """The inputs, cut so that an output of the search's length fits after each of them."""
        limit = self._room(search)
        fitted, lost = truncate_all(inputs, limit)
        cut = sum(map(bool, lost))
        if cut:
            logger.warning("%d of %d sources cut to %d tokens, so that the output fits", cut, len(inputs), limit)
        return fitted

    def rule(self, search: Search) -> DecodingRule:
        return decoding.decoding_rule(search, self.tokenizer, self.usual, self.task_row.verbatim)

    def text_of(self, tokens: Sequence[int], stop: Sequence[str]) -> str:
        return decoding.to_text(self.tokenizer, tokens, self.task_row.verbatim, stop)

    @torch.no_grad()
    def past(self, inputs: Sequence[Encoded]) -> Past:
        if self.prefix is None:
            return Past([])
        if not self.prefix.config.needs_source:
            return self.prefix.past(self.base, 1)
        batch = {name: ids.to(self.base.device) for name, ids in pad_sources(inputs).items()}
        return self.prefix.past(self.base, len(inputs), **batch)

    @staticmethod
    def join(pasts: Sequence[Past]) -> Past:
        layers = [attention.pad_prefixes([past.layers[n] for past in pasts]) for n in range(len(pasts[0].layers))]
        return Past([(layer.keys, layer.values) for layer in layers], layers[0].visible)

    def start(self, inputs: Sequence[Encoded], past: Past) -> tuple[decoding.CausalSteps, list[list[int]]]:
        prompts = [example.prompt for example in inputs]
        return decoding.CausalSteps(self.base, prompts, past.layers, past.visible, self.lm.head), prompts

    def mean_loss(self, records: Sequence[Record], batch_size: int) -> float:
        mode, form = self.task_row.name, self.format
        texts = TableToTextDataset(mode, records, self.tokenizer, self.text_positions, form, self.source_limit)
        return mean_loss(self.lm, texts.examples, self.tokenizer.eos_token_id, batch_size)

    def recorded_task(self) -> dict[str, Any]:
        return {**self.task, "separator": self.tokenizer.eos_token}  # other tools end their prompts with it

    @classmethod
    def check_base(cls, base: nn.Module) -> None:
        check_rows(base)

    @classmethod
    def check_positions(cls, config: PrefixConfig, base: nn.Module) -> None:
        config.check_positions(base.config)

    @staticmethod
    def shape_of(base: nn.Module) -> dict[str, Any]:
        return shape_of(base)

    @classmethod
    def check_fits(cls, config: PrefixConfig, shape: Mapping[str, Any], directory: Path | str, name: str) -> None:
        if not config.n_embd:  # an adapter of PEFT does not say it
            config = replace(config, n_embd=shape.get("n_embd", 0))
        super().check_fits(config, shape, directory, name)

    @classmethod
    def read_prefix(cls, directory: Path | str) -> SavedPrefix:
        """Read a prefix of this package, the original code or PEFT. Raises UserError if it is none, or damaged."""
        directory = Path(directory).expanduser()
        if not directory.is_dir():
            raise UserError(f"checkpoint {directory}: no such folder")
        if (directory / peft_format.CONFIG).is_file():
            return _read_peft(directory)
        if checkpoint.is_checkpoint(directory):
            read = checkpoint.load(directory, FAMILY)
            config = checkpoint.rebuild(PrefixConfig, read.prefix, directory / checkpoint.CONFIG, Settings)
            stored = {"prefix": (config.preseqlen, config.width)} if config.optim_prefix else {}
            if config.format_mode == "infix":
                stored["wte2"] = (config.preseqlen, config.n_embd)
            model.check_arrays(read, config, make_prefix, stored)
            return SavedPrefix(config, read.base, read.task, read.network, read.flat)
        found = original.read_gpt2(directory)
        config = checkpoint.rebuild(PrefixConfig, found.settings, directory)
        prefix = make_prefix(config)
        original.load_network(prefix, found, directory, "GPT-2")
        # trained embeddings become keys and values only once their base model is there
        stored = {} if config.prefix_mode == "embedding" else prefix.stored(None)
        return SavedPrefix(config, found.base, found.task, found.network, stored)


def _read_peft(directory: Path) -> SavedPrefix:
    """An adapter of PEFT as keys and values without an MLP."""
    adapter = peft_format.read(directory)
    config = PrefixConfig(
        preseqlen=adapter.flat.shape[0],
        mid_dim=Settings.default("mid_dim"),  # unused, but a run that goes on from here must agree with it
        prefix_dropout=0.0,
        prefix_mode="activation",
        format_mode="cat",
        n_layer=adapter.layers,
        n_head=adapter.heads,
        head_dim=adapter.flat.shape[1] // (2 * adapter.layers * adapter.heads),
        n_embd=0,  # PEFT does not say it; the base model does
        init_shallow=True,
    )
    task = {"tuning_mode": "prefixtune", "imported_from": "peft", **checkpoint.load_task(directory)}
    return SavedPrefix(config, dict(adapter.base), task, {"control_trans": adapter.flat}, {"prefix": adapter.flat})


def shape_by_name(name: str, revision: str | None) -> dict[str, Any]:
    """The shape of the model `name`, from its config.json alone if it runs without weights; {} for another family."""
    config = load_config(name, revision=revision)
    if config.is_encoder_decoder:
        return {}
    try:
        return shape_of(without_weights(config))
    except UserError:
        return shape_of(load_model(name, FAMILY, revision=revision))


load, load_mixed = Model.load, Model.load_mixed
load_prefix, save_prefix = Model.read_prefix, Model.save_prefix
