"""Several prefixes on one base model, mixed in one batch: every source is decoded behind the prefix that it names.

    mixed = load_mixed({"news": "CHECKPOINT_1", "webnlg": "CHECKPOINT_2"})
    mixed.generate(["The document to summarise.", " | Aarhus : country : Denmark"], prefix=["news", "webnlg"])

Prefixes may differ in length, task and sites. Shorter ones are padded on the left at each site, and the padding is
masked, so a text does not depend on what else is in its batch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prefixlib import mixed
from prefixlib.beam_search import Hypothesis
from seq2seq import decoding
from seq2seq.model import Model, SavedPrefix, attach, load_base_of, load_prefix


class MixedPrefixes(mixed.MixedPrefixes):
    """Prefixes on one encoder-decoder, by name: see prefixlib.mixed."""

    _read = staticmethod(load_prefix)
    _base_of = staticmethod(load_base_of)

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


load_mixed = MixedPrefixes.load
