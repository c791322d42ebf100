"""--config FILE: the same names as the flags; the command line wins; an earlier run's files can be fed back."""

import shlex

import pytest

import gpt2
from gpt2 import run_generation, run_language_modeling, train_e2e
from prefixlib.system.errors import UserError
from seq2seq import finetune, train_bart
from tests.cli.test_own_data import MODEL, write


def child_of(*words):
    """What the launcher of gpt2/ makes of a command line, as its child reads it."""
    return run_language_modeling.parse(train_e2e.build_command(train_e2e.parse_args(list(words)))[2:])


YAML = """\
mode: webnlg
learning_rate: 1e-4
bsz: 7
bf16: yes
cache_dir: "-a b"
init_text: null
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    return str(path)


def test_a_file_is_a_command_line_that_the_command_line_wins_over(config):
    given = ["--mode=webnlg", "--learning_rate=1e-4", "--bsz=7", "--bf16=yes", "--cache_dir=-a b"]
    assert child_of("--config", config) == child_of(*given)
    assert child_of("--bsz", "3", f"--config={config}") == child_of(*given, "--bsz", "3")
    words = train_bart.build_command(train_bart.parse_args(["--config", config, "--mode", "e2e"]))[2:]
    settings, _ = finetune.parse_args(words)
    assert (settings.mode, settings.bsz, settings.bf16) == ("e2e", 7, True)


def test_the_demo_and_recipes_know_what_a_file_gives(tmp_path):
    (tmp_path / "a.yaml").write_text("demo: yes\nepoch: 2\n")
    child = child_of("--config", str(tmp_path / "a.yaml"))
    assert (child.mode, child.epoch, child.bsz) == ("webnlg", 2, 16)


def test_lists_are_flags_given_several_times(tmp_path):
    (tmp_path / "a.yaml").write_text('stop: ["\\n", END]\nstrategy: greedy\n')
    words = ["--mode", "text", "--split", "test", "--checkpoint", "x", "--config", str(tmp_path / "a.yaml")]
    args = run_generation.make_parser().parse_args(words)
    assert (args.stop, args.strategy) == (("\n", "END"), "greedy")
    assert run_generation.make_parser().parse_args([*words, "--stop", "x"]).stop == ("x",)


def test_an_earlier_run_is_fed_back(tmp_path):
    rows = [{"source": "a", "target": "b"}] * 4
    files = {f"{name}_file": str(write(tmp_path / f"{name}.jsonl", rows)) for name in ("train", "eval")}
    words = [f"--{name}={value}" for name, value in files.items()]
    words += ["--mode", "text", "--source_template", "Say {source}\n", "--model_name_or_path", str(MODEL)]
    words += ["--preseqlen", "3", "--mid_dim", "8", "--max_steps", "1", "--decode", "none", "--disable_tqdm", "yes"]
    output = tmp_path / "run"
    command = train_e2e.build_command(train_e2e.parse_args([*words, "--output_dir", str(output)]))
    first = run_language_modeling.parse(command[2:])
    gpt2.train(first)
    (output / "command.txt").write_text(shlex.join(command))
    for name in ("command.txt", "results.json"):
        again = child_of("--config", str(output / name), "--output_dir", str(output))
        assert again == first, name


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.yaml", None, "--config .*none.yaml: no such file"),
        ("a.yaml", "learning_rat: 1", "a.yaml: --learning_rat is not a flag here; did you mean --learning_rate?"),
        ("a.yaml", "- a\n- b\n", "a.yaml: expected flag names and values"),
        ("a.yaml", "a: [", "a.yaml: not YAML"),
        ("a.yaml", "bsz: {a: 1}", "a.yaml: bsz: expected a value, found {'a': 1}"),
        ("a.json", "[1]", "a.json is damaged"),
        ("a.txt", "python 'x", "a.txt: not a command line"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        train_e2e.parse_args(["--config", str(tmp_path / name)])
    assert "\n" not in str(error.value)
