"""Every tuning mode of an encoder-decoder as a user runs it: train, kill, resume, decode; which flags go with which."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from prefixlib.methods.table import METHODS
from prefixlib.system.errors import UserError
from seq2seq import finetune, train_bart
from seq2seq.callbacks import Checkpoints
from seq2seq.flags import Settings
from tests.seq2seq_tiny import make_bart, make_summaries, training_flags
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


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("seq2seq")
    make_bart(root / "bart")
    make_summaries(root / "data", train=12, rest=3)
    return root


def words_of(place, output, mode, **changes):
    own = {"preseqlen": None, "mid_dim": None, **MORE[mode]}
    changes = {"epoch": 1, "save_steps": 2, "learning_rate": 0.01, **own, **changes}
    return training_flags(place / "bart", place / "data", output, tuning_mode=mode, **changes)


@pytest.fixture(scope="module", params=TUNED)
def tuned_run(request, place):
    output = place / f"a {request.param}"
    finetune.main(words_of(place, output, request.param))
    return request.param, output


def test_moves_what_it_says(place, tuned_run):
    mode, output = tuned_run
    before, after = load_file(place / "bart" / "model.safetensors"), model_weights(mode, output)
    names = moved(before, after)
    # softmax does not see a shift of all scores: the keys' biases have gradients of rounding's size
    silent = {name for name in after if name.endswith("k_proj.bias")}
    wanted = set(after)
    if mode == "finetune-top":
        wanted = {name for name in after if name.startswith("model.decoder.layers.")}  # 2 of 2, embeddings frozen
    elif mode == "adaptertune":
        wanted = {name for name in after if "adapter_block" in name}
        assert len(wanted) == (2 * 2 + 2 * 3) * 4
    assert names - silent == wanted - silent - {"final_logits_bias"}
    training = json.loads((output / "results.json").read_text())["training"]
    stored = sum(tensor.numel() for name, tensor in after.items() if name != "final_logits_bias")  # a buffer
    assert training["stored_parameters"] == stored + (3 * 3 * 2 * 2 * 16 if mode == "bothtune" else 0)
    assert training["trainable_parameters"] >= sum(after[name].numel() for name in names)
    assert (output / "prefix_model.safetensors").exists() == (mode == "bothtune")
    folder = output / "model" if mode == "bothtune" else output
    config = json.loads((folder / "task_config.json").read_text())
    assert config["task"]["tuning_mode"] == mode
    assert {name: config["task"].get(name) for name in MORE[mode] if "prefix" not in name} == (
        MORE[mode] if mode != "bothtune" else {"preseqlen": None, "mid_dim": None}
    )


def decode(place, mode, checkpoint, output, *more):
    which = "prefix_model_path" if mode == "bothtune" else "finetune_model_path"
    words = ["--mode=xsum", "--do_train=no", f"--{which}={checkpoint}", f"--data_dir={place / 'data'}"]
    words += ["--num_beams=2", "--max_length=12", "--min_length=2", f"--output_dir={output}", "--disable_tqdm=yes"]
    finetune.main([*words, *more])
    return (output / "test_beam_1.0").read_text()


def test_decodes_alike_wherever_the_folder_is(place, tuned_run, tmp_path):
    mode, output = tuned_run
    text = decode(place, mode, output, tmp_path / "one")
    shutil.copytree(output, tmp_path / "moved")
    assert decode(place, mode, tmp_path / "moved", tmp_path / "two") == text
    assert len(text.splitlines()) == 3
    assert decode(place, mode, output / "best", tmp_path / "best")
    if mode == "bothtune":
        with pytest.raises(UserError, match="was tuned together with a prefix: pass --prefix_model_path"):
            decode(place, "finetune", output, tmp_path / "half")
        with pytest.raises(UserError, match=r"--model_name_or_path .* contradicts .*, which contains its own tuned"):
            decode(place, mode, output, tmp_path / "x", f"--model_name_or_path={place / 'bart'}")
    else:
        with pytest.raises(
            UserError, match="is not a prefix checkpoint: .*; it holds a whole model, tuned without a prefix"
        ):
            decode(place, "bothtune", output, tmp_path / "x")
    if mode == "adaptertune":
        with pytest.raises(UserError, match="--adapter_bottleneck 7 contradicts .*, which was trained with .* 6"):
            decode(place, mode, output, tmp_path / "x", "--adapter_bottleneck=7")


def test_killed_and_resumed_equals_whole(place, tuned_run, tmp_path, monkeypatch):
    mode, whole = tuned_run
    words = words_of(place, tmp_path, mode)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_save", die_after(Checkpoints._save))
        with pytest.raises(Killed):
            finetune.main(words)
    assert not [*tmp_path.glob("model*"), *tmp_path.glob("config.json")]
    if mode == "finetune-top":
        with pytest.raises(UserError, match="--top_layers 1 contradicts .*resume.ckpt, which was made with 2"):
            finetune.main([*words, "--resume=yes", "--top_layers=1"])
    finetune.main([*words, "--resume=yes"])
    seen = weights(whole)
    assert len(seen) == 2 * (3 if mode == "bothtune" else 1)  # the last and the best
    for path, tensors in weights(tmp_path).items():
        assert equal(tensors, seen.pop(path)), path
    assert not seen


@pytest.mark.parametrize("mode", TUNED)
def test_checkpointing_and_accumulation(place, tmp_path, mode):
    """The same losses and weights as without; both trained under gradient accumulation."""
    still = {"model_name_or_path": place / "still", "gradient_accumulation_steps": 2}
    if not (place / "still").exists():
        make_bart(place / "still", dropout=0.0, attention_dropout=0.0)
    found = []
    for checkpointing in ("no", "yes"):
        output = tmp_path / checkpointing
        finetune.main(words_of(place, output, mode, **still, gradient_checkpointing=checkpointing, max_steps=1))
        found.append(model_weights(mode, output))
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        if not name.endswith("k_proj.bias"):  # Adam makes whole steps from gradients of rounding's size
            assert (tensor - found[1][name]).abs().max() < 1e-3, name


def test_refuses_more_layers_than_the_decoder_has(place, tmp_path):
    with pytest.raises(UserError, match="--top_layers 3: the decoder has 2 layers"):
        finetune.main(words_of(place, tmp_path, "finetune-top", top_layers=3))
    with pytest.raises(UserError, match="--top_layers 0 and --top_embeddings no do not go together"):
        finetune.main(words_of(place, tmp_path, "finetune-top", top_layers=0))


def test_a_model_of_an_earlier_version_still_decodes(place, tuned_run, tmp_path):
    """Models tuned without a prefix used to lie in DIRECTORY/model."""
    mode, output = tuned_run
    if mode == "bothtune":
        pytest.skip("its place has not changed")
    shutil.copytree(output, tmp_path / "run" / "model", ignore=shutil.ignore_patterns("best", "tensorboard"))
    assert decode(place, mode, tmp_path / "run", tmp_path / "one") == decode(place, mode, output, tmp_path / "two")


def test_every_pair_of_tuning_mode_and_flag():
    cases = pairs(METHODS, Settings, *OF_THE_METHOD)
    assert len(cases) == 5 * 19

    def launch(argv):
        return train_bart.build_command(train_bart.parse_args(["--mode", "xsum", *argv]))

    accepted = judge(launch, lambda words: finetune.parse_args(words)[0], cases)
    assert accepted["finetune-top"] == {"preseqlen", "top_layers", "top_embeddings"}
    assert accepted["adaptertune"] == {"preseqlen", "adapter_design", "adapter_bottleneck"}
    assert accepted["finetune"] == {"preseqlen"}
    assert accepted["prefixtune"] - accepted["bothtune"] == {"use_dropout"}
    assert {"mid_dim", "dropout", "use_cross_prefix", "prefix_model_path", "init_shallow"} <= accepted["bothtune"]


@pytest.mark.parametrize(
    ("argv", "end"),
    [
        ("--tuning_mode adaptertune --adapter_design 2 --adapter_bottleneck 30", "m=512_a=2_b=30"),
        ("--tuning_mode adaptertune --notes mine", "m=512_mine_a=1_b=100"),
        ("--tuning_mode finetune-top --top_layers 2", "m=512_l=2"),
        ("--tuning_mode finetune-top --top_embeddings no", "m=512_l=1_e=no"),
        ("--tuning_mode bothtune", "m=512"),
    ],
)
def test_folder_names_of_the_original(argv, end):
    parsed = train_bart.parse_args(["--mode", "xsum", "--long_names", "yes", *argv.split()])
    name = parsed.settings.long_name(parsed.launch.notes)
    assert name.startswith(f"xsum{parsed.settings.tuning_mode}_y_5_act_cat_")
    assert name.endswith(end)
    assert parsed.settings.output_dir.endswith(f"/seq2seq/xsum_models/{name}")
