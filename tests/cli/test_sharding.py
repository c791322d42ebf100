"""--shard_base yes: two processes that each hold half of the frozen layers train, validate and decode as one does."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

import gpt2
import seq2seq
from gpt2 import train_e2e
from prefixlib.system.errors import UserError
from seq2seq import train_bart
from tests.conftest import run_command, train_here

TREES = {
    "gpt2/train_e2e.py": (train_e2e, ()),
    "seq2seq/train_bart.py": (train_bart, ("--use_dropout", "no", "--n_train", 16, "--n_val", 5)),
}


@pytest.mark.parametrize("program", TREES)
def test_half_of_the_layers_each(program, tmp_path):
    launcher, more = TREES[program]
    weights, texts, dev_losses = [], [], []
    for processes in (1, 2):
        output = tmp_path / str(processes) / "run"
        flags = ["--demo", "yes", "--bsz", 4, "--max_steps", 3, "--learning_rate", 1e-4, "--decode", "test"]
        flags += ["--decode_limit", 2, "--disable_tqdm", "yes", "--output_dir", output, *more]
        if processes == 1:
            train_here(launcher, *flags)
        else:
            done = run_command(program, *flags, "--num_processes", 2, "--shard_base", "yes")
            assert done.returncode == 0, done.stderr
        weights.append(load_file(output / "prefix_model.safetensors"))
        dev_losses.append(json.loads((output / "results.json").read_text())["training"]["dev_loss"])
        texts.append(next(output.glob("*test_beam*")).read_text())
    here, in_all = (
        int(n.replace(",", "")) for n in re.search(r": ([\d,]+) of their ([\d,]+) parameters", done.stderr).groups()
    )
    assert here == in_all / 2 > 0
    assert texts[0] == texts[1]
    assert dev_losses[1] == pytest.approx(dev_losses[0], rel=1e-5)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--shard_base yes needs several processes: --num_processes 2 or more"),
        (("--tuning_mode", "finetune"), "only a frozen model is spread"),
        (("--gradient_checkpointing", "yes"), "--shard_base yes and --gradient_checkpointing yes do not go together"),
    ],
)
def test_what_does_not_go_with_it(flags, message, tmp_path):
    for program in TREES:
        done = run_command(program, "--demo", "yes", "--shard_base", "yes", "--output_dir", tmp_path / "run", *flags)
        assert done.returncode == 2
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("tree", [gpt2, seq2seq])
def test_the_library_says_so_too(tree, tmp_path):
    with pytest.raises(UserError, match="--shard_base yes needs several processes"):
        tree.train(tree.Settings(mode="webnlg", shard_base=True, output_dir=str(tmp_path)))
