"""Several prefixes on one base model, mixed in one batch: what gpt2/mixed.py and seq2seq/mixed.py share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from prefixlib.beam_search import DecodingRule, Hypothesis, as_texts
from prefixlib.checkpoint import OWN_MODEL
from prefixlib.errors import UserError


@dataclass(frozen=True)
class Prepared:
    """Sources as their model takes them, and how they are decoded."""

    inputs: Sequence[Any]
    strategy: str
    rule: DecodingRule
    to_text: Callable[[Sequence[int]], str]


@dataclass
class MixedPrefixes(ABC):
    """A base model in memory once, and prefixes by name; they can be added and removed at any time."""

    base: nn.Module
    tokenizer: Any
    base_name: str
    models: dict[str, Any] = field(default_factory=dict)  # name -> the base with this prefix

    @classmethod
    def load(
        cls,
        directories: Mapping[str, Path | str],
        *,
        model_name_or_path: str | None = None,
        cache_dir: str | None = None,
        dtype: torch.dtype = torch.float32,
        allow_other_base: bool = False,
    ) -> Self:
        """The prefixes in `directories`, by name, on one base model, on a GPU if there is one.

        model_name_or_path: the base model; by default the one that the first checkpoint names. The other arguments are
        as in `load`. Raises UserError for an empty mapping, a folder without a prefix, or prefixes of different base
        models.

        >>> load_mixed({"e2e": "CHECKPOINT_1", "webnlg": "CHECKPOINT_2"}).generate(["..."], "e2e")  # doctest: +SKIP
        """
        if not directories:
            raise UserError("load_mixed() needs at least one checkpoint: it says what the base model is")
        first = next(iter(directories.values()))
        hub = {"cache_dir": cache_dir, "dtype": dtype}
        found = cls(*cls._base_of(cls._read(first), first, model_name_or_path, **hub))
        for name, directory in directories.items():
            found.add(name, directory, allow_other_base=allow_other_base)
        return found

    def add(self, name: str, directory: Path | str, *, mode: str | None = None, allow_other_base: bool = False) -> None:
        """Read the prefix in `directory`, to be used as `name`; arguments as in `load`.

        Raises UserError for a name in use, a folder without a prefix, or a prefix of another base model.
        """
        if name in self.models:
            raise UserError(f"there is a prefix {name!r} already: remove it first, or choose another name")
        saved = self._read(directory)
        trained_on = saved.base.get("name")
        if trained_on == OWN_MODEL:
            raise UserError(
                f"the prefix in {directory} was tuned together with a model of its own: it goes with no other"
            )
        unmarked = "fingerprint" not in saved.base and trained_on not in (None, self.base_name)
        if unmarked and not allow_other_base:
            raise UserError(f"the prefix in {directory} was trained on {trained_on}, not on {self.base_name}")
        self.models[name] = self._attach(saved, directory, mode=mode, allow_other_base=allow_other_base)

    def remove(self, name: str) -> None:
        """Forget a prefix. Raises UserError if there is none of this name."""
        del self.models[self._known(name)]

    def generate(
        self,
        sources: Sequence[Any],
        prefix: str | Sequence[str],
        *,
        seed: int = 42,
        batch_size: int = 32,
        num_return_sequences: int = 1,
        return_scores: bool = False,
        progress: bool = False,
        **settings: Any,
    ) -> list[Any]:
        """Texts for `sources`, each behind the prefix of its name: what that prefix's own `Model.generate` gives.

        prefix: a name per source, or one for all. Every other argument is as in `Model.generate`; what is left out is
        the default of each prefix's task. Sources whose tasks are decoded by different rules go in batches of their
        own. Raises UserError as `Model.generate` does, and for names that are not known.
        """
        if isinstance(sources, str):
            raise UserError("generate() takes a list of sources, not one text")
        names = [prefix] * len(sources) if isinstance(prefix, str) else list(prefix)
        if len(names) != len(sources):
            raise UserError(f"prefix has {len(names)} names for {len(sources)} sources; give one for each, or one name")
        jobs: dict[int, tuple[str, Any]] = {}  # number of the source -> the name of its prefix, its input
        alike: dict[Any, tuple[Prepared, list[int]]] = {}  # those that are decoded by one rule
        for name in dict.fromkeys(map(self._known, names)):
            members = [n for n, other in enumerate(names) if other == name]
            prepared = self.models[name].prepare([sources[n] for n in members], num_return_sequences, **settings)
            jobs |= {n: (name, given) for n, given in zip(members, prepared.inputs, strict=True)}
            kind = prepared.strategy, replace(prepared.rule, stop=None)  # the same strings stop them all
            alike.setdefault(kind, (prepared, []))[1].extend(members)
        texts: list[Any] = [None] * len(sources)
        how = {"count": num_return_sequences, "seed": seed, "batch_size": batch_size, "progress": progress}
        for prepared, members in alike.values():
            members.sort()  # a sample's seed comes from its place
            found = self._decode([jobs[n] for n in members], prepared, **how)
            made = as_texts(found, prepared.to_text, several=num_return_sequences > 1, scores=return_scores)
            for n, text in zip(members, made, strict=True):
                texts[n] = text
        return texts

    def _known(self, name: str) -> str:
        if name not in self.models:
            raise UserError(f"no prefix {name!r}; there are {', '.join(map(repr, self.models)) or 'none yet'}")
        return name

    @staticmethod
    @abstractmethod
    def _read(directory: Path | str) -> Any:
        """The prefix in a checkpoint."""

    @staticmethod
    @abstractmethod
    def _base_of(saved: Any, directory: Path | str, name: str | None, **hub: Any) -> tuple[nn.Module, Any, str]:
        """The base model of a saved prefix, its tokenizer and its name."""

    @abstractmethod
    def _attach(self, saved: Any, directory: Path | str, **how: Any) -> Any:
        """A saved prefix in front of the base model."""

    @abstractmethod
    def _decode(self, jobs: Sequence[tuple[str, Any]], prepared: Prepared, **how: Any) -> list[list[Hypothesis]]:
        """The hypotheses of every input, each behind the prefix that it names."""
