"""The GPT-2 prefix against numbers that the original implementation printed (tests/golden/README.md)."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from gpt2.dataset import Encoded, collate
from gpt2.decoding import CausalSteps
from gpt2.prefix_lm import PrefixLM
from gpt2.train_control import split_layers
from gpt2.trainer_prefix import PrefixTrainer, row_losses
from prefixlib.base_model.load import dropout_settings
from prefixlib.decoding.search import DecodingRule, beam_search, sample
from tests.conftest import GOLDEN, close

GENERATIONS = json.loads((GOLDEN / "gpt2_generation.json").read_text())
SHIFT = {"base": 0.0, "eosminus": -0.15, "eosplus": 0.3}  # ln_f.bias += shift * wte[99]


def test_past_and_logits(golden_gpt2):
    base, prefix, arrays = golden_gpt2
    past = torch.stack([torch.stack(layer) for layer in prefix(batch_size=3)])
    assert close(past, arrays["past"])
    assert close(PrefixLM(base, prefix)(arrays["batch.input_ids"]), arrays["logits"])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_of_all_modes_and_gradients(golden_gpt2, checkpointing, packed):
    base, prefix, arrays = golden_gpt2
    if checkpointing:
        for module in base.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for name in dropout_settings(base.config):
            setattr(base.config, name, 0.0)
    model = PrefixLM(base, prefix, train_base=checkpointing, checkpointing=checkpointing).train()
    input_ids, labels = arrays["batch.input_ids"], arrays["batch.labels"]
    shapes = []
    base.transformer.register_forward_pre_hook(lambda m, a, k: shapes.append(k["input_ids"].shape), with_kwargs=True)
    nll, rows = model(input_ids, labels, attention_mask=input_ids.ne(100) if packed else None)
    assert shapes == [(1, 44) if packed else (3, 20)]  # of 15, 9 and 20 tokens
    # the original counts padding as text in mode 4, and looks for GPT-2's own eos (repaired in the trainer)
    every_token = torch.full((3,), input_ids.shape[1])
    not_eos = input_ids.ne(99).sum(dim=1)
    for mode in range(5):
        assert close(row_losses(nll, rows, labels, every_token, mode), arrays[f"loss.mode{mode}"]), mode
    assert close(row_losses(nll, rows, labels, not_eos, 4), arrays["loss.mode4_eos99"])
    loss = row_losses(nll, rows, labels, every_token, mode=1).mean()
    assert close(loss, arrays["trainer_loss.mode1"].squeeze())
    loss.backward()
    gradients = {name.removeprefix("grad."): array for name, array in arrays.items() if name.startswith("grad.")}
    assert gradients.keys() == dict(prefix.named_parameters()).keys()
    for name, parameter in prefix.named_parameters():
        assert close(parameter.grad, gradients[name]), name
    assert all(parameter.grad is None for parameter in base.parameters())


class OriginalAdamW(torch.optim.Optimizer):
    """AdamW as transformers 3.2 had it: eps is added before the bias correction, torch adds it after."""

    def __init__(self, parameters, lr, betas=(0.9, 0.999), eps=1e-8):
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(step=0, m=torch.zeros_like(parameter), v=torch.zeros_like(parameter))
                state["step"] += 1
                state["m"].mul_(beta1).add_(parameter.grad, alpha=1 - beta1)
                state["v"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
                size = group["lr"] * (1 - beta2 ** state["step"]) ** 0.5 / (1 - beta1 ** state["step"])
                parameter.addcdiv_(state["m"], state["v"].sqrt().add_(group["eps"]), value=-size)


def train_six_steps(golden_gpt2, output_dir, optimizer_class=None):
    """Train as the golden run did; returns the trainer, the golden weights and the golden log."""
    base, prefix, arrays = golden_gpt2
    weights = load_file(GOLDEN / "gpt2_train_plain.safetensors")
    prefix.load_state_dict({k.removeprefix("init."): v for k, v in weights.items() if k.startswith("init.")})
    examples = [
        Encoded(ids[:start].tolist(), ids[start:end].tolist())
        for ids, start, end in zip(arrays["batch.input_ids"], (10, 6, 13), (15, 9, 20), strict=True)
    ]
    optimizer = optimizer_class(prefix.parameters(), lr=0.01) if optimizer_class else None
    trainer = PrefixTrainer(
        model=PrefixLM(base, prefix),
        args=TrainingArguments(
            output_dir=str(output_dir),
            per_device_train_batch_size=3,
            num_train_epochs=6,
            learning_rate=0.01,
            max_grad_norm=1.0,
            lr_scheduler_type="linear",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            remove_unused_columns=False,
            disable_tqdm=True,
        ),
        optimizers=(optimizer, None),
        train_dataset=examples,
        data_collator=lambda batch: collate(batch, pad_token_id=100),
        objective_mode=1,
        separator_id=99,
        save_model_to=lambda directory: None,
        load_model_from=lambda directory: None,
    )
    trainer.train()
    final = {k.removeprefix("final."): v for k, v in weights.items() if k.startswith("final.")}
    return trainer, final, json.loads((GOLDEN / "gpt2_train.json").read_text())["plain"]


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if "loss" in row]


def test_six_training_steps_with_the_original_optimiser(golden_gpt2, tmp_path):
    """Schedule, clipping and loss of the trainer: every loss, rate and final weight of the original's run."""
    trainer, final, expected = train_six_steps(golden_gpt2, tmp_path, OriginalAdamW)
    assert logged(trainer, "loss") == pytest.approx(expected["losses"], abs=2e-4)
    # Trainer logs the rate a step was taken with, the original the one after it
    assert [*logged(trainer, "learning_rate")[1:], 0.0] == pytest.approx(expected["lrs_after_step"], abs=1e-9)
    for name, parameter in golden_gpt2[1].named_parameters():
        assert close(parameter, final[name]), name


def test_six_training_steps_with_torch_adamw(golden_gpt2, tmp_path):
    """torch's AdamW, the default, goes the same way: weights with tiny gradients differ, by up to a third of one lr."""
    trainer, final, expected = train_six_steps(golden_gpt2, tmp_path)
    assert logged(trainer, "loss") == pytest.approx(expected["losses"], abs=2e-3)
    for name, parameter in golden_gpt2[1].named_parameters():
        difference = (parameter - final[name]).abs()
        assert difference.max() < 0.01 / 3, name
        assert difference.median() < 1e-4, name


@pytest.mark.parametrize("variant", SHIFT)
@pytest.mark.parametrize("kind", ["greedy", "beam"])
@pytest.mark.parametrize("together", [True, False])
def test_generation(golden_gpt2, variant, kind, together):
    """Outputs, n-best lists and scores of the original's search, decoded in one batch and one by one."""
    base, prefix, _ = golden_gpt2
    base.transformer.ln_f.bias.data += SHIFT[variant] * base.transformer.wte.weight.data[99]
    wanted = [GENERATIONS[f"{variant}/prefix/p{n}/{kind}"] for n in range(3)]
    batches = [wanted] if together else [[case] for case in wanted]
    rule = DecodingRule(eos_token_id=99, max_new_tokens=20, num_beams=5, min_length=5, banned_token_ids=(28, 98))
    layers = split_layers(prefix.flat().detach(), prefix.config, batch_size=1)
    for batch in batches:
        prompts = [case["prompt"] for case in batch]
        steps = CausalSteps(base, prompts, layers)
        if kind == "greedy":
            found = [[hypothesis] for hypothesis in sample(steps, prompts, rule)]
        else:
            found = beam_search(steps, prompts, rule)
            for case, hypotheses in zip(batch, found, strict=True):
                assert [case["prompt"] + h.tokens for h in hypotheses] == [h["ids"] for h in case["hyps"]]
                assert [h.score for h in hypotheses] == pytest.approx([h["score"] for h in case["hyps"]], abs=1e-5)
        for case, hypotheses in zip(batch, found, strict=True):
            best = hypotheses[0]
            assert case["prompt"] + best.tokens + [99] * best.finished == case["output"]
