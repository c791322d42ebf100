"""Where the bad inputs are tried: small copies of a base model, data sets, a checkpoint and a run that was killed."""

from dataclasses import dataclass
from pathlib import Path

import gpt2
import seq2seq

PACKAGES = {"gpt2": gpt2, "seq2seq": seq2seq}


@dataclass(frozen=True)
class Place:
    """Copies that a case may spoil."""

    tree: str
    base: Path  # a base model
    data: Path  # the demo's data sets
    checkpoint: Path  # a trained prefix
    run: Path  # an output folder with a run to resume
    output: Path  # not there yet

    def table(self, split: str) -> Path:
        return self.data / "webnlg_challenge_2017" / f"{split}.json"

    def documents(self, split: str, kind: str = "source") -> Path:
        return self.data / "xsum" / f"{split}.{kind}"

    @property
    def resumable(self) -> Path:
        """What is there to go on from: gpt2's folder, seq2seq's file."""
        return next(self.run.glob("checkpoint-*")) if self.tree == "gpt2" else self.run / "resume.ckpt"


def at(root: Path, tree: str) -> Place:
    return Place(tree, *(root / name for name in ("base", "data", "checkpoint", "run", "output")))


def settings_of(place, **changes):
    """Training of a step."""
    own = {"n_val": 2, "num_workers": 0, "n_train": 8} if place.tree == "seq2seq" else {}
    brief = {"max_steps": 2, "save_steps": 1, "bsz": 2, "preseqlen": 2, "mid_dim": 4, "disable_tqdm": True, **own}
    where = {"model_name_or_path": str(place.base), "data_dir": str(place.data), "output_dir": str(place.output)}
    return PACKAGES[place.tree].Settings(**{"mode": "webnlg", **where, **brief, **changes})
