"""Context distillation: the teacher is the text prepended, what moves, where it starts, and what comes of a run."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

import gpt2
from gpt2 import context
from gpt2.dataset import Encoded
from gpt2.frozen_lm import key_values
from gpt2.train_control import join_layers
from gpt2.trainer_prefix import PrefixTrainer, matching_losses
from prefixlib.base_model.load import load_model, load_tokenizer
from prefixlib.system.errors import UserError
from tests.conftest import ROOT, gpt2_settings
from tests.tuning import Killed, die_after, equal

DEMO = ROOT / "data" / "demo"
TEXT = "The Fern River is a pub in the riverside area. It serves Chinese food, and families are welcome there. " * 2


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def base():
    return load_model(str(DEMO / "gpt2"), "decoder-only"), load_tokenizer(str(DEMO / "gpt2"))


def settings(text, output, **more):
    brief = {"bsz": 4, "max_steps": 4, "save_steps": 2, "eval_steps": 2, "context_samples": 12, "preseqlen": 8}
    start = {"init_shallow": True, "freeze_first": True, "learning_rate": 0.02, "disable_tqdm": True}
    where = {"model_name_or_path": str(DEMO / "gpt2"), "output_dir": str(output), "distill_context": str(text)}
    return gpt2.Settings(**where, **{**brief, **start, **more})


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "run"
    return gpt2.train(settings(text, output)), output


def test_the_teacher_is_the_text_prepended(base):
    model, tokenizer = base
    ids = tokenizer(TEXT)["input_ids"]
    behind = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
    teacher = context.TextInFront(model, ids)
    whole = model(torch.cat([torch.tensor([ids, ids]), behind], dim=1)).logits[:, len(ids) :]
    torch.testing.assert_close(teacher(input_ids=behind).logits, whole, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole, model(behind).logits, atol=0.1)  # or the text would not matter


def test_top_k_by_hand():
    """p_T = (1/2, 3/10, 1/5), p_S = (1/4, 1/4, 1/2); over the two likeliest: 0.5 ln 2 + 0.3 ln 1.2 = 0.401270."""
    teacher, student = torch.tensor([[[0.5, 0.3, 0.2]]]).log(), torch.tensor([[[0.25, 0.25, 0.5]]]).log()
    everywhere = torch.ones(1, 1, dtype=torch.bool)
    assert matching_losses(student, teacher, everywhere, "kl", top_k=2).item() == pytest.approx(0.401270, abs=1e-6)
    whole = matching_losses(student, teacher, everywhere, "kl").item()
    assert matching_losses(student, teacher, everywhere, "kl", top_k=9).item() == pytest.approx(whole)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_starts_from_the_texts_first_tokens_and_the_first_stays(text, base, tmp_path, accumulate, monkeypatch):
    model, tokenizer = base
    ids = tokenizer(TEXT)["input_ids"][:8]
    start = join_layers(key_values(model, input_ids=torch.tensor([ids]))).float()
    begun = []

    def train(trainer, **_):
        begun.append(trainer.model.prefix.flat().detach().clone())
        return SimpleNamespace(metrics={"train_loss": 0.0})

    monkeypatch.setattr(PrefixTrainer, "train", train)
    gpt2.train(settings(text, tmp_path / "a"))
    torch.testing.assert_close(begun[0], start)
    monkeypatch.undo()
    gpt2.train(settings(text, tmp_path / "b", gradient_accumulation_steps=accumulate, bsz=4 // accumulate))
    trained = load_file(tmp_path / "b" / "prefix_model.safetensors")["control_trans"]
    assert torch.equal(trained[0], begun[0][0])
    assert (trained[1:] != begun[0][1:]).any(dim=1).all()


def test_the_run_says_what_is_kept(run, text):
    result, output = run
    found = json.loads((output / "results.json").read_text())["training"]["context"]
    length = len(load_tokenizer(str(DEMO / "gpt2"))(TEXT.strip())["input_ids"])
    assert found["positions"] == {"nothing": 0, "prefix": 8, "whole text": length}
    config = AutoConfig.from_pretrained(DEMO / "gpt2")
    assert found["bytes"]["prefix"] == 8 * 2 * config.n_layer * config.n_embd * 4
    assert found["bytes"]["whole text"] == length * found["bytes"]["prefix"] // 8
    perplexity = found["perplexity"]
    assert perplexity["whole text"] < perplexity["prefix"] < perplexity["nothing"]
    losses = [row["eval_loss"] for row in result.history if "eval_loss" in row]
    assert losses[-1] < losses[0]
    assert result.scores == {}
    saved = json.loads((output / "prefix_config.json").read_text())["task"]
    assert (saved["distill_context"], saved["context_samples"]) == (str(text), 12)


def test_perplexity_counts_the_continuations_alone(base):
    model, tokenizer = base
    teacher = context.TextInFront(model, tokenizer(TEXT)["input_ids"])
    examples = [Encoded([5, 6, 7], [8, 9]), Encoded([5], [10, 11, 12])]
    logits = [teacher(input_ids=torch.tensor([e.prompt + e.continuation])).logits.log_softmax(-1)[0] for e in examples]
    terms = [logits[0][2, 8], logits[0][3, 9], logits[1][0, 10], logits[1][1, 11], logits[1][2, 12]]
    assert context.mean_loss(teacher.lm, examples) == pytest.approx(-sum(terms).item() / 5, rel=1e-5)


def test_sampled_texts_go_on_from_the_text_and_are_drawn_again_alike(base):
    model, tokenizer = base
    ids = tokenizer(TEXT)["input_ids"]
    teacher = context.TextInFront(model, ids)
    one, two = (context.sample_sets(teacher, tokenizer, 6, seed) for seed in (3, 4))
    assert one == context.sample_sets(teacher, tokenizer, 6, 3) != two
    assert [len(one[split]) for split in ("train", "valid")] == [6, 1]
    for example in one["train"]:
        assert any(ids[n : n + len(example.prompt)] == example.prompt for n in range(len(ids)))
        assert 1 <= len(example.continuation) <= context.LENGTH


def test_killed_and_resumed_equals_whole(run, text, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(PrefixTrainer, "_save_checkpoint", die_after(PrefixTrainer._save_checkpoint))
        with pytest.raises(Killed):
            gpt2.train(settings(text, tmp_path))
    gpt2.train(settings(text, tmp_path, resume=True))
    name = "prefix_model.safetensors"
    assert equal(load_file(tmp_path / name), load_file(run[1] / name))


def test_training_texts_serve_as_well(text, tmp_path):
    given = {"context_samples": 0, "data_dir": str(DEMO), "max_steps": 1, "skip_decode": True}
    result = gpt2.train(settings(text, tmp_path, matching_top_k=5, **given))
    assert result.model.generate([{"name": "The Mill"}], max_new_tokens=3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--context_samples", "5"], "--context_samples 5 needs --distill_context"),
        (["--freeze_first", "yes"], "--freeze_first"),
        (["--distill_context", "x", "--freeze_first", "yes"], "--init_shallow"),
        (["--distill_context", "x", "--init_text", "a"], "--distill_context and --init_text do not go together"),
        (["--distill_context", "x", "--tuning_mode", "finetune"], "--distill_context"),
        (["--distill_context", "x", "--format_mode", "infix"], "--distill_context"),
        (["--distill_context", "x", "--matching_objective", "logits", "--matching_top_k", "3"], "--matching_top_k"),
        (["--matching_top_k", "3"], "--matching_top_k"),
    ],
)
def test_flags_that_do_not_go_together(words, message):
    with pytest.raises(UserError, match=message):
        gpt2_settings(*words, "--output_dir", "x")


@pytest.mark.parametrize(
    ("words", "message"),
    [("", "has 0 tokens; the model takes 1 to"), ("pub " * 500, "tokens; the model takes"), ("a pub", "--preseqlen 8")],
)
def test_texts_that_do_not_fit(tmp_path, words, message):
    (tmp_path / "text.txt").write_text(words)
    with pytest.raises(UserError, match=message):
        gpt2.train(settings(tmp_path / "text.txt", tmp_path / "out"))
    with pytest.raises(UserError, match="no such file"):
        gpt2.train(settings(tmp_path / "other.txt", tmp_path / "out"))


def test_sampled_texts_need_no_file_in_mode_text(text, tmp_path):
    result = gpt2.train(settings(text, tmp_path / "run", mode="text", context_samples=2, max_steps=1, save_steps=1))
    assert result.model.task["mode"] == "text"
