"""The training loop: resuming, checkpoints that are whole or absent, what stops a run, what is kept."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from gpt2.dataset import Encoded, collate
from gpt2.model import load_prefix, save_prefix
from gpt2.prefix_lm import PrefixLM
from gpt2.trainer_prefix import Distillation, PrefixTrainer, row_losses
from prefixlib.compute.accumulation import OncePerStep
from prefixlib.methods import adapters, top_layers
from prefixlib.system.errors import UserError

EXAMPLES = [Encoded([n % 40, n % 7, 49], [n % 30, n % 11, n % 5, 49]) for n in range(30)]
BASE, TASK = {"name": "x", "revision": None}, {"mode": "webnlg"}


def make_trainer(model, output: Path, keep_best: bool = False, distillation=None, **settings) -> PrefixTrainer:
    settings = {
        "per_device_train_batch_size": 3,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": 6,
        "save_total_limit": 1,
        "seed": 3,
        "eval_strategy": "no",
        **settings,
    }
    return PrefixTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output),
            lr_scheduler_type="linear",
            report_to="none",
            use_cpu=True,
            prediction_loss_only=True,
            remove_unused_columns=False,
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=EXAMPLES,
        eval_dataset=EXAMPLES[:5],
        data_collator=lambda batch: collate(batch, pad_token_id=49),
        objective_mode=1,
        separator_id=49,
        save_model_to=lambda directory: save_prefix(directory, model.prefix, BASE, TASK),
        load_model_from=lambda directory: model.prefix.load_state_dict(load_prefix(directory).network),
        keep_best=keep_best,
        distillation=distillation,
    )


def losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_resumed_run_ends_where_the_uninterrupted_one_does(tiny_lm, tmp_path):
    """20 steps in one go, and 12 steps (one epoch and a bit), then a new process's worth of objects from step 12."""
    tiny_lm.prefix.dropout.p = 0.2  # so that the random state has to come back too
    fresh = copy.deepcopy(tiny_lm)
    whole = make_trainer(tiny_lm, tmp_path / "whole")
    whole.train()

    class Killed(Exception):
        pass

    stopped_model = copy.deepcopy(fresh)
    stopped = make_trainer(stopped_model, tmp_path / "stopped")
    save = stopped._save_checkpoint

    def save_then_die(model, trial):
        save(model, trial)
        if stopped.state.global_step == 12:
            raise Killed

    stopped._save_checkpoint = save_then_die
    with pytest.raises(Killed):
        stopped.train()
    torch.manual_seed(999)  # whatever the new process starts with
    resumed_model = copy.deepcopy(fresh)
    resumed = make_trainer(resumed_model, tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-12"))
    assert resumed.state.global_step == whole.state.global_step == 20
    assert losses(resumed) == losses(whole)
    for name, tensor in tiny_lm.state_dict().items():
        assert torch.equal(resumed_model.state_dict()[name], tensor), name


def test_a_checkpoint_is_whole_or_absent(tiny_lm, tmp_path, monkeypatch):
    """A run that dies while writing checkpoint-12 leaves checkpoint-6, loadable, and nothing called checkpoint-12."""
    trainer = make_trainer(tiny_lm, tmp_path)
    write = trainer.save_model_to

    def die_at_12(directory):
        write(directory)
        if trainer.state.global_step == 12:
            raise OSError(28, "No space left on device")

    trainer.save_model_to = die_at_12
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-6"}
    load_prefix(tmp_path / "checkpoint-6")
    trainer.save_model_to = write
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-20"}


def test_a_checkpoint_holds_no_base_model_and_no_pickled_arguments(tiny_lm, tmp_path):
    make_trainer(tiny_lm, tmp_path).train()
    names = {path.name for path in (tmp_path / "checkpoint-20").iterdir()}
    assert {"prefix_config.json", "prefix_model.safetensors", "prefix_flat.safetensors"} <= names
    assert not names & {"model.safetensors", "pytorch_model.bin", "training_args.bin"}


def test_a_loss_that_is_no_number_stops_the_run(tiny_lm, tmp_path):
    trainer = make_trainer(tiny_lm, tmp_path, learning_rate=1e30, max_grad_norm=0.0)
    with pytest.raises(UserError, match=r"training stopped at step \d+: the loss is not a number; try a lower"):
        trainer.train()


def test_weights_that_are_no_numbers_are_not_saved(tiny_lm, tmp_path):
    trainer = make_trainer(tiny_lm, tmp_path, logging_steps=1000)
    trainer.train()
    tiny_lm.prefix.wte.weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match=r"wte\.weight is not finite"):
        trainer._save_checkpoint(tiny_lm, None)
    assert (tmp_path / "checkpoint-20").is_dir()


def test_best_checkpoint_is_the_one_with_the_lowest_dev_loss(tiny_lm, tmp_path):
    trainer = make_trainer(tiny_lm, tmp_path, keep_best=True, eval_strategy="steps", eval_steps=5)
    trainer.train()
    dev = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert len(dev) == 4
    tiny_lm.prefix.load_state_dict(load_prefix(tmp_path / "best").network)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(dev), abs=1e-5)


def test_evaluation_takes_no_random_numbers(tiny_lm, tmp_path):
    """A checkpoint is written after the evaluation of its step, with the random state that evaluation left."""
    trainer = make_trainer(tiny_lm, tmp_path)
    before = torch.get_rng_state()
    trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_dev_loss_from_before_a_resumption_still_counts(tiny_lm, tmp_path):
    trainer = make_trainer(tiny_lm, tmp_path, keep_best=True)
    trainer.state.log_history.append({"eval_loss": 0.0, "step": 1})  # as a checkpoint brings it back
    trainer.evaluate()
    assert not (tmp_path / "best").exists()
    trainer.state.log_history[0]["eval_loss"] = 1e9
    trainer.state.log_history[1:] = []
    trainer.evaluate()
    assert (tmp_path / "best").is_dir()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_network_runs_once_a_step_and_changes_nothing(tiny_lm, tmp_path, dropout):
    """30 examples in 10 batches, 4 a step and 2 in the last of each epoch: as many runs as steps, the same weights."""
    tiny_lm.prefix.dropout.p = dropout
    apart, runs = copy.deepcopy(tiny_lm), []
    settings = {"gradient_accumulation_steps": 4, "save_strategy": "no"}
    trainer = make_trainer(apart, tmp_path / "apart", **settings)
    trainer.once_per_step = None
    OncePerStep.remove(apart.prefix)
    trainer.train()
    tiny_lm.prefix.control_trans.register_forward_hook(lambda *_: runs.append(1))
    shared = make_trainer(tiny_lm, tmp_path / "shared", **settings)
    shared.train()
    assert len(runs) == shared.state.global_step == 6
    assert losses(shared) == pytest.approx(losses(trainer), abs=1e-4)
    for name, tensor in apart.state_dict().items():
        assert (tiny_lm.state_dict()[name] - tensor).abs().max() < 1e-4, name


def test_a_trainer_without_accumulation_inherits_no_shared_run(tiny_lm, tmp_path):
    make_trainer(tiny_lm, tmp_path / "a", gradient_accumulation_steps=4)
    make_trainer(tiny_lm, tmp_path / "b")
    assert "flat" not in vars(tiny_lm.prefix)


# texts of 1 to 9 "sentences" of 5 tokens; 31 of them, so that every epoch ends with a smaller step and a smaller batch
UNEVEN = [Encoded([n % 40, 49], [(n * 7 + m) % 48 for m in range(5 * (1 + n * 5 % 9))] + [49]) for n in range(31)]
TRAINED = {
    "finetune": lambda base: base.requires_grad_(True),
    "top layer": lambda base: top_layers.train_top(base, 1, embeddings=True),
    "adapters": lambda base: (adapters.insert(base, 2, 6), adapters.train_only_adapters(base)),
}


def trained_in_batches(lm, output, batch, accumulated, objective, distillation=None, rate=0.3):
    """The weights after two epochs of plain gradient descent, the logged losses, and the dev loss."""
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
    sizes |= {"per_device_eval_batch_size": batch, "optim": "sgd", "learning_rate": rate, "save_strategy": "no"}
    trainer = make_trainer(lm, output, distillation=distillation, **sizes)
    trainer.objective_mode = objective
    trainer.train_dataset, trainer.eval_dataset = UNEVEN, UNEVEN[:7]
    before = {name: p.detach().clone() for name, p in lm.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == 16
    assert max((p - before[name]).abs().max() for name, p in lm.named_parameters()) > 0.01
    weights = {name: p.detach().clone() for name, p in lm.named_parameters() if p.requires_grad}
    return weights, losses(trainer), trainer.evaluate()["eval_loss"]


def hold_equal(one, others):
    for weights, logged, dev_loss in others:
        assert logged == pytest.approx(one[1], rel=1e-5)
        assert dev_loss == pytest.approx(one[2], rel=1e-5)
        assert weights.keys() == one[0].keys()
        for name, tensor in weights.items():
            assert (tensor - one[0][name]).abs().max() < 1e-5, name


def without_dropout(lm):
    for module in lm.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return lm


@pytest.mark.parametrize("trained", [*TRAINED, "prefix, objective 0", "prefix, objective 1", "distilled"])
def test_accumulated_batches_equal_the_larger_batch(tiny_lm, tmp_path, trained):
    """Batches 1 x 4, 2 x 2 and 4 x 1, as many texts each step: the same weights, logged losses and dev loss."""
    runs = []
    for batch, accumulated in ((4, 1), (2, 2), (1, 4)):
        lm, teacher = without_dropout(copy.deepcopy(tiny_lm)), None
        if trained in TRAINED:
            torch.manual_seed(1)
            TRAINED[trained](lm.base)
            lm = PrefixLM(lm.base, None)
        if trained == "distilled":
            teacher = Distillation(copy.deepcopy(tiny_lm.base), "kl", "text")
        objective = 1 if trained in ("prefix, objective 1", "distilled") else 0
        rate = {"prefix, objective 0": 10, "distilled": 1}.get(trained, 0.3)
        runs.append(trained_in_batches(lm, tmp_path / f"{batch}", batch, accumulated, objective, teacher, rate))
    hold_equal(runs[0], runs[1:])


def test_dev_loss_is_the_objective_over_the_dev_set(tiny_lm, tmp_path):
    trainer = make_trainer(tiny_lm, tmp_path, per_device_eval_batch_size=2)
    batch = collate(EXAMPLES[:5], pad_token_id=49)
    nll, rows = tiny_lm.eval()(batch["input_ids"], batch["labels"])
    expected = row_losses(nll, rows, batch["labels"], torch.ones(5), mode=1).mean().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-4)


def test_objectives_by_hand():
    """Two rows, T = 5: three scored tokens of nll 1, 2, 3 and one of nll 4; texts of 4 and 2 tokens."""
    labels = torch.tensor([[-100, -100, 7, 7, 7], [-100, 7, -100, -100, -100]])
    nll, rows = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 0, 0, 1])
    lengths = torch.tensor([4, 2])
    expected = {0: [2.5], 1: [6, 4], 2: [1.5, 1], 3: [2, 4 / 3], 4: [1.5, 2]}
    for mode, values in expected.items():
        assert row_losses(nll, rows, labels, lengths, mode).tolist() == pytest.approx(values), mode


def test_text_length_of_mode_4_leaves_out_padding_and_separators(tiny_lm, tmp_path):
    trainer = make_trainer(tiny_lm, tmp_path)
    trainer.objective_mode = 4
    batch = collate([Encoded([1, 2, 49], [3, 49]), Encoded([1, 49], [3, 4, 5, 6, 49])], pad_token_id=48)
    nll, rows = tiny_lm.eval()(batch["input_ids"], batch["labels"])
    expected = (nll[rows == 0].sum() / 3 + nll[rows == 1].sum() / 5) / 2
    assert trainer.compute_loss(tiny_lm, batch).item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_model_without_a_prefix_is_trained_on_its_token_mean(tiny_lm, tmp_path):
    model = PrefixLM(tiny_lm.base.requires_grad_(True), None)
    trainer = make_trainer(model, tmp_path)
    trainer.objective_mode = 0
    batch = collate(EXAMPLES[:4], pad_token_id=49)
    model.eval()
    loss = trainer.compute_loss(model, batch)
    logits = tiny_lm.base(batch["input_ids"]).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_trainer_state_names_every_logged_step(tiny_lm, tmp_path):
    make_trainer(tiny_lm, tmp_path).train()
    state = json.loads((tmp_path / "checkpoint-20" / "trainer_state.json").read_text())
    assert [row["step"] for row in state["log_history"]] == list(range(1, 21))
