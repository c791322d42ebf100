"""Checkpoints with odd values: one line that names file, field, value and what is expected, in both trees."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import gpt2
import seq2seq
from gpt2 import resuming
from prefixlib.checkpoints.checkpoint import CONFIG, FLAT, NETWORK, TASK, _sha256
from prefixlib.system.errors import UserError
from scripts import export
from tests.conftest import ROOT

DEMO = ROOT / "data" / "demo"
TREES = {"gpt2": (gpt2, "webnlg", "gpt2"), "seq2seq": (seq2seq, "xsum", "bart")}


def train(tree, output, **more):
    package, mode, base = TREES[tree]
    brief = {"max_steps": 1, "bsz": 4, "disable_tqdm": True}
    brief |= {"skip_decode": True} if tree == "gpt2" else {"n_val": 2, "num_workers": 0, "n_train": 8}
    where = {"model_name_or_path": str(DEMO / base), "data_dir": str(DEMO), "output_dir": str(output)}
    return package.train(package.Settings(mode=mode, **{**where, **brief, **more}))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a prefix and of adapters, and of prefix and model together, of each tree."""
    root = tmp_path_factory.mktemp("trained")
    for tree in TREES:
        train(tree, root / tree, preseqlen=3, mid_dim=8)
        train(tree, root / f"{tree} adapters", tuning_mode="adaptertune", adapter_bottleneck=4)
        train(tree, root / f"{tree} both", tuning_mode="bothtune", preseqlen=3, mid_dim=8)
    return root


@pytest.fixture(params=TREES)
def tree(request):
    return request.param


def spoil(directory, name, change):
    """Change an array of a checkpoint, whose config then describes the changed file."""
    path = directory / name
    arrays = load_file(path)
    first = sorted(arrays)[0]
    arrays[first] = change(arrays[first])
    save_file(arrays, path)
    if (directory / CONFIG).is_file() and name in (NETWORK, FLAT):
        config = json.loads((directory / CONFIG).read_text())
        config["files"][name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        (directory / CONFIG).write_text(json.dumps(config))
    return first


def with_value(value):
    def change(array):
        array = array.clone()
        array.view(-1)[-1] = value
        return array

    return change


ODD_ARRAYS = {
    "NaN": (with_value(float("nan")), "holds NaN or infinity, not finite numbers"),
    "infinity": (with_value(float("-inf")), "holds NaN or infinity, not finite numbers"),
    "int64": (lambda array: array.long(), "holds int64, not floating-point numbers"),
}


def refusal(work, *words):
    with pytest.raises(UserError) as caught:
        work()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("kind", ODD_ARRAYS)
@pytest.mark.parametrize("name", [NETWORK, FLAT])
def test_numbers_that_are_none_are_refused_by_every_reader(trained, tree, tmp_path, name, kind):
    package, mode, _ = TREES[tree]
    folder = shutil.copytree(trained / tree, tmp_path / "checkpoint")
    change, words = ODD_ARRAYS[kind]
    array = spoil(folder, name, change)
    for reader in (
        lambda: package.load(folder, mode=mode),
        lambda: package.load_mixed({"one": folder}),
        lambda: export.main([str(folder), "--to", "kv", "--output_dir", str(tmp_path / "out")]),
        lambda: train(tree, tmp_path / "new", preseqlen=3, mid_dim=8, prefix_model_path=str(folder)),
    ):
        refusal(reader, f"{name}: its array {array} {words}")


def test_tuned_weights_of_nan_are_refused(trained, tree, tmp_path):
    package, _, _ = TREES[tree]
    adapters = shutil.copytree(trained / f"{tree} adapters", tmp_path / "adapters")
    spoil(adapters, "model.safetensors", with_value(float("nan")))
    refusal(lambda: package.load(adapters), f"{adapters}: its array ", "holds NaN or infinity")
    both = shutil.copytree(trained / f"{tree} both", tmp_path / "both")
    spoil(both / "model", "model.safetensors", with_value(float("inf")))
    refusal(lambda: package.load(both), "its array ", "holds NaN or infinity")
    whole = shutil.copytree(trained / f"{tree} adapters", tmp_path / "whole")
    spoil(whole, "model.safetensors", lambda array: array.long())
    refusal(lambda: package.load(whole), "model.safetensors: its array ", "holds I64, not floating-point numbers")


def set_in(path, value):
    """A change of a config: the value at a path of keys."""

    def change(config):
        *outer, last = path.split(".")
        for key in outer:
            config = config[key]
        config[last] = value

    return change


GGUF = {"file": "x.gguf", "sha256": "../../etc"}
ODD_FIELDS = [
    ("prefix", None, "prefix is None, not an object in braces"),
    ("prefix", [1], "prefix is [1], not an object in braces"),
    ("prefix.preseqlen", "5", "prefix.preseqlen is '5', not a whole number"),
    ("prefix.preseqlen", -5, "prefix.preseqlen is -5, not at least 0 and below 2147483648"),
    ("prefix.prefix_dropout", 1.5, "prefix.prefix_dropout is 1.5, not at least 0 and below 1"),
    ("prefix.init_shallow", None, "prefix.init_shallow is None, not true or false"),
    ("task", "x", "task is 'x', not an object in braces"),
    ("task.mode", 7, "task.mode is 7, not a text or null"),
    ("task.tuning_mode", "magic", "task.tuning_mode is 'magic', not one of prefixtune"),
    ("task.source_template", 5, "task.source_template is 5, not a text or null"),
    ("task.source_template", "no slot", "task.source_template is 'no slot', not a text that holds {source} once"),
    ("task.source_column", ["a"], "task.source_column is ['a'], not a text or null"),
    ("task.chat", "yes", "task.chat is 'yes', not true or false"),
    ("task.data", {"train": 5}, "task.data['train'] is 5, not a list"),
    ("task.earlier_schedules", 5, "task.earlier_schedules is 5, not a list"),
    ("task.max_source_length", 0, "task.max_source_length is 0, not at least 1"),
    ("base_model.gguf", {}, "base_model.gguf: no file, sha256"),
    ("base_model.gguf", {"file": 5, "sha256": "a"}, "base_model.gguf.file is 5, not a text"),
    ("base_model.gguf", GGUF, "base_model.gguf.sha256 is '../../etc', not 64 hexadecimal digits"),
    ("base_model.quantization", "3bit", "base_model.quantization is '3bit', not one of no, 4bit"),
    ("base_model.fingerprint", {"model": 5}, "base_model.fingerprint['model'] is 5, not a text"),
    ("files", None, "files is None, not an object in braces"),
]


@pytest.mark.parametrize(("field", "value", "words"), ODD_FIELDS)
def test_odd_fields_are_named(trained, tree, tmp_path, field, value, words):
    package, mode, _ = TREES[tree]
    folder = shutil.copytree(trained / tree, tmp_path / "checkpoint", ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((folder / CONFIG).read_text())
    set_in(field, value)(config)
    (folder / CONFIG).write_text(json.dumps(config))
    for reader in (lambda: package.load(folder, mode=mode), lambda: package.load_mixed({"one": folder})):
        refusal(reader, str(folder / CONFIG), words)


def test_odd_fields_of_a_tuned_model_are_named(trained, tree, tmp_path):
    package, _, _ = TREES[tree]
    folder = shutil.copytree(trained / f"{tree} adapters", tmp_path / "adapters")
    saved = json.loads((folder / TASK).read_text())
    for field, value, words in ODD_FIELDS:
        if field.startswith("task."):
            odd = json.loads(json.dumps(saved))
            set_in(field, value)(odd)
            (folder / TASK).write_text(json.dumps(odd))
            refusal(lambda: package.load(folder), str(folder / TASK), words)


class Forbidden:
    """Unpickled by a loader that runs code, it would leave a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("kind", ["forbidden", "a list", "empty"])
def test_a_state_of_the_loop_that_is_none_is_one_line_and_runs_nothing(trained, tmp_path, name, kind):
    output = shutil.copytree(trained / "gpt2", tmp_path / "run")
    (last,) = output.glob("checkpoint-*")
    value = {"forbidden": Forbidden(tmp_path / "ran"), "a list": [1], "empty": {}}[kind]
    torch.save(value, last / name)
    if (kind, name) == ("empty", "scheduler.pt"):  # any object in braces will do
        resuming.check_resumable(last)
        return
    resume = {"preseqlen": 3, "mid_dim": 8, "max_steps": 2, "resume": True}
    refusal(
        lambda: train("gpt2", output, **resume), f"{last / name} is damaged", "remove checkpoint-1, and --resume yes"
    )
    assert not (tmp_path / "ran").exists()


OTHER = {"gpt2": "xsum_news", "seq2seq": "sentiment"}


def test_a_task_of_the_other_tree_is_refused_with_those_of_this_one(trained, tree, tmp_path):
    package, mode, _ = TREES[tree]
    folder = shutil.copytree(trained / tree, tmp_path / "checkpoint")
    words = f"--mode {OTHER[tree]}: not a task of {tree}/; one of ", mode
    refusal(lambda: package.load(folder, mode=OTHER[tree]), *words)
    mixed = package.load_mixed({"one": folder})
    config = json.loads((folder / CONFIG).read_text())
    config["task"]["mode"] = None
    (folder / CONFIG).write_text(json.dumps(config))
    refusal(lambda: mixed.add("two", folder, mode=OTHER[tree]), *words)
    config["task"]["mode"] = OTHER[tree]
    (folder / CONFIG).write_text(json.dumps(config))
    refusal(lambda: package.load(folder), str(folder), *words)
    adapters = shutil.copytree(trained / f"{tree} adapters", tmp_path / "adapters")
    saved = json.loads((adapters / TASK).read_text())
    saved["task"]["mode"] = OTHER[tree]
    (adapters / TASK).write_text(json.dumps(saved))
    refusal(lambda: package.load(adapters), str(adapters), *words)


def test_prefix_and_model_saved_again_keep_the_name_of_their_base(trained, tree, tmp_path):
    package, _, base = TREES[tree]
    first = trained / f"{tree} both"
    for again in (tmp_path / "again", tmp_path / "and again"):
        package.load(first).save(again)
        config, task = (json.loads((again / name).read_text()) for name in (CONFIG, f"model/{TASK}"))
        assert config["base_model"]["name"] == "./model"
        assert config["task"]["tuned_from"] == task["task"]["base_model"]["name"] == str(DEMO / base)
        first = again
