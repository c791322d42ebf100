"""Base models and checkpoints that are not what they seem: refused in one line, in both trees, before any work."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import gpt2
import seq2seq
from gpt2 import train_e2e
from prefixlib.checkpoints.checkpoint import CONFIG, FLAT, NETWORK, _sha256
from prefixlib.data.tasks import GPT2_MODES, TASKS
from prefixlib.system import files
from prefixlib.system.errors import UserError
from tests.conftest import ROOT, run_command

DEMO = ROOT / "data" / "demo"
TREES = {"gpt2": (gpt2, "webnlg", "gpt2"), "seq2seq": (seq2seq, "xsum", "bart")}


def settings_of(tree, output, **more):
    package, mode, base = TREES[tree]
    brief = {"max_steps": 1, "bsz": 4, "preseqlen": 3, "mid_dim": 8, "disable_tqdm": True}
    brief |= {"skip_decode": True} if tree == "gpt2" else {"n_val": 2, "num_workers": 0, "n_train": 8}
    where = {"model_name_or_path": str(DEMO / base), "data_dir": str(DEMO), "output_dir": str(output)}
    return package.Settings(mode=mode, **{**where, **brief, **more})


@pytest.fixture(params=TREES)
def tree(request):
    return request.param


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A prefix checkpoint of each tree."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, (package, _, _) in TREES.items():
        package.train(settings_of(name, root / name))
    return root


@pytest.fixture
def checkpoint(checkpoints, tree, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(checkpoints / tree, tmp_path / "checkpoint")


@pytest.fixture
def base(tree, tmp_path):
    """A copy of the base model to spoil."""
    return shutil.copytree(DEMO / TREES[tree][2], tmp_path / "base")


def refusal(work, *words):
    with pytest.raises(UserError) as error:
        work()
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


# ---- base models -------------------------------------------------------------------------------------------------


def test_code_in_a_model_folder_never_runs(tree, base, tmp_path):
    """transformers would ask on standard input; `y` must not reach it."""
    ran = tmp_path / "ran"
    (base / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Config: pass\n")
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Config", "AutoModelForSeq2SeqLM": "evil.Config"}
    (base / "config.json").write_text(json.dumps({"model_type": "unheard-of", "auto_map": auto}))
    _, mode, _ = TREES[tree]
    script = "gpt2/run_language_modeling.py" if tree == "gpt2" else "seq2seq/finetune.py"
    where = ["--mode", mode, "--data_dir", DEMO, "--model_name_or_path", base, "--output_dir", tmp_path / "out"]
    result = run_command(script, *where, input="y\ny\ny\n")
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error: cannot load")
    assert not ran.exists()


def test_a_folder_without_its_tokenizer(tree, base, tmp_path):
    for path in base.iterdir():
        if path.name not in ("config.json", "model.safetensors", "generation_config.json"):
            path.unlink()
    package = TREES[tree][0]
    with pytest.raises(UserError) as error:
        package.train(settings_of(tree, tmp_path / "out", model_name_or_path=str(base)))
    assert "tokenizer" in str(error.value)
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize("fault", ["other names", "a layer absent"])
def test_weights_that_do_not_load(tree, base, tmp_path, fault):
    tensors = load_file(base / "model.safetensors")
    if fault == "other names":
        tensors = {f"odd.{name}": tensor for name, tensor in tensors.items()}
    else:
        tensors = {name: tensor for name, tensor in tensors.items() if ".1." not in name}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    work = lambda: TREES[tree][0].train(settings_of(tree, tmp_path / "out", model_name_or_path=str(base)))  # noqa: E731
    refusal(work, "its weights do not fit its config.json", "arrays")


@pytest.mark.parametrize("which", [0, 7, None], ids=["one array", "another array", "every array"])
def test_another_base_of_the_same_shape(tree, checkpoint, base, which):
    package, tensors = TREES[tree][0], load_file(base / "model.safetensors")
    for name in tensors if which is None else [sorted(name for name in tensors if "fc" in name)[which]]:
        tensors[name] = tensors[name] + 0.01
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    refusal(
        lambda: package.load(checkpoint, model_name_or_path=str(base)),
        *(str(DEMO / TREES[tree][2]), str(base), "other weights", "--allow_other_base yes"),
    )
    package.load(checkpoint, model_name_or_path=str(base), allow_other_base=True)


def test_the_same_base_in_another_precision_is_the_same(tree, checkpoint):
    TREES[tree][0].load(checkpoint, dtype=torch.bfloat16)


# ---- checkpoints -------------------------------------------------------------------------------------------------


def mend_hashes(folder):
    """Make prefix_config.json describe the spoilt files, so that their hashes fit."""
    config = json.loads((folder / CONFIG).read_text())
    for name in (NETWORK, FLAT):
        config["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
    files.write_json(folder / CONFIG, config)


@pytest.mark.parametrize("fault", ["another P", "other names", "empty"])
@pytest.mark.parametrize("name", [NETWORK, FLAT])
def test_tensors_that_are_not_what_the_settings_promise(tree, checkpoint, name, fault):
    tensors = load_file(checkpoint / name)
    if fault == "another P":
        tensors = {key: tensor[:-1].contiguous() for key, tensor in tensors.items()}
    else:
        tensors = {} if fault == "empty" else {f"odd.{key}": tensor for key, tensor in tensors.items()}
    save_file(tensors, checkpoint / name)
    mend_hashes(checkpoint)
    refusal(lambda: TREES[tree][0].load(checkpoint), name, "does not fit its prefix_config.json")


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ({}, "its prefix settings are damaged (prefix: no "),
        ([], "prefix is [], not an object in braces"),
        ({"preseqlen": 4}, "does not fit"),
        ({"preseqlen": None}, "preseqlen is None"),
        ({"preseqlen": "3"}, "preseqlen is '3'"),
        ({"preseqlen": -3}, "preseqlen is -3"),
        ({"mid_dim": True}, "mid_dim is True"),
        ({"prefix_dropout": "none"}, "prefix_dropout is 'none'"),
        ({"surprise": 1}, "settings are not known here"),
    ],
)
def test_settings_of_odd_values(tree, checkpoint, prefix, words):
    config = json.loads((checkpoint / CONFIG).read_text())
    config["prefix"] = {**config["prefix"], **prefix} if prefix else prefix
    files.write_json(checkpoint / CONFIG, config)
    refusal(lambda: TREES[tree][0].load(checkpoint), words)


# ---- what launchers fill in --------------------------------------------------------------------------------------


def test_the_papers_recipe_and_flags_beside_it():
    settings = train_e2e.parse_args(["--mode", "webnlg", "--recipe", "paper"]).settings
    chosen = settings.learning_rate, settings.epoch, settings.bsz, settings.preseqlen
    assert chosen == (5e-5, 5, 5, 5)  # the paper's Table 6
    tuned = train_e2e.parse_args(["--mode", "webnlg", "--recipe", "paper", "--tuning_mode", "finetune"]).settings
    assert (tuned.learning_rate, tuned.epoch, tuned.bsz) == (1e-5, 10, 6)
    given = train_e2e.parse_args(["--mode", "triples", "--recipe", "paper", "--epoch", "2"]).settings
    assert (given.epoch, given.preseqlen, given.learning_rate) == (2, 10, 5e-5)
    with pytest.raises(UserError, match="--recipe paper: the paper has no settings for --mode topic"):
        train_e2e.parse_args(["--mode", "topic", "--recipe", "paper"])
    assert [mode for mode in GPT2_MODES if TASKS[mode].paper.get("gpt2")] == ["data2text", "webnlg", "triples"]


def test_a_misspelt_flag_gets_a_guess(capsys):
    with pytest.raises(SystemExit):
        train_e2e.parse_args(["--preseqlne", "5"])
    assert "did you mean --preseqlen?" in capsys.readouterr().err
