"""What the robustness tests share: good files to spoil copies of."""

import shutil

import pytest
from transformers import logging as transformers_logging

import seq2seq
from seq2seq.callbacks import Checkpoints
from tests.conftest import ROOT
from tests.robustness.places import PACKAGES, at, settings_of
from tests.tuning import Killed, die_after

DEMO = ROOT / "data" / "demo"
BASES = {"gpt2": "gpt2", "seq2seq": "bart"}
SETS = ("webnlg_challenge_2017", "xsum", "e2e_data")


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """For each tree a place with a trained checkpoint and a run that was killed."""
    transformers_logging.disable_progress_bar()  # as the command line does
    made = {}
    for tree, base in BASES.items():
        root = tmp_path_factory.mktemp(tree)
        for name in SETS:
            shutil.copytree(DEMO / name, root / "data" / name)
        shutil.copytree(DEMO / base, root / "base")
        place = made[tree] = at(root, tree)
        quiet = {"skip_decode": True} if tree == "gpt2" else {}
        PACKAGES[tree].train(settings_of(place, output_dir=str(place.checkpoint), **quiet))
        with pytest.MonkeyPatch.context() as patch:
            if tree == "seq2seq":
                patch.setattr(Checkpoints, "on_train_batch_end", die_after(Checkpoints.on_train_batch_end))
                with pytest.raises(Killed):
                    seq2seq.train(settings_of(place, output_dir=str(place.run)))
            else:
                shutil.copytree(place.checkpoint, place.run)
    return made


@pytest.fixture(params=PACKAGES)
def place(request, good, tmp_path):
    """A copy of each tree's place."""
    shutil.copytree(good[request.param].base.parent, tmp_path / "place")
    return at(tmp_path / "place", request.param)
