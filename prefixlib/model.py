"""The model object that both families share: load, generate, stream, decode, save, count. A family adds its hooks.

    model = gpt2.load("CHECKPOINT")      # or seq2seq.load
    model.generate([" | Aarhus_Airport : cityServed : Aarhus"])

Legend: P prefix length, L layers, H key/value heads, D head size.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from prefixlib.base_model.load import (
    check_fingerprint,
    check_tokenizer,
    choose_base,
    evaluating,
    load_model,
    load_tokenizer,
    on_device,
    save_whole,
)
from prefixlib.checkpoints import checkpoint, original, peft_format
from prefixlib.data.readers import Group, Record
from prefixlib.data.tasks import check_tree, find_task
from prefixlib.generation import Generates
from prefixlib.methods.table import OWN_MODEL, method_of
from prefixlib.mixed import MixedPrefixes
from prefixlib.runs import record
from prefixlib.system import files
from prefixlib.system.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedPrefix(ABC):
    """A prefix read from a checkpoint."""

    config: Any  # the family's PrefixConfig
    base: dict[str, Any]  # record of the base model: {"name", "revision", ...}
    task: dict[str, Any]
    network: dict[str, Tensor]  # state dict of the prefix module
    stored: dict[str, Tensor]  # the arrays that decoding needs: see the module's `stored`

    @abstractmethod
    def for_decoding(self) -> nn.Module:
        """A frozen module with the same prefix, without the network if keys and values were stored."""


@dataclass
class Model(Generates):
    """A language model with a trained prefix, or one that was itself tuned, without a prefix.

    lm: the family's PrefixLM. task: the record of its training: mode, tuning_mode, categories, ...
    base_record: the base model's name, revision and fingerprint.
    """

    FAMILY: ClassVar[str]  # as checkpoints name it
    LM: ClassVar[type[nn.Module]]  # (base, prefix) -> the forward pass

    lm: Any
    tokenizer: Any
    task: dict[str, Any] = field(default_factory=dict)
    base_record: dict[str, Any] = field(default_factory=dict)

    # ---- hooks of a family ---------------------------------------------------------------------------------------

    @abstractmethod
    def mean_loss(self, records: Sequence[Record], batch_size: int) -> float:
        """Mean negative log-likelihood per scored token of the records' targets, in nats."""

    @classmethod
    @abstractmethod
    def read_prefix(cls, directory: Path | str) -> SavedPrefix:
        """Read a prefix checkpoint of any kind. Raises UserError if there is none, or it is damaged."""

    @staticmethod
    @abstractmethod
    def shape_of(base: nn.Module) -> dict[str, Any]:
        """The sizes of a base model that a prefix depends on, as the family's PrefixConfig names them."""

    @classmethod
    def check_positions(cls, config: Any, base: nn.Module) -> None:
        """Raise UserError if the base model has too few positions for the prefix, where prefixes use some."""

    @classmethod
    def check_base(cls, base: nn.Module) -> None:
        """Raise UserError for a base model that cannot be decoded."""

    def recorded_task(self) -> dict[str, Any]:
        """The record of the training in a checkpoint."""
        return dict(self.task)

    # ---- what was trained ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def reference_loss(self, groups: Sequence[Group], batch_size: int = 32) -> float | None:
        """Mean negative log-likelihood per token, in nats, of every group's first reference and its end.

        This value is comparable between all tuning modes. None if no group has a reference.
        """
        groups = [group for group in groups if group.references]
        records = [Record(group.source, group.references[0], True, group.fields, "") for group in groups]
        with evaluating(self.lm):
            return self.mean_loss(records, batch_size) if records else None

    # ---- saving --------------------------------------------------------------------------------------------------

    def save(self, directory: Path | str, scores: Mapping[str, Any] | None = None) -> None:
        """Save the trained part: the prefix, the whole model in transformers' format with its tokenizer, or both.

        A model that was tuned together with a prefix is stored in DIRECTORY/model. The prefix's model card shows
        `scores`. A loaded prefix is saved without its network, which only training needs. Raises OSError if the files
        cannot be written.
        """
        directory, base_record, task = Path(directory), self.base_record, self.recorded_task()
        directory.mkdir(parents=True, exist_ok=True)
        if self.prefix is None:
            self.save_base(directory)
            return
        if method_of(task).tunes_both:
            (directory / checkpoint.CONFIG).unlink(missing_ok=True)  # it describes the earlier model
            files.replace_directory(directory / OWN_MODEL, self.save_base)
            task = {**task, "tuned_from": task.get("tuned_from") or base_record["name"]}
            base_record = {"name": OWN_MODEL, "revision": None}
        self.save_prefix(directory, self.prefix, base_record, task, scores, base=self.base)

    @classmethod
    @torch.no_grad()
    def save_prefix(
        cls,
        directory: Path,
        prefix: nn.Module,
        base_record: Mapping[str, Any],
        task: Mapping[str, Any],
        scores: Mapping[str, Any] | None = None,
        *,
        base: nn.Module | None = None,
    ) -> None:
        """Write a prefix's network and the arrays that decoding needs; raises OSError if they cannot be written.

        base: the base model, which turns a prefix of trained embeddings into keys and values.
        """
        checkpoint.save(
            directory,
            family=cls.FAMILY,
            base=base_record,
            prefix=prefix.config.as_dict(),
            task=task,
            network=prefix.state_dict(),
            flat=prefix.stored(base),
            versions=record.versions(),
            scores=scores,
        )

    def save_base(self, directory: Path) -> None:
        """Save the base model's current weights, with its tokenizer."""
        save_whole(directory, self.base, self.tokenizer)
        checkpoint.save_task(directory, {**self.task, "base_model": self.base_record})

    def load_weights(self, directory: Path) -> None:
        """Read back the weights that `save` wrote."""
        if self.prefix is None:
            self.base.load_state_dict(load_model(str(directory), self.FAMILY, dtype=torch.float32).state_dict())
            return
        saved = self.read_prefix(directory)
        self.prefix.load_state_dict(saved.network)
        if saved.base["name"] == OWN_MODEL:
            tuned = load_model(str(directory / OWN_MODEL), self.FAMILY, dtype=torch.float32)
            self.base.load_state_dict(tuned.state_dict())

    @torch.no_grad()  # else `Accumulation` would keep the network's output here for the next step
    def count_parameters(self) -> dict[str, int | None]:
        """The numbers of parameters that are trained, of the base model, and that a checkpoint stores for decoding."""
        trainable = sum(p.numel() for p in self.lm.parameters() if p.requires_grad)
        base = sum(p.numel() for p in self.base.parameters())
        if self.prefix is None:
            return {"trainable": trainable, "base": None, "stored": base}
        tensors = self.prefix.stored(self.base) or self.prefix.state_dict()  # one made from sources needs its network
        stored = sum(tensor.numel() for tensor in tensors.values())
        tuned = base if method_of(self.task).tunes_both else 0
        return {"trainable": trainable, "base": base, "stored": stored + tuned}

    # ---- loading -------------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        directory: Path | str,
        *,
        mode: str | None = None,
        model_name_or_path: str | None = None,
        model_revision: str | None = None,
        cache_dir: str | None = None,
        dtype: torch.dtype = torch.float32,
        allow_other_base: bool = False,
        quantization: str | None = None,
        attn_implementation: str | None = None,
    ) -> Self:
        """The trained model in `directory`, ready to generate, on a GPU if there is one.

        Args:
            directory: a prefix checkpoint, the folder of a model that was itself tuned (wholly, in its top layers, with
                adapters, or together with a prefix), a checkpoint of the original code, or an exported PEFT folder.
            mode: the task, if the checkpoint does not name it; a task that contradicts the checkpoint is refused.
            model_name_or_path, model_revision: the base model, if it has moved since the training.
            cache_dir: where hub files are kept. dtype: the precision of the base model; the prefix follows it.
            allow_other_base: decode with a base model of the same shape that is not the one trained on.
            quantization: bits of the base model, as --quantization; by default as in training.
            attn_implementation: "sdpa" or "eager"; by default what transformers chooses (gpt2 only).

        Raises UserError for a folder without a checkpoint, a damaged file, or a base model that does not fit.

        >>> load("CHECKPOINT").generate(["..."])  # doctest: +SKIP
        """
        directory = Path(directory).expanduser()
        if not directory.is_dir():
            raise UserError(f"checkpoint {directory}: no such folder")
        check_tree(mode, cls.TREE)
        of_base = {"cache_dir": cache_dir, "dtype": dtype, "attn_implementation": attn_implementation}
        holds_prefix = original.is_prefix(directory) or (directory / peft_format.CONFIG).is_file()
        tuned = None if holds_prefix else checkpoint.model_folder(directory)
        if tuned is not None:
            return cls._load_tuned(tuned, mode, model_name_or_path, **of_base)
        saved = cls.read_prefix(directory)
        of_base |= {"revision": model_revision, "quantization": quantization}
        base, tokenizer, name = cls.load_base_of(saved, directory, model_name_or_path, **of_base)
        return cls.attach(saved, base, tokenizer, name, directory, mode=mode, allow_other_base=allow_other_base)

    @classmethod
    def load_base_of(
        cls,
        saved: SavedPrefix,
        directory: Path | str,
        name: str | None = None,
        *,
        revision: str | None = None,
        quantization: str | None = None,
        **how: Any,
    ) -> tuple[nn.Module, Any, str]:
        """Load the base model of `saved`, or `name` instead, on a GPU if there is one.

        Returns the model, its tokenizer and its name.
        """
        name, of_checkpoint = choose_base(saved.base, name, directory)
        how |= {"revision": revision or of_checkpoint, "quantization": quantization or saved.base.get("quantization")}
        base = load_model(name, cls.FAMILY, **how)
        return on_device(base), load_tokenizer(name, revision=how["revision"], cache_dir=how.get("cache_dir")), name

    @classmethod
    def attach(
        cls,
        saved: SavedPrefix,
        base: nn.Module,
        tokenizer: Any,
        name: str,
        directory: Path | str,
        *,
        mode: str | None = None,
        allow_other_base: bool = False,
    ) -> Self:
        """Put a saved prefix on the base model `name`. Raises UserError if it was trained for another one."""
        task = cls._task_of(saved.task, mode, directory)
        cls.check_fits(saved.config, cls.shape_of(base), directory, name)
        cls.check_positions(saved.config, base)
        if not allow_other_base:
            check_fingerprint(saved.base, base, tokenizer, name, directory)
        check_tokenizer(name, tokenizer, base, ())
        lm = cls.LM(base, saved.for_decoding().to(base.device))
        return cls(lm.eval(), tokenizer, task, checkpoint.own_model_base(saved.base, saved.task, directory))

    @classmethod
    def check_fits(cls, config: Any, shape: Mapping[str, Any], directory: Path | str, name: str) -> None:
        """Raise UserError if the shape of the model `name` is not the one that a prefix was trained for."""
        if not shape or any(getattr(config, size) != value for size, value in shape.items()):
            raise UserError(f"the prefix in {directory} was trained for a model of another shape than {name}")

    @classmethod
    def _load_tuned(cls, directory: Path, mode: str | None, model_name: str | None, **how: Any) -> Self:
        """Load a model that was itself tuned, without a prefix; `how`: as in `load_model`."""
        if model_name is not None:
            raise UserError(f"--model_name_or_path {model_name} contradicts {directory}, which is a whole model itself")
        saved, name = checkpoint.load_task(directory), str(directory.resolve())
        if method_of(saved).tunes_both:
            flag = "--prefix_model_path " * (cls.TREE == "seq2seq")
            raise UserError(
                f"{directory} was tuned together with a prefix: pass {flag}{directory.parent}, which holds both"
            )
        task = cls._task_of(saved, mode, directory)
        base_record = task.pop("base_model", {"name": name, "revision": None})
        base = load_model(name, cls.FAMILY, **how)
        cls.check_base(base)
        lm = cls.LM(base.requires_grad_(False), None)
        return cls(on_device(lm), load_tokenizer(name, cache_dir=how["cache_dir"]), task, dict(base_record))

    @classmethod
    def _task_of(cls, saved: Mapping[str, Any], mode: str | None, directory: Path | str) -> dict[str, Any]:
        """The checkpoint's record of its task, with `mode` if it has none. Raises UserError if the two differ."""
        known = saved.get("mode")
        check_tree(known or mode, cls.TREE, f"{directory}: ")
        if known is not None and mode is not None and find_task(known) is not find_task(mode):
            checkpoint.check_agrees({"mode": mode}, {"mode": known}, directory)
        return {**saved, "mode": known or mode}

    @classmethod
    def load_mixed(
        cls,
        directories: Mapping[str, Path | str],
        *,
        model_name_or_path: str | None = None,
        cache_dir: str | None = None,
        dtype: torch.dtype = torch.float32,
        allow_other_base: bool = False,
    ) -> MixedPrefixes:
        """Load the prefixes in `directories`, by name, on one base model, on a GPU if there is one.

        model_name_or_path: the base model; default: the first checkpoint's. The other arguments are those of
        `load`. Raises UserError for an empty mapping, a folder without a prefix, or prefixes of different base
        models.

        >>> load_mixed({"e2e": "CHECKPOINT_1", "webnlg": "CHECKPOINT_2"}).generate(["..."], "e2e")  # doctest: +SKIP
        """
        if not directories:
            raise UserError("load_mixed() needs at least one checkpoint: it says what the base model is")
        first = next(iter(directories.values()))
        found = cls.load_base_of(cls.read_prefix(first), first, model_name_or_path, cache_dir=cache_dir, dtype=dtype)
        mixed = MixedPrefixes(cls, *found)
        for name, directory in directories.items():
            mixed.add(name, directory, allow_other_base=allow_other_base)
        return mixed


def check_arrays(
    read: checkpoint.PrefixCheckpoint, config: Any, make_prefix: Callable[[Any], nn.Module], stored: Mapping[str, Any]
) -> None:
    """Raise UserError unless a checkpoint's arrays have the names and shapes that its settings ask for.

    stored: name -> shape of the arrays that decoding needs.
    """
    with checkpoint.odd_settings_refused(read.directory), torch.device("meta"):  # shapes without values
        network = {name: tensor.shape for name, tensor in make_prefix(config).state_dict().items()}
    checkpoint.check_tensors(read.network, network, read.directory / checkpoint.NETWORK)
    checkpoint.check_tensors(read.flat, stored, read.directory / checkpoint.FLAT)
