"""Every tuning mode of gpt2/ as a user runs it: train, kill, resume, decode; and which flags go with which."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from gpt2 import gen, run_generation, run_language_modeling, train_e2e
from gpt2.flags import OBJECTIVE, Settings
from gpt2.model import load
from gpt2.trainer_prefix import PrefixTrainer
from prefixlib.decoding import outputs
from prefixlib.methods.table import METHODS
from prefixlib.system.errors import UserError
from tests.conftest import ROOT, run_command
from tests.tuning import (
    MORE,
    OF_THE_METHOD,
    TUNED,
    Killed,
    die_after,
    equal,
    judge,
    model_weights,
    moved,
    pairs,
    weights,
)

DEMO = ROOT / "data" / "demo"

# ---- gpt2 ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def unscored():
    """Scoring is tested elsewhere; METEOR's paraphrase table alone would take most of the time here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outputs, "score", lambda *_: {"BLEU": 1.0})
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "e2e_data").mkdir()
    for split, count in (("train", 24), ("valid", 3), ("test", 3)):
        lines = (DEMO / "e2e_data" / f"src1_{split}.txt").read_text().splitlines(keepends=True)[:count]
        (folder / "e2e_data" / f"src1_{split}.txt").write_text("".join(lines))
    return folder


def gpt2_flag_words(data, output, mode, **changes):
    values = {
        **{"mode": "data2text", "tuning_mode": mode, "model_name_or_path": DEMO / "gpt2", "data_dir": data},
        **{"output_dir": output, "bsz": 12, "epoch": 3, "learning_rate": 0.003, "save_steps": 3, "logging_steps": 1},
        **{"disable_tqdm": "yes", **MORE[mode], **changes},
    }
    return [f"--{name}={value}" for name, value in values.items()]


@pytest.fixture(scope="module", params=tuple(MORE))
def gpt2_run(request, data, tmp_path_factory):
    """Six steps of one tuning mode, decoded: (mode, folder)."""
    output = tmp_path_factory.mktemp("runs") / f"a {request.param}"
    assert run_language_modeling.main(gpt2_flag_words(data, output, request.param)) == 0
    return request.param, output


def test_gpt2_moves_what_it_says(gpt2_run):
    mode, output = gpt2_run
    results = json.loads((output / "results.json").read_text())["training"]
    losses = results["first_train_loss"], results["last_train_loss"]
    assert losses[1] < losses[0]
    if mode == "prefixtune":
        assert not list(output.glob("**/model.safetensors"))
        return
    base = load_file(DEMO / "gpt2" / "model.safetensors")
    after = model_weights(mode, output)
    names = moved({name: tensor.float() for name, tensor in base.items()}, after)
    width = json.loads((DEMO / "gpt2" / "config.json").read_text())["n_embd"]
    if mode == "finetune-top":
        tops = ("transformer.ln_f.", "transformer.h.3.", "transformer.h.2.")
        assert names == {name for name in after if name.startswith(tops)}
    elif mode == "adaptertune":
        assert names == {name for name in after if "adapter_block" in name}
        assert results["trainable_parameters"] == 4 * 2 * (2 * 6 * width + 6 + width)
    else:
        assert names == set(after)
    assert results["trainable_parameters"] >= sum(after[name].numel() for name in names)
    stored = sum(tensor.numel() for tensor in after.values())
    assert results["stored_parameters"] == stored + (3 * 2 * 4 * width if mode == "bothtune" else 0)
    if mode == "bothtune":
        prefix = load_file(output / "prefix_model.safetensors")
        assert results["trainable_parameters"] == stored + sum(tensor.numel() for tensor in prefix.values())


def test_gpt2_decodes_alike_wherever_the_folder_is(gpt2_run, data, tmp_path):
    """gen.py needs no flag repeated; a both-tuned checkpoint brings its model along."""
    mode, output = gpt2_run
    moved_to = tmp_path / output.name
    shutil.copytree(output, moved_to)
    args, rest = gen.parse_args(["data2text", "yes", "test", str(moved_to), "no", "--data_dir", str(data)])
    command = gen.build_command(args, rest)
    assert run_generation.main([*command[2:], "--output_dir", str(tmp_path / "again"), "--disable_tqdm", "yes"]) == 0
    again = (tmp_path / "again" / f"{output.name}_test_beam").read_text()
    assert again == (output / f"{output.name}_test_beam").read_text()
    if mode != "prefixtune":
        with pytest.raises(UserError, match=r"--model_name_or_path .* contradicts .*which"):
            run_generation.main([*command[2:], "--model_name_or_path", str(DEMO / "gpt2")])
    if mode == "bothtune":
        with pytest.raises(UserError, match="model was tuned together with a prefix: pass .*, which holds both"):
            load(moved_to / "model", mode="data2text")


def test_gpt2_killed_and_resumed_equals_whole(gpt2_run, data, tmp_path, monkeypatch):
    mode, whole = gpt2_run
    words = gpt2_flag_words(data, tmp_path, mode, skip_decode="yes")
    with monkeypatch.context() as patch:
        patch.setattr(PrefixTrainer, "_save_checkpoint", die_after(PrefixTrainer._save_checkpoint))
        with pytest.raises(Killed):
            run_language_modeling.main(words)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    for name, value in {"top_layers": 1, "adapter_bottleneck": 5, "preseqlen": 4}.items():
        if name in MORE[mode]:
            with pytest.raises(UserError, match=f"--{name} {value} contradicts .*checkpoint-3"):
                run_language_modeling.main([*words, "--resume=yes", f"--{name}={value}"])
    run_language_modeling.main([*words, "--resume=yes"])
    seen = weights(whole)
    assert len(seen) == 2 * {"prefixtune": 2, "bothtune": 3}.get(mode, 1)  # checkpoint-6 and the result
    for path, tensors in weights(tmp_path).items():
        assert equal(tensors, seen.pop(path)), path
    assert not seen


def test_gpt2_base_is_where_the_prefix_says(data, tmp_path):
    """A both-tuned checkpoint whose model is lost is refused, not decoded with another one."""
    output = tmp_path / "run"
    run_language_modeling.main(gpt2_flag_words(data, output, "bothtune", max_steps=1, skip_decode="yes"))
    shutil.rmtree(output / "model")
    with pytest.raises(UserError, match=r"the base model of .*run, .*model, is not here"):
        load(output, mode="data2text")


def test_gpt2_checkpointing_and_bf16(data, tmp_path):
    for mode in TUNED:
        output = tmp_path / mode
        more = {"gradient_checkpointing": "yes", "bf16": "yes", "max_steps": 2, "bsz": 1, "skip_decode": "yes"}
        run_language_modeling.main(gpt2_flag_words(data, output, mode, **more))
        assert all(tensor.dtype == torch.float32 for tensor in model_weights(mode, output).values())


def names(directory):
    return [path.name for path in directory.iterdir()]


def test_gpt2_two_processes_equal_one(data, tmp_path):
    """Hooks and frozen parts under DistributedDataParallel: the second loss has seen both processes' gradients.

    The token mean is that of the whole step, though its parts are not equally long: 24 texts in batches of 10, two of
    them a step, so that an epoch's last step has 4 texts, all of them in one process. Weights are not compared: Adam
    makes steps of the same size from gradients of rounding's size.
    """
    logs = []
    for processes in (1, 2):
        output = tmp_path / f"{processes}"
        uneven = {"bsz": 10, "gradient_accumulation_steps": 2, "epoch": 2}
        words = gpt2_flag_words(data, output, "adaptertune", **uneven, skip_decode="yes")
        if processes == 1:
            run_language_modeling.main(words)
        else:
            result = run_command("gpt2/train_e2e.py", *words, "--num_processes=2")
            assert result.returncode == 0, result.stderr
        state = json.loads((output / "trainer_state.json").read_text())
        logs.append([(row["loss"], row["grad_norm"]) for row in state["log_history"] if "loss" in row])
        logs[-1] += [(row["eval_loss"],) for row in state["log_history"] if "eval_loss" in row]
    assert len(logs[0]) == 4 + 2
    for one, two in zip(*logs, strict=True):
        assert two == pytest.approx(one, rel=1e-4)


def test_gpt2_decodes_the_later_of_two_runs_in_one_folder(data, tmp_path):
    """Fine-tuned over an earlier prefix: the folder is then a model's, and nothing of the earlier run is left in it."""
    earlier = {"max_steps": 4, "save_steps": 2, "keep_best": "yes"}
    run_language_modeling.main(gpt2_flag_words(data, tmp_path, "prefixtune", **earlier))
    (tmp_path / "mine").touch()
    assert {"best", "checkpoint-4", "prefix_config.json", f"{tmp_path.name}_valid_beam"} <= set(names(tmp_path))
    brief = {"max_steps": 2, "save_steps": 1, "skip_decode": "yes", "overwrite_output_dir": "yes"}
    run_language_modeling.main(gpt2_flag_words(data, tmp_path, "finetune", **brief))
    assert {"checkpoint-2", "model.safetensors", "results.json", "mine"} <= set(names(tmp_path))
    assert not [name for name in names(tmp_path) if name.startswith(("best", "prefix", "checkpoint-4", tmp_path.name))]
    assert "decoding" not in json.loads((tmp_path / "results.json").read_text())
    trained = load(tmp_path, mode="data2text")
    assert trained.prefix is None
    weights = trained.base.state_dict()
    assert equal(weights, {**weights, **model_weights("finetune", tmp_path)})


@pytest.mark.parametrize(
    ("mode", "changes", "message"),
    [
        ("finetune-top", {"top_layers": 5}, "--top_layers 5: the model has 4 layers"),
        ("finetune-top", {"top_layers": -1}, "--top_layers -1: must be at least 0"),
        ("adaptertune", {"adapter_bottleneck": 0}, "--adapter_bottleneck 0: must be above 0"),
        ("adaptertune", {"model_name_or_path": "ADAPTED"}, "the base model has adapters already"),
    ],
)
def test_gpt2_refuses(data, tmp_path, mode, changes, message):
    if changes.get("model_name_or_path"):
        changes = {"model_name_or_path": tmp_path / "first"}
        words = gpt2_flag_words(data, tmp_path / "first", "adaptertune", max_steps=1, skip_decode="yes")
        run_language_modeling.main(words)
    with pytest.raises(UserError, match=message) as error:
        run_language_modeling.main(gpt2_flag_words(data, tmp_path / "run", mode, **changes))
    assert "\n" not in str(error.value)


def test_an_adapter_model_can_be_trained_on(data, tmp_path):
    """As the base of another mode it keeps its adapters: here they are frozen below the top layers."""
    first, second = tmp_path / "first", tmp_path / "second"
    brief = {"max_steps": 1, "skip_decode": "yes"}
    run_language_modeling.main(gpt2_flag_words(data, first, "adaptertune", **brief))
    run_language_modeling.main(gpt2_flag_words(data, second, "finetune-top", model_name_or_path=first, **brief))
    names = moved(load_file(first / "model.safetensors"), load_file(second / "model.safetensors"))
    assert "transformer.h.3.mlp.adapter_block.up.weight" in names
    assert "transformer.h.1.mlp.adapter_block.up.weight" not in names


# ---- which flags go with which ---------------------------------------------------------------------------------------


def test_every_pair_of_tuning_mode_and_gpt2_flag():
    cases = pairs(METHODS, Settings, *OF_THE_METHOD, OBJECTIVE)
    assert len(cases) == 5 * 36  # 30 flags, three of which have several other values

    def launch(argv):
        return train_e2e.build_command(train_e2e.parse_args(argv))

    accepted = judge(launch, run_language_modeling.parse, cases)
    shared = {"preseqlen"}  # stands in published commands for every mode
    assert {"top_layers", "top_embeddings"} | shared <= accepted["finetune-top"]
    assert {"adapter_design", "adapter_bottleneck"} | shared <= accepted["adaptertune"]
    assert {"mid_dim", "dropout", "objective_mode", "prefix_model_path"} | shared <= accepted["bothtune"]
    for mode in ("finetune", "finetune-top", "adaptertune"):
        assert not accepted[mode] & {"mid_dim", "dropout", "objective_mode", "use_dropout", "prefix_model_path"}
    own = {"top_layers", "top_embeddings", "adapter_design", "adapter_bottleneck"}
    assert all(not accepted[mode] & own for mode in ("prefixtune", "finetune", "bothtune"))


@pytest.mark.parametrize(
    ("argv", "end"),
    [
        ("--tuning_mode adaptertune --adapter_design 2 --adapter_bottleneck 30", "m=512_a=2_b=30_o=1"),
        ("--tuning_mode adaptertune --notes mine", "m=512_mine_a=1_b=100_o=1"),
        ("--tuning_mode finetune-top --top_layers 2", "m=512_l=2_o=1"),
        ("--tuning_mode finetune-top --top_embeddings no", "m=512_l=1_e=no_o=1"),
        ("--tuning_mode bothtune", "m=512_o=1"),
    ],
)
def test_folder_names_of_the_original(argv, end):
    parsed = train_e2e.parse_args(argv.split())
    name = parsed.settings.long_name(parsed.launch.notes)
    assert name.endswith(end)
    assert name.startswith(f"data2text{parsed.settings.tuning_mode}_y_10_act_cat_")
