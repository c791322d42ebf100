"""The loss that prefixes and tuned models share; which inputs are decoded; when training stops early."""

import json
import logging

import pytest
import torch
from transformers import DynamicCache

from gpt2 import run_generation, run_language_modeling
from gpt2.model import Model
from gpt2.prefix_lm import PrefixLM
from gpt2.run_generation import first_groups
from gpt2.train_control import PrefixConfig, make_prefix
from gpt2.trainer_prefix import is_exhausted
from prefixlib.base_model.load import load_model, load_tokenizer
from prefixlib.data.readers import Group
from prefixlib.system.errors import UserError
from tests.conftest import ROOT

DEMO = str(ROOT / "data" / "demo" / "gpt2")
GROUPS = [
    Group("name : The Eagle | food : soup", ("The Eagle serves soup .", "never read"), "", ()),
    Group("name : Zizzi", ("Zizzi is a long way from the riverside , where it is cheap .",), "", ()),
    Group("name : no reference", (), "", ()),
    Group("name : The Punter | area : city centre", ("The Punter .",), "", ()),
]
PREFIXES = {
    "none": None,
    "cat": {},
    "infix": {"format_mode": "infix"},
    "of words": {"format_mode": "peek", "optim_prefix": False, "preseqlen": 0},
}


def make_model(settings):
    base, tokenizer = load_model(DEMO, "decoder-only"), load_tokenizer(DEMO)
    if settings is None:
        return Model(PrefixLM(base, None), tokenizer, {"mode": "data2text", "lowdata_token": "table-to-text:"})
    torch.manual_seed(3)
    defaults = {"preseqlen": 4, "mid_dim": 8, "prefix_dropout": 0.0, "prefix_mode": "activation", "format_mode": "cat"}
    prefix = make_prefix(PrefixConfig.for_model(base, **{**defaults, **settings}))
    return Model(PrefixLM(base, prefix.eval()), tokenizer, {"mode": "data2text"})


def by_hand(trained):
    """Text by text, without padding, as the formula says it."""
    tokenizer, total, count = trained.tokenizer, 0.0, 0
    for group in (group for group in GROUPS if group.references):
        source = tokenizer(f" {trained.format.source_text(group.source)} {tokenizer.eos_token}")["input_ids"]
        target = tokenizer(f" {group.references[0]} {tokenizer.eos_token}")["input_ids"]
        past = DynamicCache(trained.past([]).layers) if trained.prefix is not None else None
        logits = trained.base(input_ids=torch.tensor([source + target]), past_key_values=past).logits[0]
        found = logits.log_softmax(-1)[len(source) - 1 : -1]
        total -= found[range(len(target)), target].sum().item()
        count += len(target)
    return total / count


@pytest.mark.parametrize("kind", PREFIXES)
def test_batches_change_nothing(kind):
    trained = make_model(PREFIXES[kind])
    alone = trained.reference_loss(GROUPS, 1)
    assert trained.reference_loss(GROUPS, 4) == pytest.approx(alone, rel=1e-5)
    if kind in ("none", "cat"):
        with torch.no_grad():
            assert by_hand(trained) == pytest.approx(alone, rel=1e-5)


def test_nothing_to_score():
    assert make_model(None).reference_loss(GROUPS[2:3], 4) is None


# ---- the first inputs --------------------------------------------------------------------------------------------


def categories(groups):
    return "".join(group.category for group in groups)


@pytest.mark.parametrize(
    ("limit", "seen", "wanted"),
    [
        (None, ("a", "b"), "aabbbxxxy"),
        (20, ("a", "b"), "aabbbxxxy"),
        (4, (), "aabb"),  # a model that knows of no categories
        (4, ("a", "b"), "aaxx"),
        (5, ("a", "b"), "aabxx"),
        (3, ("a", "b", "x", "y"), "aab"),
    ],
)
def test_the_first_of_seen_and_unseen_categories(limit, seen, wanted):
    groups = [Group(f"{n}", ("text",), category, ()) for n, category in enumerate("aabbbxxxy")]
    assert categories(first_groups(groups, limit, seen)) == wanted


def test_a_limit_below_one_is_refused():
    with pytest.raises(UserError, match="--decode_limit 0: must be at least 1"):
        run_generation.main(["--mode", "data2text", "--split", "test", "--checkpoint", "x", "--decode_limit", "0"])


# ---- early stopping ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "patience", "stops"),
    [
        ([], 1, False),
        ([3.0], 1, False),
        ([3.0, 3.0], 1, True),
        ([3.0, 2.0], 1, False),
        ([2.0, 3.0, 2.5], 2, True),
        ([2.0, 3.0, 1.5], 2, False),
        ([2.0, 3.0, 2.5], 3, False),
        ([2.0, 3.0, 2.5], -1, False),
    ],
)
def test_when_a_run_is_exhausted(losses, patience, stops):
    assert is_exhausted(losses, patience) is stops


def test_a_run_that_gets_worse_stops_and_is_not_gone_on_with(tmp_path, caplog):
    lines = [f"name : The Eagle {n} | food : soup||The Eagle {n} serves soup ." for n in range(8)]
    for split in ("train", "valid"):
        (tmp_path / f"{split}.txt").write_text("\n".join(lines[: 8 if split == "train" else 5]) + "\n")
    command = ["--model_name_or_path", DEMO, "--tuning_mode", "finetune", "--learning_rate", "0.5"]
    command += ["--train_file", str(tmp_path / "train.txt"), "--eval_file", str(tmp_path / "valid.txt")]
    command += ["--output_dir", str(tmp_path / "out"), "--max_steps", "30", "--eval_steps", "1", "--save_steps", "1"]
    command += ["--bsz", "2", "--eval_batch_size", "3", "--skip_decode", "yes", "--disable_tqdm", "yes"]
    command += ["--keep_best", "yes", "--early_stopping_patience", "2"]
    caplog.set_level(logging.INFO)
    run_language_modeling.main(command)
    assert "no better dev loss in 2 evaluations: training stops here" in caplog.text
    training = json.loads((tmp_path / "out" / "results.json").read_text())["training"]
    losses = [row["eval_loss"] for row in history(tmp_path / "out") if "eval_loss" in row]
    assert training["steps"] == len(losses) < 30
    assert min(losses[-2:]) >= min(losses[:-2])
    caplog.clear()
    run_language_modeling.main([*command, "--resume", "yes"])
    assert "trained to its end" in caplog.text
    with pytest.raises(UserError, match="--early_stopping_patience 3 contradicts"):
        run_language_modeling.main([*command, "--resume", "yes", "--early_stopping_patience", "3"])
    with pytest.raises(UserError, match="--early_stopping_patience 0: at least 1 evaluation"):
        run_language_modeling.main([*command, "--early_stopping_patience", "0"])


def history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_the_evaluation_s_batches_change_no_loss(tmp_path):
    """Of a prefix, whose loss is a mean over texts."""
    lines = [f"name : The Eagle {n} | food : soup||The Eagle {'really ' * n} serves soup ." for n in range(7)]
    for split in ("train", "valid"):
        (tmp_path / f"{split}.txt").write_text("\n".join(lines) + "\n")
    losses = []
    for size in (0, 1, 7):
        out = tmp_path / f"out{size}"
        run_language_modeling.main(
            [
                *("--model_name_or_path", DEMO, "--mid_dim", "8", "--preseqlen", "2", "--max_steps", "1", "--bsz", "3"),
                *("--train_file", str(tmp_path / "train.txt"), "--eval_file", str(tmp_path / "valid.txt")),
                *("--output_dir", str(out), "--eval_batch_size", str(size), "--eval_steps", "1"),
                *("--skip_decode", "yes", "--disable_tqdm", "yes"),
            ]
        )
        losses.append(json.loads((out / "results.json").read_text())["training"]["dev_loss"])
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-4)
