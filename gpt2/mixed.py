"""Several prefixes on one base model, mixed in one batch: every source is decoded behind the prefix that it names.

    mixed = load_mixed({"e2e": "CHECKPOINT_1", "webnlg": "CHECKPOINT_2"})
    mixed.generate([" | name : The Mill", " | Aarhus : country : Denmark"], prefix=["e2e", "webnlg"])

Prefixes may differ in length, task and kind. Shorter ones are padded on the left; the padding is masked and takes no
position, so a text does not depend on what else is in its batch.

Legend: N sources of a batch, P the longest of their prefixes, H key/value heads, D head size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gpt2 import decoding
from gpt2.dataset import Encoded
from gpt2.flags import Decoding
from gpt2.frozen_lm import evaluating
from gpt2.model import Model, attach, load_base_of, load_prefix
from gpt2.train_control import Past
from prefixlib import attention, checkpoint
from prefixlib.beam_search import as_stop, as_texts, check_count
from prefixlib.errors import UserError
from prefixlib.tasks import find_task


@dataclass
class MixedPrefixes:
    """A base model in memory once, and prefixes by name; they can be added and removed at any time."""

    base: nn.Module
    tokenizer: Any
    base_name: str
    models: dict[str, Model] = field(default_factory=dict)  # name -> the base with this prefix

    def add(self, name: str, directory: Path | str, *, mode: str | None = None, allow_other_base: bool = False) -> None:
        """Read the prefix in `directory`, to be used as `name`; arguments as in `load`.

        Raises UserError for a name in use, a folder without a prefix, or a prefix of another base model.
        """
        if name in self.models:
            raise UserError(f"there is a prefix {name!r} already: remove it first, or choose another name")
        saved = load_prefix(directory)
        trained_on = saved.base.get("name")
        if trained_on == checkpoint.OWN_MODEL:
            raise UserError(
                f"the prefix in {directory} was tuned together with a model of its own: it goes with no other"
            )
        unmarked = "fingerprint" not in saved.base and trained_on not in (None, self.base_name)
        if unmarked and not allow_other_base:
            raise UserError(f"the prefix in {directory} was trained on {trained_on}, not on {self.base_name}")
        settings = {"mode": mode, "allow_other_base": allow_other_base}
        self.models[name] = attach(saved, self.base, self.tokenizer, self.base_name, directory, **settings)

    def remove(self, name: str) -> None:
        """Forget a prefix. Raises UserError if there is none of this name."""
        del self.models[self._known(name)]

    def generate(
        self,
        sources: Sequence[Any],
        prefix: str | Sequence[str],
        *,
        max_new_tokens: int = 100,
        num_return_sequences: int = 1,
        return_scores: bool = False,
        progress: bool = False,
        **settings: Any,
    ) -> list[Any]:
        """Texts for `sources`, each behind the prefix of its name: what that prefix's own `Model.generate` gives.

        prefix: a name per source, or one for all. Every other argument is as in `Model.generate`; without `strategy`
        each task has its own. Raises UserError as it does, and for names that are not known.
        """
        if isinstance(sources, str):
            raise UserError("generate() takes a list of sources, not one text")
        names = [prefix] * len(sources) if isinstance(prefix, str) else list(prefix)
        if len(names) != len(sources):
            raise UserError(f"prefix has {len(names)} names for {len(sources)} sources; give one for each, or one name")
        settings["stop"] = as_stop(settings.get("stop", ()))
        rule = Decoding(length=max_new_tokens, disable_tqdm=not progress, **settings)
        inputs: list[Encoded | None] = [None] * len(sources)
        alike: dict[tuple[str, bool], list[int]] = {}  # strategy, whether newlines stay -> the numbers of its sources
        for name in dict.fromkeys(map(self._known, names)):
            model, members = self.models[name], [n for n, other in enumerate(names) if other == name]
            for n, encoded in zip(members, model.encode([sources[n] for n in members], rule), strict=True):
                inputs[n] = encoded
            strategy, _ = rule.strategy_for(model.task["mode"])
            check_count(num_return_sequences, strategy, rule.num_beams)
            alike.setdefault((strategy, find_task(model.task["mode"]).verbatim), []).extend(members)
        texts: list[Any] = [None] * len(sources)
        for (strategy, verbatim), members in alike.items():
            members.sort()  # a sample's seed comes from its place
            jobs = [(names[n], inputs[n]) for n in members]
            found = self._decode(jobs, rule, strategy, verbatim, num_return_sequences)
            to_text = self.models[names[members[0]]].to_text(rule)
            made = as_texts(found, to_text, several=num_return_sequences > 1, scores=return_scores)
            for n, text in zip(members, made, strict=True):
                texts[n] = text
        return texts

    @torch.no_grad()
    def _decode(self, jobs: Sequence[tuple[str, Encoded]], rule: Decoding, strategy: str, verbatim: bool, count: int):
        with evaluating(self.base):
            return decoding.decode_several(
                self.base,
                [encoded.prompt for _, encoded in jobs],
                decoding.decoding_rule(rule, self.tokenizer, verbatim),
                past=lambda members: self._past([jobs[n] for n in members]),
                strategy=strategy,
                count=count,
                batch_size=rule.batch_size,
                seed=rule.seed,
                progress=not rule.disable_tqdm,
            )

    def _past(self, jobs: Sequence[tuple[str, Encoded]]) -> Past:
        """The prefixes of a batch, each (1, H, P_i, D), as one of N rows: (N, H, P, D) and what is visible, (N, P)."""
        fixed: dict[str, Past] = {}
        rows = []
        for name, encoded in jobs:
            model = self.models[name]
            if model.prefix.config.needs_source:
                rows.append(model.past([encoded]))
                continue
            if name not in fixed:
                fixed[name] = model.past([encoded])
            rows.append(fixed[name])
        layers = [attention.pad_prefixes([row.layers[n] for row in rows]) for n in range(len(rows[0].layers))]
        return Past([(layer.keys, layer.values) for layer in layers], layers[0].visible)

    def _known(self, name: str) -> str:
        if name not in self.models:
            raise UserError(f"no prefix {name!r}; there are {', '.join(map(repr, self.models)) or 'none yet'}")
        return name


def load_mixed(
    directories: Mapping[str, Path | str],
    *,
    model_name_or_path: str | None = None,
    cache_dir: str | None = None,
    dtype: torch.dtype = torch.float32,
    allow_other_base: bool = False,
) -> MixedPrefixes:
    """The prefixes in `directories`, by name, on one base model, on a GPU if there is one.

    model_name_or_path: the base model; by default the one that the first checkpoint names. The other arguments are as
    in `load`. Raises UserError for an empty mapping, a folder without a prefix, or prefixes of different base models.

    >>> load_mixed({"e2e": "CHECKPOINT_1", "webnlg": "CHECKPOINT_2"}).generate(["..."], "e2e")  # doctest: +SKIP
    """
    if not directories:
        raise UserError("load_mixed() needs at least one checkpoint: it says what the base model is")
    first = next(iter(directories.values()))
    base, tokenizer, name = load_base_of(load_prefix(first), first, model_name_or_path, cache_dir, dtype)
    mixed = MixedPrefixes(base, tokenizer, name)
    for prefix, directory in directories.items():
        mixed.add(prefix, directory, allow_other_base=allow_other_base)
    return mixed
