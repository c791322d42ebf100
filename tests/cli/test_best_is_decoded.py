"""A run decodes and returns its best weights, in both trees, after a kill between training and decoding too."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

import gpt2
import seq2seq
import seq2seq.run_generation
from gpt2 import run_generation
from prefixlib.decoding import outputs
from seq2seq import finetune
from seq2seq.lightning_base import SummarizationModule
from tests.conftest import ROOT
from tests.seq2seq_tiny import make_bart
from tests.tuning import MORE, Killed, die_after, equal

DEMO = ROOT / "data" / "demo"
LOSSES = (3.0, 1.0, 2.0)  # of the validations after steps 1, 2 and 3


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"source": f"number {n}", "target": f"it is {n}"} for n in range(12)]
    for split, count in (("train", 12), ("valid", 3)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
    make_bart(folder / "bart")
    return folder


@pytest.fixture(autouse=True)
def dev_losses(monkeypatch):
    """Both loops validate to LOSSES."""
    evaluate, end = transformers.Trainer.evaluate, SummarizationModule.on_validation_epoch_end

    def evaluated(self, *arguments, **named):
        metrics = evaluate(self, *arguments, **named)
        metrics["eval_loss"] = self.state.log_history[-1]["eval_loss"] = LOSSES[self.state.global_step - 1]
        return metrics

    def ended(self):
        end(self)
        self.validation_result["loss"] = LOSSES[self.validated_step - 1]

    monkeypatch.setattr(transformers.Trainer, "evaluate", evaluated)
    monkeypatch.setattr(SummarizationModule, "on_validation_epoch_end", ended)


def settings(family, place, output, mode="prefixtune", **more):
    files = {"train_file": str(place / "train.jsonl"), "eval_file": str(place / "valid.jsonl")}
    length = {"max_steps": 3, "eval_steps": 1, "save_steps": 1, "bsz": 4, "max_new_tokens": 5, "learning_rate": 0.05}
    how = {"tuning_mode": mode, "disable_tqdm": True, "output_dir": str(output), **files, **length}
    own = {name: value == "yes" if value in ("yes", "no") else value for name, value in MORE[mode].items()}
    if family is gpt2:
        more = {"model_name_or_path": str(DEMO / "gpt2"), "keep_best": True, **more}
    else:
        more = {"model_name_or_path": str(place / "bart"), "num_workers": 0, **more}
    return family.Settings(mode="text", **how, **own, **more)


def trained_tensors(model):
    return {name: tensor.clone() for name, tensor in (model.prefix or model.base).state_dict().items()}


def read(output):
    results = json.loads((output / "results.json").read_text())
    return results["training"], results["decoding"]["valid"]


CASES = [(family, mode) for family in (gpt2, seq2seq) for mode in ("prefixtune", "finetune", "adaptertune", "bothtune")]


@pytest.mark.parametrize(("family", "mode"), CASES)
def test_the_best_weights_are_decoded_returned_and_named(place, tmp_path, caplog, family, mode):
    caplog.set_level("INFO")
    output = tmp_path / "run"
    result = family.train(settings(family, place, output, mode))
    training, entry = read(output)
    assert (training["steps"], training["best"]["step"], training["best"]["loss"], entry["step"]) == (3, 2, 1.0, 2)
    best, last = family.load(output / "best"), family.load(output)
    assert (best.task["step"], last.task["step"], result.model.task["step"]) == (2, 3, 2)
    name = "prefix_flat.safetensors" if best.prefix else "model.safetensors"
    assert not equal(load_file(output / "best" / name), load_file(output / name))
    if best.prefix:
        network = load_file(output / "best" / "prefix_model.safetensors")
        assert equal(trained_tensors(result.model), network)
    if mode != "prefixtune":
        tuned = best.base.state_dict()
        assert all(torch.equal(value, tuned[key]) for key, value in result.model.base.state_dict().items())
    rows = [json.loads(line) for line in (output / "run_valid_beam.jsonl").read_text().splitlines()]
    written = [row["output"] for row in rows]
    sources = [row["source"] for row in rows]
    assert written == best.generate(sources, max_new_tokens=5) == result.model.generate(sources, max_new_tokens=5)
    closing = [message.strip() for message in caplog.messages if message.startswith("  ")]
    assert any(line.startswith("best     step 2, which is decoded: ") for line in closing)
    assert any(line.startswith("decode ") and f"{output / 'best'} " in f"{line} " for line in closing)
    assert any(message.endswith(", weights of step 2") for message in caplog.messages)


@pytest.mark.parametrize("family", [gpt2, seq2seq])
@pytest.mark.parametrize("part", ["before", "after"])
def test_a_run_killed_before_or_in_decoding_decodes_the_same_weights(place, tmp_path, monkeypatch, family, part):
    whole = family.train(settings(family, place, tmp_path / "whole" / "run"))
    output = tmp_path / "killed" / "run"
    with monkeypatch.context() as patch:
        if part == "before":
            decode = (run_generation, "decode_splits") if family is gpt2 else (seq2seq.run_generation, "decode_split")
            patch.setattr(*decode, die_after(lambda *_, **__: None))
        else:
            patch.setattr(outputs.Outputs, "write", die_after(outputs.Outputs.write))
        with pytest.raises(Killed):
            family.train(settings(family, place, output))
    resumed = family.train(settings(family, place, output, resume=True))
    name = "run_valid_beam.jsonl"
    assert (output / name).read_bytes() == (tmp_path / "whole" / "run" / name).read_bytes()
    assert read(output)[1]["step"] == resumed.model.task["step"] == 2
    flat = [load_file(folder / "best" / "prefix_flat.safetensors") for folder in (output, tmp_path / "whole" / "run")]
    assert equal(*flat)
    assert resumed.scores == whole.scores


@pytest.mark.parametrize(
    ("more", "step"),
    [({"keep_best": False}, 3), ({"keep_best": False, "early_stopping_patience": 1}, 2)],
)
def test_early_stopping_keeps_the_best_too_and_else_gpt2_decodes_the_last(place, tmp_path, more, step):
    result = gpt2.train(settings(gpt2, place, tmp_path / "run", **more))
    training, entry = read(tmp_path / "run")
    assert (training["steps"], entry["step"], result.model.task["step"]) == (3, step, step)
    assert (tmp_path / "run" / "best").is_dir() == ("best" in training) == (step == 2)


@pytest.mark.parametrize("family", [gpt2, seq2seq])
def test_a_card_and_results_of_a_decoded_checkpoint_name_its_step(place, tmp_path, family):
    output = tmp_path / "run"
    family.train(settings(family, place, output, decode="none"))
    for folder, step in ((output, 3), (output / "best", 2)):
        if family is gpt2:
            words = ["--mode=text", "--split=valid", f"--checkpoint={folder}", "--length=5", "--disable_tqdm=yes"]
            run_generation.main([*words, f"--data_file={place / 'valid.jsonl'}", f"--output_dir={tmp_path / 'out'}"])
        else:
            words = ["--mode=text", "--do_train=no", f"--prefix_model_path={folder}", "--max_new_tokens=5"]
            words += ["--decode=valid", f"--eval_file={place / 'valid.jsonl'}", "--disable_tqdm=yes"]
            finetune.main([*words, f"--output_dir={tmp_path / 'out'}"])
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert results["decoding"]["valid"]["step"] == step
