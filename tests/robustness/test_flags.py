"""Every number on every command line at every bad value: refused in a line that names it, or meant to be taken."""

import dataclasses
from pathlib import Path

import pytest

import benchmark
import build_demo
import compare_peft
import prepare_data
import reproduce
import score
from gpt2 import flags as gpt2_flags
from gpt2 import run_generation, run_language_modeling, train_e2e
from prefixlib.runs.launch import Launch
from prefixlib.settings.flags import _kind
from prefixlib.system.errors import UserError
from seq2seq import finetune, train_bart
from seq2seq import flags as seq2seq_flags
from tests.conftest import ROOT
from tests.robustness.bad_inputs import ROWS

BAD = ("-1", "0", "-0.5", "nan", "inf", "-inf", "1e20", "1" + "0" * 20, "9" * 5000, "text", "")
# Clipping at 1e20 is no clipping; a rate of 1e20 is stopped in one line by the loss that it leads to.
NO_LIMIT = {"max_grad_norm", "learning_rate"}

# What 0 and -1 mean something for; everything else is refused at every value of BAD.
OFF_AT_0 = {"dropout", "warmup_steps", "weight_decay", "max_grad_norm", "seed", "eval_steps"}
GPT2 = {
    "-1": {"max_steps", "early_stopping_patience"},
    "0": OFF_AT_0 | {"save_steps", "objective_mode", "eval_batch_size", "context_samples", "matching_top_k"},
}
SEQ2SEQ = {
    "-1": {"max_steps", "n_train", "n_val", "n_test", "early_stopping_patience", "length_pen"},
    "0": OFF_AT_0
    | {"label_smoothing", "num_workers", "min_length", "no_repeat_ngram_size", "length_pen", "top_k", "temperature"},
    "-0.5": {"length_pen"},
}
NOT_TRAINED = {"0": SEQ2SEQ["0"] | {"max_steps", "top_layers"}}  # decoding has no use for these
OF_DECODING = {
    "-1": {"length_penalty"},
    "0": {"length_penalty", "seed", "top_k", "temperature"},
    "-0.5": {"length_penalty"},
}


def numbers(*kinds):
    return [field.name for kind in kinds for field in dataclasses.fields(kind) if _kind(field) in (int, float)]


def of_parser(parse, *fixed):
    return lambda flag, value: parse([*fixed, f"--{flag}={value}"])


def decode(flag, value):
    strategy = ["--strategy=nucleus"] if flag in ("top_p", "temperature", "samples") else []
    words = ["--mode=webnlg", "--split=test", "--checkpoint=x", *strategy, f"--{flag}={value}"]
    args = run_generation.make_parser().parse_args(words)
    gpt2_flags.Decoding.from_args(args).strategy_for(args.mode)


def launch(module, *more):
    return lambda flag, value: module.build_command(module.parse_args(["--mode=xsum", *more, f"--{flag}={value}"]))


MODE = ("--mode=xsum", "--output_dir=x")
DECODED = (*MODE, "--do_train=no", "--prefix_model_path=x")
PEFT = ("--model_name_or_path=x", "--train_file=x")
SCORE = ("e2e", "--hypotheses=x", "--references", "x")
PROGRAMS = {  # name -> how to parse a flag, the flags, what is taken
    "gpt2 training": (of_parser(run_language_modeling.parse, *MODE), numbers(gpt2_flags.Settings), GPT2),
    "gpt2 launcher": (launch(train_e2e), numbers(gpt2_flags.Settings, Launch), GPT2),
    "gpt2 decoding": (decode, numbers(gpt2_flags.Decoding), OF_DECODING),
    "seq2seq training": (of_parser(finetune.parse_args, *MODE), numbers(seq2seq_flags.Settings), SEQ2SEQ),
    "seq2seq launcher": (launch(train_bart), numbers(seq2seq_flags.Settings, Launch), SEQ2SEQ),
    "seq2seq decoding": (
        of_parser(finetune.parse_args, *DECODED),
        numbers(seq2seq_flags.Settings),
        SEQ2SEQ | NOT_TRAINED,
    ),
    "score": (of_parser(score.parse_args, *SCORE), ["bootstrap", "seed"], {"0": {"bootstrap", "seed"}}),
    "reproduce": (
        of_parser(reproduce.parse_args, "table1"),
        ["seeds", "samples", "max_steps", "num_processes", "budget_examples", "test_sources"],
        {},
    ),
    "prepare_data": (of_parser(prepare_data.parse_args, "lowdata"), ["sizes", "samples"], {}),
    "compare_peft": (
        of_parser(compare_peft.parse_args, *PEFT),
        ["steps", "bsz", "preseqlen", "mid_dim", "learning_rate", "seed"],
        {"0": {"seed"}},
    ),
    "build_demo": (
        of_parser(build_demo.parse_args, "gpt2"),
        ["seed", "vocabulary", "width", "steps", "batch", "length", "learning_rate", "threads"],
        {"0": {"seed"}},
    ),
    "benchmark": (
        of_parser(benchmark.parse_args, "train-step", "--vs="),
        [
            *("rounds", "seed", "bsz", "source", "tokens", "preseqlen", "mid_dim", "batches", "sentences"),
            *("batch_size", "beams", "max_new_tokens", "alone", "allow_ties", "points", "accumulate", "prefixes"),
        ],
        {"0": {"seed", "alone", "allow_ties"}},
    ),
}


def meant(program, value):
    """The flags that take this value and do something with it."""
    _, flags, wanted = PROGRAMS[program]
    return NO_LIMIT & set(flags) if value in ("1e20", "1" + "0" * 20) else wanted.get(value, set())


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_number_at_every_bad_value(program, capsys):
    parse, flags, _ = PROGRAMS[program]
    assert flags
    for value in BAD:
        taken = set()
        for flag in flags:
            try:
                parse(flag, value)
                taken.add(flag)
            except UserError as error:
                said = f"{error}\n"
            except SystemExit:  # argparse's own refusal
                said = capsys.readouterr().err
            if flag not in taken:
                assert f"--{flag}" in said, (flag, value, said)
                assert said.count("\n") == 1, said
        assert taken == meant(program, value), value


def test_the_walk_sees_every_number_of_every_script():
    """A number that is added without a bound, by argparse's own `type=int`, shows here."""
    folder = Path(score.__file__).parent
    for path in folder.rglob("*.py"):
        text = path.read_text()
        assert "type=int" not in text, path
        assert "type=float" not in text, path
        program = PROGRAMS.get(path.stem)
        added = text.count("add_number(")
        assert added == (len(program[1]) if program else 0), path
    assert sum(len(flags) for _, flags, _ in PROGRAMS.values()) == 225


def test_the_readme_says_how_many_are_walked():
    refused = sum(len(PROGRAMS[p][1]) - len(meant(p, value)) for p in PROGRAMS for value in BAD)
    files = sum(len(row.trees) for row in ROWS)
    assert f"{files + refused:,} bad inputs" in (ROOT / "README.md").read_text()
