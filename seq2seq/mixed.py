"""Several prefixes on one base model, mixed in one batch: every source is decoded behind the prefix that it names.

    mixed = load_mixed({"news": "CHECKPOINT_1", "webnlg": "CHECKPOINT_2"})
    mixed.generate(["The document to summarise.", " | Aarhus : country : Denmark"], prefix=["news", "webnlg"])

Prefixes may differ in length, task and sites. Shorter ones are padded on the left at each site, and the padding is
masked, so a text does not depend on what else is in its batch.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from prefixlib import mixed
from prefixlib.beam_search import Hypothesis
from seq2seq import decoding
from seq2seq.model import Model, SavedPrefix, attach, load_base_of, load_prefix


class MixedPrefixes(mixed.MixedPrefixes):
    """Prefixes on one encoder-decoder, by name: see prefixlib.mixed."""

    def _read(self, directory: Path | str) -> SavedPrefix:
        return load_prefix(directory)

    def _attach(self, saved: SavedPrefix, directory: Path | str, **how: Any) -> Model:
        return attach(saved, self.base, self.tokenizer, self.base_name, directory, **how)

    @torch.no_grad()
    def _decode(
        self, jobs: Sequence[tuple[str, list[int]]], prepared: mixed.Prepared, **how: Any
    ) -> list[list[Hypothesis]]:
        layers = {name: self.models[name].lm.layers() for name in {name for name, _ in jobs}}

        def past(members: Sequence[int]) -> decoding.Past:
            return decoding.side_by_side([layers[jobs[n][0]] for n in members])

        sources = [ids for _, ids in jobs]
        return decoding.decode(self.base, sources, prepared.rule, past=past, strategy=prepared.strategy, **how)


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

    >>> load_mixed({"news": "CHECKPOINT_1", "webnlg": "CHECKPOINT_2"}).generate(["..."], "news")  # doctest: +SKIP
    """
    first = mixed.first_of(directories)
    hub = {"cache_dir": cache_dir, "dtype": dtype}
    found = MixedPrefixes(*load_base_of(load_prefix(first), first, model_name_or_path, **hub))
    for name, directory in directories.items():
        found.add(name, directory, allow_other_base=allow_other_base)
    return found
