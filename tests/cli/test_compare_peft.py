"""scripts/compare_peft.py: equal losses step by step, and a table of both."""

import json

import pytest

from tests.conftest import ROOT, run_command

pytest.importorskip("peft")


def test_losses_are_equal_step_by_step(tmp_path):
    texts = [f"name : The Eagle {n} | food : soup||The Eagle {n} serves soup ." for n in range(6)]
    (tmp_path / "train.txt").write_text("\n".join(texts) + "\n")
    found = run_command(
        *("scripts/compare_peft.py", "--model_name_or_path", ROOT / "data" / "demo" / "gpt2"),
        *("--train_file", tmp_path / "train.txt", "--steps", 4, "--bsz", 4, "--mid_dim", 16, "--learning_rate", 0.01),
        *("--output", tmp_path / "peft"),
    )
    assert found.returncode == 0, found.stderr
    written = json.loads((tmp_path / "peft.json").read_text())
    ours, theirs = (written["parts"][name] for name in ("this package", "PEFT"))
    assert len(ours["losses"]) == len(theirs["losses"]) == len(set(ours["losses"])) == 4
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    assert ours["losses"][-1] < ours["losses"][0]
    assert ours["trained_parameters"] == theirs["trained_parameters"]
    assert written["largest_relative_difference"] < 1e-5
    table = (tmp_path / "peft.md").read_text()
    assert table in found.stdout
    assert "| PEFT | " in table
