"""Distillation: both distances by hand, where they are taken, what is trained, what a teacher must be."""

import copy
import json
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2.dataset import Encoded, collate
from gpt2.model import load_prefix
from gpt2.prefix_lm import PrefixLM
from gpt2.trainer_prefix import Distillation, load_teacher, matched_positions, matching_losses, row_losses
from prefixlib.system.errors import UserError
from tests.unit.gpt2.test_trainer import EXAMPLES, losses, make_trainer

SHORT, LONG = Encoded([1, 49], [3, 49]), Encoded([4, 5, 6, 49], [7, 8, 9, 49])


@pytest.fixture
def teacher():
    torch.manual_seed(7)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=50, n_positions=64, bos_token_id=49, eos_token_id=49)
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


def batch_of(*examples):
    return collate(examples, pad_token_id=49)


def test_kl_by_hand():
    """p_T = (1/2, 1/2), p_S = (9/10, 1/10): 0.5 ln(5/9) + 0.5 ln 5 = 0.510826; equal distributions cost nothing."""
    teacher = torch.tensor([[[0.0, 0.0], [3.0, 3.0]], [[1.0, 1.0], [2.0, 2.0]]])
    student = torch.tensor([[[9.0, 1.0], [9.0, 1.0]], [[1.0, 1.0], [9.0, 1.0]]]).log()
    everywhere = torch.ones(2, 2, dtype=torch.bool)
    expected = [2 * 0.510826, 0.510826]  # summed over positions, per row
    assert matching_losses(student, teacher, everywhere, "kl").tolist() == pytest.approx(expected, abs=1e-6)
    one = torch.tensor([[True, False], [False, False]])
    assert matching_losses(student, teacher, one, "kl").tolist() == pytest.approx([0.510826, 0.0], abs=1e-6)


def test_kl_is_from_the_teacher_to_the_student():
    """p_T = (9/10, 1/10), p_S = (1/2, 1/2): 0.9 ln 1.8 + 0.1 ln 0.2 = 0.368064; the other way round it is 0.510826."""
    teacher, student = torch.tensor([[[9.0, 1.0]]]).log(), torch.zeros(1, 1, 2)
    loss = matching_losses(student, teacher, torch.ones(1, 1, dtype=torch.bool), "kl")
    assert loss.item() == pytest.approx(0.368064, abs=1e-6)


def test_logits_by_hand():
    """Differences (3, 4) and (5, 12) have the norms 5 and 13; norms are summed, not the squares."""
    teacher = torch.zeros(1, 2, 2)
    student = torch.tensor([[[3.0, 4.0], [-5.0, 12.0]]])
    assert matching_losses(student, teacher, torch.ones(1, 2, dtype=torch.bool), "logits").tolist() == [18.0]


def test_positions_by_hand():
    """Ids [1 sep 3 eos pad pad pad pad]: 8 positions, 4 of text; the 2 scored tokens are foretold from 1 and 2."""
    batch = batch_of(SHORT, LONG)
    labels, mask = batch["labels"], batch["attention_mask"]
    assert matched_positions(labels, mask, "all").tolist() == [[True] * 8] * 2
    assert matched_positions(labels, mask, "text").tolist() == [[True] * 4 + [False] * 4, [True] * 8]
    target = [[False, True, True] + [False] * 5, [False] * 3 + [True] * 4 + [False]]
    assert matched_positions(labels, mask, "target").tolist() == target


@pytest.mark.parametrize(("which", "depends"), [("all", True), ("text", False), ("target", False)])
def test_whether_a_rows_loss_depends_on_its_neighbours(tiny_lm, teacher, which, depends):
    tiny_lm.eval()
    distillation = Distillation(teacher, "kl", which)
    alone, beside = batch_of(SHORT), batch_of(SHORT, LONG)
    one = distillation.row_losses(tiny_lm(alone["input_ids"]), alone)[0]
    two = distillation.row_losses(tiny_lm(beside["input_ids"]), beside)[0]
    assert (abs(one - two) > 1e-3) == depends


@pytest.mark.parametrize("objective", ["kl", "logits"])
def test_loss_of_the_trainer_is_the_formula_on_both_models(tiny_lm, teacher, tmp_path, objective):
    """Independent of the code: the teacher without prefix from position 0, sums over all positions, mean over rows."""
    trainer = make_trainer(tiny_lm, tmp_path, distillation=Distillation(teacher, objective, "all"))
    batch = batch_of(SHORT, LONG)
    student_logits = tiny_lm.eval()(batch["input_ids"])
    teacher_logits = teacher(batch["input_ids"], position_ids=torch.arange(8).unsqueeze(0)).logits
    if objective == "kl":
        each = torch.nn.functional.kl_div(
            student_logits.log_softmax(-1), teacher_logits.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
    else:
        each = (student_logits - teacher_logits).square().sum(-1).sqrt()
    tiny_lm.train()  # without dropout: the base stays in eval mode
    loss = trainer.compute_loss(tiny_lm, batch)
    assert loss.item() == pytest.approx(each.sum(dim=1).mean().item(), rel=1e-5)


def test_dev_loss_stays_the_objective_modes(tiny_lm, teacher, tmp_path):
    trainer = make_trainer(
        tiny_lm, tmp_path, distillation=Distillation(teacher, "kl", "all"), per_device_eval_batch_size=5
    )
    batch = batch_of(*EXAMPLES[:5])
    nll, rows = tiny_lm.eval()(batch["input_ids"], batch["labels"])
    expected = row_losses(nll, rows, batch["labels"], torch.ones(5), mode=1).mean().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-4)


def test_only_the_prefix_moves_and_the_teacher_is_not_saved(tiny_lm, teacher, tmp_path):
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    base = {name: tensor.clone() for name, tensor in tiny_lm.base.state_dict().items()}
    prefix = {name: tensor.clone() for name, tensor in tiny_lm.prefix.state_dict().items()}
    trainer = make_trainer(tiny_lm, tmp_path, distillation=Distillation(teacher, "kl", "all"))
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert all(torch.equal(teacher.state_dict()[name], tensor) for name, tensor in before.items())
    assert not teacher.training
    assert all(torch.equal(tiny_lm.base.state_dict()[name], tensor) for name, tensor in base.items())
    assert all(not torch.equal(tiny_lm.prefix.state_dict()[name], tensor) for name, tensor in prefix.items())
    assert load_prefix(tmp_path / "checkpoint-20").network.keys() == prefix.keys()
    weights = {path.name for path in (tmp_path / "checkpoint-20").glob("*.safetensors")}
    assert weights == {"prefix_model.safetensors", "prefix_flat.safetensors"}


@pytest.mark.parametrize("how", ["checkpointing", "bf16"])
def test_distillation_under_checkpointing_and_bf16(tiny_lm, teacher, tmp_path, how):
    """Checkpointing changes no loss; bfloat16 changes it by its rounding only."""
    plain = make_trainer(copy.deepcopy(tiny_lm), tmp_path / "plain", distillation=Distillation(teacher, "kl", "all"))
    plain.train()
    model = tiny_lm
    if how == "checkpointing":
        for module in tiny_lm.base.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model = PrefixLM(tiny_lm.base, tiny_lm.prefix, train_base=True, checkpointing=True)
    distillation = Distillation(teacher, "kl", "all")
    other = make_trainer(model, tmp_path / "other", distillation=distillation, bf16=how == "bf16")
    other.train()
    assert losses(other) == pytest.approx(losses(plain), rel=0.05 if how == "bf16" else 1e-4)


def test_resumed_distillation_ends_where_the_whole_run_does(tiny_lm, teacher, tmp_path):
    fresh = copy.deepcopy(tiny_lm)
    whole = make_trainer(tiny_lm, tmp_path, distillation=Distillation(teacher, "logits", "all"), save_total_limit=None)
    whole.train()
    resumed = make_trainer(fresh, tmp_path, distillation=Distillation(teacher, "logits", "all"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert losses(resumed) == losses(whole)
    for name, tensor in tiny_lm.prefix.state_dict().items():
        assert torch.equal(fresh.prefix.state_dict()[name], tensor), name


def save_teacher(directory, task, **settings):
    config = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 50, "n_positions": 64, **settings}
    GPT2LMHeadModel(GPT2Config(**config)).save_pretrained(directory)
    (directory / "task_config.json").write_text(json.dumps({"task": task}))
    return directory


def test_a_teacher_is_loaded_frozen_in_eval_mode(tiny_lm, tmp_path):
    directory = save_teacher(tmp_path, {"mode": "webnlg", "tuning_mode": "finetune"})
    teacher = load_teacher(directory, "webnlg", tiny_lm.base, 61, torch.float32)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert math.isfinite(teacher(torch.tensor([[1, 2]])).logits.sum().item())


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ({}, {"vocab_size": 51}, "has a vocabulary of 51 tokens, the model to train one of 50"),
        ({}, {"n_positions": 60}, "has 60 positions, the texts may have 61 tokens"),
        ({"mode": "triples"}, {}, "--mode webnlg contradicts .*, which was trained with mode triples"),
        ({"tuning_mode": "adaptertune"}, {}, "holds a model of --tuning_mode adaptertune"),
    ],
)
def test_a_teacher_that_does_not_fit_is_one_line(tiny_lm, tmp_path, task, settings, message):
    with pytest.raises(UserError, match=message) as error:
        load_teacher(save_teacher(tmp_path, task, **settings), "webnlg", tiny_lm.base, 61, torch.float32)
    assert "\n" not in str(error.value)


def test_what_is_no_fine_tuned_model_is_one_line(tiny_lm, tmp_path):
    trainer = make_trainer(tiny_lm, tmp_path)
    trainer.save_model()
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"--finetuned_model_path .*: no fine-tuned model there"):
            load_teacher(directory, "webnlg", tiny_lm.base, 61, torch.float32)
