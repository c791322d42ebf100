"""train_bart.py and train_e2e.py: the original's commands, what the child gets, what is refused."""

import dataclasses
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from prefixlib.data.tasks import SEQ2SEQ_MODES
from prefixlib.methods.table import METHODS
from prefixlib.system.errors import UserError
from seq2seq import finetune, train_bart, train_e2e
from seq2seq.flags import Settings
from tests.conftest import ROOT, run_command
from tests.seq2seq_tiny import make_bart, make_summaries, training_flags

SCRIPTS = {"train_bart.py": SEQ2SEQ_MODES, "train_e2e.py": train_e2e.TABLE_MODES}
KINDS = {"train_bart.py": Settings, "train_e2e.py": train_e2e.TableSettings}
README_TRAIN = (
    "--mode xsum --preseqlen 200 --do_train yes --fp16 yes --bsz 16 --epoch 30 --gradient_accumulation_step 3 "
    "--learning_rate 0.00005 --mid_dim 800"
)
README_DECODE = "--mode xsum --do_train no --prefix_model_path CHECKPOINT --preseqlen 200 --mid_dim 800"
README_TABLE = "--tuning_mode finetune --epoch 5 --learning_rate 0.00005 --mode webnlg --bsz 5 --seed 101"


def child_of(line, kind=Settings):
    """What the launcher makes of a command line: its settings, the child's, and the child's explicit ones."""
    parsed = train_bart.parse_args(shlex.split(line), kind=kind)
    command = train_bart.build_command(parsed)
    assert command[:2] == [sys.executable, str(ROOT / "seq2seq" / "finetune.py")]
    return parsed.settings, *finetune.parse_args(command[2:])


CASES = [(script, mode, tuning) for script, modes in SCRIPTS.items() for mode in modes for tuning in METHODS]


def test_every_mode_is_covered():
    assert len(CASES) == (8 + 3) * 5


@pytest.mark.parametrize(("script", "mode", "tuning"), CASES)
@pytest.mark.parametrize("more", ["", "--bsz 7 --epoch 2 --seed 3 --length_pen 0.8 --n_train 50 --resume yes"])
def test_the_child_understands_what_the_launcher_says(script, mode, tuning, more):
    line = f"--mode {mode} --tuning_mode {tuning} {more}"
    settings, child, _ = child_of(line, KINDS[script])
    assert dataclasses.asdict(child) == dataclasses.asdict(settings)
    assert (child.mode, child.tuning_mode, child.model_name_or_path) == (mode, tuning, "bart-large")
    assert (child.bsz, child.resume) == ((7, True) if more else (10, False))


def test_the_printed_training_command():
    _, child, _ = child_of(README_TRAIN)
    wanted = {"mode": "xsum", "preseqlen": 200, "do_train": True, "fp16": True, "bsz": 16, "epoch": 30}
    wanted |= {"gradient_accumulation_steps": 3, "learning_rate": 5e-5, "mid_dim": 800, "max_grad_norm": 0.0}
    assert {name: getattr(child, name) for name in wanted} == wanted
    name = "xsumprefixtune_y_200_act_cat_b=48-e=30_d=0.0_l=0.0_lr=5e-05_w=0.0_s=101_d=n_m=800"
    folder = ROOT / "seq2seq" / "xsum_models"
    assert child.output_dir == str(folder / child.short_name(None))
    assert child_of(f"{README_TRAIN} --long_names yes")[1].output_dir == str(folder / name)


def test_the_printed_decoding_command(tmp_path):
    """The child gets what was typed and no more: the rest is the checkpoint's."""
    settings, _, given = child_of(README_DECODE.replace("CHECKPOINT", str(tmp_path)))
    assert given == {"mode", "do_train", "prefix_model_path", "preseqlen", "mid_dim", "output_dir"}
    assert settings.output_dir == str(tmp_path)


def test_the_printed_table_command():
    _, child, _ = child_of(README_TABLE, train_e2e.TableSettings)
    assert (child.tuning_mode, child.mode, child.epoch, child.bsz, child.seed) == ("finetune", "webnlg", 5, 5, 101)
    assert Path(child.output_dir).parent == ROOT / "seq2seq" / "webnlg_models"


@pytest.mark.parametrize(
    ("script", "line"),
    [("train_bart.py", README_TRAIN), ("train_bart.py", README_DECODE), ("train_e2e.py", README_TABLE)],
)
def test_both_folders_say_the_same(script, line):
    """A dry run prints the child's command and makes nothing."""
    line = line.replace("CHECKPOINT", "/tmp/somewhere")
    inside = run_command(script, *shlex.split(line), "--dry_run", cwd=ROOT / "seq2seq")
    outside = run_command(f"seq2seq/{script}", *shlex.split(line), "--dry_run", cwd=ROOT)
    assert (inside.returncode, inside.stderr) == (0, "")
    assert inside.stdout == outside.stdout
    assert shlex.split(inside.stdout)[1] == str(ROOT / "seq2seq" / "finetune.py")


def test_a_checkpoint_that_is_not_there_is_not_made(tmp_path):
    done = run_command(
        "seq2seq/train_bart.py", *["--mode", "xsum", "--do_train", "no", "--prefix_model_path"], tmp_path / "x"
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: checkpoint {tmp_path / 'x'}: no such folder\n"
    assert not (tmp_path / "x").exists()


def test_launchers_import_nothing_heavy():
    code = "import sys, seq2seq.train_bart, seq2seq.train_e2e; print(*dir(seq2seq), *sys.modules)"
    loaded = set(run_command("-c", code).stdout.split())
    assert {"seq2seq.flags", "load", "train", "Settings"} <= loaded  # the API is named but not yet imported
    assert not loaded & {"torch", "transformers", "lightning", "numpy", "datasets"}


def test_demo_brings_its_own_model_and_data():
    _, child, _ = child_of("--demo yes")
    assert (child.mode, child.model_name_or_path) == ("xsum", str(ROOT / "data" / "demo" / "bart"))
    with pytest.raises(UserError, match="--demo yes and --model_name_or_path do not go together"):
        child_of("--demo yes --model_name_or_path bart-large")


REFUSED = {
    "--mode xsum --bf16 yes --fp16 yes": "--bf16 yes and --fp16 yes do not go together",
    "--mode xsum --do_train no": "pass --prefix_model_path or --finetune_model_path",
    "--mode xsum --do_train no --prefix_model_path a --finetune_model_path b": "one checkpoint at a time",
    "--mode xsum --do_train no --prefix_model_path a --resume yes": "--do_train no and --resume yes do not go together",
    "--mode xsum --do_train no --prefix_model_path a --num_processes 2": "decoding runs in one process",
    "--mode xsum --tuning_mode finetune --mid_dim 800": "--tuning_mode finetune and --mid_dim do not go together",
    "--mode xsum --tuning_mode finetune --use_cross_prefix no": "--tuning_mode finetune and --use_cross_prefix",
    "--mode xsum --tuning_mode bothtune --use_dropout no": "--tuning_mode bothtune and --use_dropout do not",
    "--mode xsum --top_layers 2": "--tuning_mode prefixtune and --top_layers do not go together",
    "--mode xsum --tuning_mode finetune-top --top_layers -1": "--top_layers -1: must be at least 0",
    "--mode xsum --tuning_mode adaptertune --adapter_bottleneck 0": "--adapter_bottleneck 0: must be above 0",
    "--mode xsum --init_shallow_word a": "--init_shallow no and --init_shallow_word do not go together",
    "--mode xsum --init_text a --use_lowdata_token yes": "--init_text and --use_lowdata_token do not go together",
    "--mode xsum --init_text a --prefix_model_path b": "--prefix_model_path and --init_text do not go together",
    "--mode xsum --tuning_mode finetune --init_text a": "--tuning_mode finetune and --init_text do not go together",
    "--mode xsum --lowdata_token a": "--use_lowdata_token no and --lowdata_token do not go together",
    "--mode xsum --init_shallow yes --mid_dim 800": "--init_shallow yes and --mid_dim do not go together",
    "--mode xsum --init_shallow yes --use_lowdata_token yes": "--init_shallow yes and --use_lowdata_token do not go",
    "--mode xsum --resume yes --overwrite_output_dir yes": "--resume yes and --overwrite_output_dir yes",
    "--mode xsum --resume yes --prefix_model_path a": "--resume yes and --prefix_model_path do not go together",
    "--mode xsum --finetune_model_path a": "to train on from it, --model_name_or_path DIR",
    "--mode xsum --train_file a.source": "--train_file needs --eval_file",
    "--mode xsum --preseqlen 0": "--preseqlen 0: must be above 0",
    "--mode xsum --dropout 1": "--dropout 1.0: must be at least 0 and below 1",
    "--mode xsum --label_smoothing -0.1": "--label_smoothing -0.1: must be at least 0 and below 1",
    "--mode xsum --max_source_length -5": "--max_source_length -5: must be at least 1",
    "--mode xsum --bsz 5 --num_processes 2": "--bsz 5 cannot be shared by --num_processes 2",
    "--mode xsum --notes a/b": "takes no '/'",
}


@pytest.mark.parametrize("line", REFUSED)
def test_refused(line):
    with pytest.raises(UserError) as refusal:
        child_of(line)
    assert REFUSED[line] in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--preseqlen 5", "the following arguments are required: --mode"),
        ("--mode nonsense", "argument --mode: invalid choice: 'nonsense'"),
        ("--mode xsum --optim_prefix no", "argument --optim_prefix: invalid choice: 'no'"),
        ("--mode xsum --presqlen 5", "unrecognized arguments: --presqlen 5"),
    ],
)
def test_wrong_flags_are_one_line(line, message):
    done = run_command("seq2seq/train_bart.py", *shlex.split(line))
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("seq2seq")
    make_bart(root / "bart")
    return root


def spoil(folder, what):
    source, target = folder / "train.source", folder / "train.target"
    if what == "missing":
        target.unlink()
    elif what == "unequal":
        target.write_text("".join(target.read_text().splitlines(keepends=True)[:-2]))
    elif what == "empty line":
        lines = source.read_text().splitlines()
        lines[6] = "  "
        source.write_text("\n".join(lines) + "\n")
    elif what == "empty file":
        source.write_text("")
    elif what == "not utf-8":
        source.write_bytes(source.read_bytes().replace(b"dog", b"d\xf6g", 1))


@pytest.mark.parametrize(
    ("what", "changes", "message"),
    [
        ("missing", {}, "train.target: no such file"),
        ("unequal", {}, "train.source has 23 lines and train.target has 21"),
        ("empty line", {}, "train.source:7: expected one document a line, found an empty line"),
        ("empty file", {}, "train.source: the file is empty"),
        ("not utf-8", {}, "train.source:2: not UTF-8 text"),
        ("", {"fp16": "yes"}, "--fp16 yes needs a GPU and there is none here: use --bf16 yes, or neither"),
        ("", {"max_source_length": 200}, "--max_source_length 200: the model has 128 positions"),
        ("", {"max_length": 300}, "--max_length 300: at least --min_length 2 and at most the model's 128 positions"),
        ("", {"model_name_or_path": "/nowhere"}, "--model_name_or_path /nowhere: no model folder there"),
        ("", {"prefix_model_path": "/nowhere"}, "checkpoint /nowhere: no such folder"),
        ("", {"init_shallow": "yes", "init_shallow_word": "", "mid_dim": None}, "the initial text has 0 tokens"),
    ],
)
def test_bad_input_is_named(place, tmp_path, monkeypatch, what, changes, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    data = make_summaries(tmp_path / "data")
    spoil(data, what)
    with pytest.raises(UserError) as refusal:
        finetune.main(training_flags(place / "bart", data, tmp_path / "out", **changes))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.cold
def test_ctrl_c_names_the_checkpoint(place, tmp_path):
    data = make_summaries(tmp_path / "data")
    flags_ = training_flags(place / "bart", data, tmp_path, epoch=500, save_steps=1)
    process = subprocess.Popen(
        [sys.executable, "seq2seq/finetune.py", *flags_], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.time() + 120
    while not (tmp_path / "resume.ckpt").is_file() and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert f"interrupted; --resume yes goes on from {tmp_path / 'resume.ckpt'}" in stderr
    assert stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in stderr


@pytest.mark.parametrize(("accumulated", "steps"), [(1, 6), (2, 3)])
def test_two_processes_equal_one(place, tmp_path, accumulated, steps):
    """21 examples in batches of 4 and 5 validation texts in twos: one of the processes ends with a filler each time.

    Same global batches, no dropout; the whole way from the launcher through torchrun and gloo.
    """
    still = make_bart(tmp_path / "still", dropout=0.0, attention_dropout=0.0)
    data = make_summaries(tmp_path / "data", train=21)
    outputs = [tmp_path / "one", tmp_path / "two"]
    settings = {"epoch": 1, "gradient_accumulation_steps": accumulated}
    finetune.main(training_flags(still, data, outputs[0], **settings))
    line = training_flags(still, data, outputs[1], **settings, eval_batch_size=1)
    done = run_command("seq2seq/train_bart.py", *line, "--num_processes=2")
    assert done.returncode == 0, done.stderr[-2000:]
    weights = [load_file(output / "prefix_model.safetensors") for output in outputs]
    results = [json.loads((output / "results.json").read_text())["training"] for output in outputs]
    for one, two in zip(results[0]["curves"]["train"], results[1]["curves"]["train"], strict=True):
        assert one[0] == two[0]
        assert one[1] == pytest.approx(two[1], rel=1e-5)
    assert len(results[0]["curves"]["train"]) == steps
    assert results[0]["last"] == pytest.approx(results[1]["last"], rel=1e-4)
    assert len(weights[0]) == 15
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).abs().max() < 1e-4
