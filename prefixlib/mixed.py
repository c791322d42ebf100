"""Several prefixes on one base model, mixed in one batch: a name says which prefix decodes a source.

    mixed = gpt2.load_mixed({"e2e": "CHECKPOINT_1", "webnlg": "CHECKPOINT_2"})
    mixed.generate([" | name : The Mill", " | Aarhus : country : Denmark"], prefix=["e2e", "webnlg"])

Prefixes may differ in length, task and kind. Shorter ones are padded on the left; the padding is masked, so a text does
not depend on what else is in its batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prefixlib.base_model.load import evaluating
from prefixlib.decoding import loop
from prefixlib.decoding.search import DecodingRule, Hypothesis
from prefixlib.decoding.text import as_texts
from prefixlib.methods.table import OWN_MODEL
from prefixlib.settings.search import Search, as_stop
from prefixlib.system.errors import UserError


@dataclass(frozen=True)
class Prepared:
    """Sources as model inputs, with the rule that decodes them."""

    inputs: Sequence[Any]
    strategy: str
    rule: DecodingRule
    to_text: Callable[[Sequence[int]], str]


@dataclass
class MixedPrefixes:
    """A base model in memory once, and prefixes by name; they can be added and removed at any time."""

    kind: type  # the family's Model
    base: nn.Module
    tokenizer: Any
    base_name: str
    models: dict[str, Any] = field(default_factory=dict)  # name -> the base with this prefix

    def add(self, name: str, directory: Path | str, *, mode: str | None = None, allow_other_base: bool = False) -> None:
        """Read the prefix in `directory`, to be used as `name`; arguments as in `load`.

        Raises UserError for a name in use, a folder without a prefix, or a prefix of another base model.
        """
        if name in self.models:
            raise UserError(f"there is a prefix {name!r} already: remove it first, or choose another name")
        saved = self.kind.read_prefix(directory)
        trained_on = saved.base.get("name")
        if trained_on == OWN_MODEL:
            raise UserError(f"the prefix in {directory} was tuned together with a model of its own: it fits no other")
        unmarked = "fingerprint" not in saved.base and trained_on not in (None, self.base_name)
        if unmarked and not allow_other_base:
            raise UserError(f"the prefix in {directory} was trained on {trained_on}, not on {self.base_name}")
        self.models[name] = self.kind.attach(
            saved, self.base, self.tokenizer, self.base_name, directory, mode=mode, allow_other_base=allow_other_base
        )

    def remove(self, name: str) -> None:
        """Forget a prefix. Raises UserError if there is none of this name."""
        del self.models[self._known(name)]

    def generate(
        self,
        sources: Sequence[Any],
        prefix: str | Sequence[str],
        *,
        num_return_sequences: int = 1,
        return_scores: bool = False,
        progress: bool = False,
        stop: str | Sequence[str] = (),
        **settings: Any,
    ) -> list[Any]:
        """Texts for `sources`, each decoded with the prefix of its name, as `Model.generate` of that prefix does it.

        prefix: a name per source, or one for all. All other arguments are those of `Model.generate`, with the
        defaults of each prefix's task. Sources whose tasks have different decoding rules are put in separate
        batches. Raises UserError as `Model.generate` does, and for unknown names.
        """
        if isinstance(sources, str):
            raise UserError("generate() takes a list of sources, not one text")
        names = [prefix] * len(sources) if isinstance(prefix, str) else list(prefix)
        if len(names) != len(sources):
            raise UserError(f"prefix has {len(names)} names for {len(sources)} sources; give one for each, or one name")
        search = Search(stop=as_stop(stop), **settings)
        jobs: dict[int, tuple[str, Any]] = {}  # index of the source -> the name of its prefix, its input
        alike: dict[Any, tuple[Prepared, list[int]]] = {}  # the sources that one rule decodes
        for name in dict.fromkeys(map(self._known, names)):
            members = [n for n, other in enumerate(names) if other == name]
            prepared = self.models[name].prepare([sources[n] for n in members], search, num_return_sequences)
            jobs |= {n: (name, given) for n, given in zip(members, prepared.inputs, strict=True)}
            kind = prepared.strategy, replace(prepared.rule, stop=None)  # the same strings stop them all
            alike.setdefault(kind, (prepared, []))[1].extend(members)
        texts: list[Any] = [None] * len(sources)
        how = {"count": num_return_sequences, "seed": search.seed, "batch_size": search.batch_size}
        for prepared, members in alike.values():
            members.sort()  # a sample's seed depends on its index
            found = self._decode([jobs[n] for n in members], prepared, progress=progress, **how)
            made = as_texts(found, prepared.to_text, several=num_return_sequences > 1, scores=return_scores)
            for n, text in zip(members, made, strict=True):
                texts[n] = text
        return texts

    def _decode(self, jobs: Sequence[tuple[str, Any]], prepared: Prepared, **how: Any) -> list[list[Hypothesis]]:
        """The hypotheses of every input, each with the prefix of its name."""
        fixed: dict[str, Any] = {}  # the prefixes that do not depend on the input

        def past(name: str, given: Any) -> Any:
            model = self.models[name]
            if model.has_own_pasts:
                return model.past([given])
            if name not in fixed:
                fixed[name] = model.past([given])
            return fixed[name]

        def start(members: Sequence[int]) -> tuple[Any, list[list[int]]]:
            chosen = [jobs[n] for n in members]
            any_model = self.models[chosen[0][0]]  # they share the base model
            return any_model.start([given for _, given in chosen], self.kind.join([past(*job) for job in chosen]))

        with torch.no_grad(), evaluating(self.base):
            lengths = [len(given) for _, given in jobs]
            return loop.decode(start, lengths, prepared.rule, strategy=prepared.strategy, **how)

    def _known(self, name: str) -> str:
        if name not in self.models:
            raise UserError(f"no prefix {name!r}; there are {', '.join(map(repr, self.models)) or 'none yet'}")
        return name
