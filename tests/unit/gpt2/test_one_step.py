"""docs/one_step.py is the trainer's first step: the same loss, the same prefix afterwards."""

import json
import runpy

from safetensors.torch import load_file

import gpt2
from tests.conftest import ROOT, close


def test_one_step_is_the_trainers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = runpy.run_path(str(ROOT / "docs" / "one_step.py"))
    assert "prefix_flat.safetensors" in capsys.readouterr().out
    assert len((ROOT / "docs" / "one_step.py").read_text().splitlines()) <= 40

    entries = json.loads((ROOT / "data/demo/webnlg_challenge_2017/train.json").read_text())["entries"]
    rows = [
        {**row, "lexicalisations": [text]} for e in entries for row in e.values() for text in row["lexicalisations"]
    ]
    (tmp_path / "first.json").write_text(json.dumps({"entries": [{"1": row} for row in rows[:4]]}))
    assert [record.target for record in page["records"]] == [row["lexicalisations"][0]["lex"] for row in rows[:4]]
    settings = gpt2.Settings(
        mode="webnlg",
        train_file=str(tmp_path / "first.json"),
        eval_file=str(tmp_path / "first.json"),
        model_name_or_path=str(ROOT / "data/demo/gpt2"),
        output_dir=str(tmp_path / "run"),
        preseqlen=5,
        bsz=4,
        max_steps=1,
        logging_steps=1,
        decode="none",
        disable_tqdm=True,
    )
    result = gpt2.train(settings)
    assert abs(result.history[0]["loss"] - page["loss"].item()) < 1e-4
    ours, its = load_file("prefix_flat.safetensors"), load_file(tmp_path / "run" / "prefix_flat.safetensors")
    assert ours.keys() == its.keys() == {"prefix"}
    assert close(ours["prefix"], its["prefix"])
