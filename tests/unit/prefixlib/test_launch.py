"""Launching and names: values travel unharmed, contradictions are refused, a bare model name is not our own folder."""

import json
import re
import shlex
import sys

import pytest

from gpt2 import train_e2e
from gpt2.flags import Settings
from prefixlib.base_model.load import load_model, load_tokenizer, resolve_model_name
from prefixlib.data.tasks import GPT2_MODES, TASKS
from prefixlib.methods.table import METHODS
from prefixlib.runs.launch import as_words, child_command, make_parser
from prefixlib.settings.flags import RARE, Parser, explicit_flags
from prefixlib.system.errors import UserError, first_line, one_line_errors
from tests.conftest import ROOT, run_command


def test_flags_from_values():
    values = {"notes": "a b; $(touch x) 'q' \"", "max_steps": -1, "cache_dir": None, "preseqlen": 5}
    assert as_words(values) == ["--notes", "a b; $(touch x) 'q' \"", "--max_steps=-1", "--preseqlen", "5"]


def test_explicit_flags_tell_given_from_default():
    assert explicit_flags(make_parser("", Settings), ["--bsz", "10", "--gradient_accumulation_step", "3"]) == {
        "bsz",
        "gradient_accumulation_steps",
    }


def test_several_processes_go_through_torchrun():
    command = child_command(ROOT / "x.py", ["--a", "1"], num_processes=2)
    assert command[1:5] == ["-m", "prefixlib.system.processes", "--standalone", "--nproc_per_node"]
    assert command[5:] == ["2", str(ROOT / "x.py"), "--a", "1"]
    with pytest.raises(UserError, match="--num_processes 0"):
        child_command(ROOT / "x.py", [], num_processes=0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prefix_mode", "embedding", "--format_mode", "infix"], "--prefix_mode embedding and --format_mode do not"),
        (["--prefix_mode", "embedding", "--optim_prefix", "no"], "--optim_prefix no and --prefix_mode do not"),
        (["--prefix_mode", "embedding", "--init_shallow", "yes"], "--prefix_mode embedding and --init_shallow do not"),
        (["--format_mode", "infix", "--optim_prefix", "no"], "--optim_prefix no and --format_mode infix do not"),
        (["--optim_prefix", "no", "--init_text", "a"], "--optim_prefix no and --init_text do not"),
        (["--optim_prefix", "no", "--init_shallow", "yes"], "--optim_prefix no and --init_shallow do not"),
        (["--init_text", "a", "--use_lowdata_token", "yes"], "--init_text and --use_lowdata_token do not"),
        (["--init_text", "a", "--prefix_model_path", "x"], "--prefix_model_path and --init_text do not"),
        (["--init_shallow", "yes", "--use_deep", "yes"], "--init_shallow yes and --use_deep do not"),
        (["--mode", "topic", "--max_source_length", "9"], "--mode topic and --max_source_length do not go together"),
        (["--mode", "xsum", "--val_max_target_length", "0"], "--val_max_target_length 0: must be at least 1"),
        (["--distill", "yes"], "--distill yes needs --finetuned_model_path"),
        (["--finetuned_model_path", "x"], "--distill no and --finetuned_model_path do not go together"),
        (["--matching_positions", "text"], "--distill no and --matching_positions do not go together"),
        (["--use_custom_teacher_dropout", "yes"], "--tuning_mode prefixtune and --use_custom_teacher_dropout do not"),
        (["--bf16", "yes", "--fp16", "yes"], "--bf16 yes and --fp16 yes do not go together"),
        (["--resume", "yes", "--overwrite_output_dir", "yes"], "--resume yes and --overwrite_output_dir yes do not"),
        (["--resume", "yes", "--prefix_model_path", "x"], "--resume yes and --prefix_model_path do not"),
        (["--train_file", "x"], "--train_file needs --eval_file"),
        (["--preseqlen", "0"], "--preseqlen 0: must be above 0"),
        (["--learning_rate", "-1"], "--learning_rate -1.0: must be above 0"),
        (["--dropout", "1"], "--dropout 1.0: must be at least 0 and below 1"),
        (["--tuning_mode", "finetune", "--dropout", "0.1"], "--tuning_mode finetune and --dropout do not"),
        (["--tuning_mode", "finetune", "--objective_mode", "3"], "--tuning_mode finetune and --objective_mode do not"),
        (["--demo", "yes", "--data_dir", "x"], "--demo yes and --data_dir do not go together"),
        (["--bsz", "5", "--num_processes", "2"], "--bsz 5 cannot be shared by --num_processes 2"),
        (["--num_processes", "0"], "--num_processes 0: at least 1 process is needed"),
        (["--notes", "a/b"], "--notes 'a/b': becomes part of a folder's name"),
    ],
)
def test_what_makes_no_sense_is_refused(argv, message):
    with pytest.raises(UserError, match=message) as error:
        train_e2e.build_command(train_e2e.parse_args(argv))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "more", [["--init_shallow", "yes"], ["--prefix_mode", "embedding", "--parametrize_emb", "Emb"]]
)
def test_the_demo_trains_without_a_network_too(more):
    """It fills in the width of the network only where there is one."""
    assert train_e2e.parse_args(["--demo", "yes"]).settings.mid_dim == 256
    assert train_e2e.parse_args(["--demo", "yes", *more]).settings.mid_dim == 512


def folder(line):
    return train_e2e.output_dir(train_e2e.parse_args(shlex.split(line))).name


def test_short_names():
    """Another setting, another folder; where files lie, what is written and how long it lasts do not count."""
    name = folder("--mode webnlg --notes mine --bsz 5 --train_file a/t.txt --eval_file a/d.txt")
    assert re.fullmatch(r"webnlg-prefixtune-mine-s101-[0-9a-f]{6}", name)
    line = "--mode webnlg --notes mine --bsz 5 --train_file b/t.txt --eval_file b/d.txt"
    same = ("--epoch 9", "--max_steps 7", "--logging_steps 3", "--data_dir x", "--resume yes", "--seed 101")
    assert {folder(f"{line} {more}") for more in same} == {name}
    others = ("--bsz 6", "--seed 3", "--learning_rate 1e-3", "--use_deep yes", "--train_file b/other.txt", "--bf16 yes")
    found = [folder(f"{line} {more}") for more in others]
    assert len({name, *found}) == 1 + len(others)


LAUNCHERS = ("gpt2/train_e2e.py", "seq2seq/train_bart.py", "gpt2/run_generation.py")


@pytest.mark.parametrize("program", [*LAUNCHERS, "scripts/score.py", "scripts/export.py", "scripts/reproduce.py"])
def test_help_says_a_default_once_and_rare_flags_last(program):
    text = run_command(program, "--help", cwd=ROOT).stdout
    assert "default: None" not in text
    assert "(default: " in text
    assert all(part.count("(default") <= 1 for part in re.split(r"\n  --|\n\n", text))
    if program in LAUNCHERS:
        assert "[--FLAG VALUE ...]" in text
        rare = text.index(f"\n{RARE}:")
        assert text.index("\n  --cache_dir") > rare > text.index("\n  --seed N")


def test_the_name_of_the_original():
    printed = "--optim_prefix yes --preseqlen 5 --epoch 5 --learning_rate 0.00005 --mode webnlg --bsz 5 --seed 101"
    argv = shlex.split(printed)
    assert train_e2e.parse_args(argv).settings.long_name(None) == (
        "webnlgprefixtune_y_5_act_cat_b=5-e=5_d=0.0_u=no_lr=5e-05_w=0.0_s=101_r=n_m=512_o=1"
    )


@pytest.mark.parametrize(
    ("argv", "end"),
    [
        (["--tuning_mode", "finetune"], "_m=512_uctd=no_o=1"),
        (
            ["--tuning_mode", "finetune", "--use_custom_teacher_dropout", "yes", "--notes", "x"],
            "_m=512_x_uctd=yes_o=1",
        ),
        (
            ["--distill", "yes", "--finetuned_model_path", "x", "--matching_objective", "logits"],
            "_m=512_o=1_distill_o=logits",
        ),
    ],
)
def test_the_labels_of_teachers_and_students(argv, end):
    parsed = train_e2e.parse_args(argv)
    assert parsed.settings.long_name(parsed.launch.notes).endswith(end)


def test_every_task_has_a_folder_and_a_way_to_decode():
    rows = [TASKS[mode].gpt2 for mode in GPT2_MODES]
    assert [row.strategy for row in rows] == ["beam"] * 5 + ["nucleus"] * 3 + ["greedy"] * 2 + ["beam"]
    assert all(row.folder.endswith("models") or row.folder == "save_e2e_models_convcheck" for row in rows)
    assert len(rows) == 11


@pytest.mark.parametrize(
    ("notes", "model"),
    [
        (None, "gpt2-medium"),
        ("tryLarge", "gpt2-medium"),
        ("enlarged", "gpt2-medium"),
        ("large-1", "gpt2-large"),
        ("x_large", "gpt2-large"),
    ],
)
def test_base_model_by_notes(notes, model):
    command = train_e2e.build_command(train_e2e.parse_args(["--notes", notes] if notes else []))
    assert command[command.index("--model_name_or_path") + 1] == model


@pytest.mark.parametrize("mode", GPT2_MODES)
@pytest.mark.parametrize("tuning_mode", METHODS)
def test_the_child_understands_every_command_line(mode, tuning_mode):
    """Launcher argv -> child's parser -> the same values, for every mode and tuning mode."""
    odd = "a b; $(x) '\""
    launched = train_e2e.parse_args(
        ["--mode", mode, "--tuning_mode", tuning_mode, "--cache_dir", odd, "--output_dir", odd]
    )
    command = train_e2e.build_command(launched)
    assert command[:2] == [sys.executable, str(ROOT / "gpt2" / "run_language_modeling.py")]
    child = Parser()
    Settings.add_to(child)
    parsed = Settings.from_args(child.parse_args(command[2:]))
    parsed.check()
    for name, value in vars(parsed).items():
        expected = {"output_dir": str(train_e2e.output_dir(launched)), "model_name_or_path": "gpt2-medium"}
        assert value == expected.get(name, getattr(launched.settings, name)), name
    assert len(vars(parsed)) == 77


def test_a_bare_name_is_the_hub_model_not_our_folder(monkeypatch, tmp_path):
    for folder in (ROOT, ROOT / "gpt2", tmp_path):
        monkeypatch.chdir(folder)
        assert resolve_model_name("gpt2") == "openai-community/gpt2"
        assert resolve_model_name("gpt2-medium") == "openai-community/gpt2-medium"
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text("{}")
    assert resolve_model_name("gpt2") == str(tmp_path / "gpt2")
    assert resolve_model_name("some-org/some-model") == "some-org/some-model"


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "~/nowhere", "a/b/c", "data"])
def test_a_path_without_a_model_is_refused(monkeypatch, name):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="no model folder there"):
        resolve_model_name(name)


def test_an_unreachable_hub_is_one_line(tmp_path):
    for load in (load_tokenizer, lambda name, **kw: load_model(name, "decoder-only", **kw)):
        with pytest.raises(
            UserError, match=r"cannot load no-one/nothing from the hub .*--model_name_or_path DIR"
        ) as error:
            load("no-one/nothing", cache_dir=str(tmp_path))
        assert "\n" not in str(error.value)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match=r"cannot load .*: no tokenizer is in the folder; copy .* \(tokenizer.json"):
        load_tokenizer(str(tmp_path))


def test_the_first_line_of_an_error_does_not_end_in_a_colon():
    error = ValueError("cannot be made from one of:\n (1) a file\n (2) an instance")
    assert first_line(error) == "cannot be made from one of: (1) a file (2) an instance"
    assert first_line(ValueError("one line\nand more")) == "one line"


def test_a_model_of_the_other_family_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bart", "is_encoder_decoder": True}))
    with pytest.raises(UserError, match=r"is an encoder-decoder model .bart.; one of the kind decoder-only is needed"):
        load_model(str(tmp_path), "decoder-only")


def test_a_programming_error_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a bug"), one_line_errors():
        raise RuntimeError("a bug")


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (UserError("--bsz 0: must be above 0"), 2, "error: --bsz 0: must be above 0"),
        (OSError(28, "No space left on device", "out/x"), 1, "error: No space left on device: out/x"),
        (RuntimeError("Error while serializing: I/O error (os error 28)"), 1, "error: No space left on device"),
        (
            RuntimeError("PytorchStreamWriter failed writing file x"),
            1,
            "error: a file could not be written; is the disk full?",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(capsys, raised, code, line):
    with pytest.raises(SystemExit) as exit_, one_line_errors():
        raise raised
    assert exit_.value.code == code
    assert capsys.readouterr().err == line + "\n"
