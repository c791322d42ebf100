"""Several prefixes on one base model, mixed in one batch: every source is decoded behind the prefix that it names.

    mixed = load_mixed({"e2e": "CHECKPOINT_1", "webnlg": "CHECKPOINT_2"})
    mixed.generate([" | name : The Mill", " | Aarhus : country : Denmark"], prefix=["e2e", "webnlg"])

Prefixes may differ in length, task and kind. Shorter ones are padded on the left; the padding is masked and takes no
position, so a text does not depend on what else is in its batch.

Legend: N sources of a batch, P the longest of their prefixes, H key/value heads, D head size.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gpt2 import decoding
from gpt2.dataset import Encoded
from gpt2.frozen_lm import evaluating
from gpt2.model import Model, SavedPrefix, attach, load_base_of, load_prefix
from gpt2.train_control import Past
from prefixlib import attention, mixed
from prefixlib.beam_search import Hypothesis


class MixedPrefixes(mixed.MixedPrefixes):
    """Prefixes on one decoder-only model, by name: see prefixlib.mixed."""

    _read = staticmethod(load_prefix)
    _base_of = staticmethod(load_base_of)

    def _attach(self, saved: SavedPrefix, directory: Path | str, **how: Any) -> Model:
        return attach(saved, self.base, self.tokenizer, self.base_name, directory, **how)

    @torch.no_grad()
    def _decode(
        self, jobs: Sequence[tuple[str, Encoded]], prepared: mixed.Prepared, **how: Any
    ) -> list[list[Hypothesis]]:
        def past(members: Sequence[int]) -> Past:
            return self._past([jobs[n] for n in members])

        prompts = [encoded.prompt for _, encoded in jobs]
        with evaluating(self.base):
            return decoding.decode_several(
                self.base, prompts, prepared.rule, past=past, strategy=prepared.strategy, **how
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


load_mixed = MixedPrefixes.load
