"""Every tuning mode in both trees as a user runs it: train, kill, resume, decode; and which flags go with which."""

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from gpt2 import flags as gpt2_flags
from gpt2 import gen, run_generation, run_language_modeling, train_e2e
from gpt2.generator import load_generator
from gpt2.trainer_prefix import PrefixTrainer
from prefixlib.errors import UserError
from prefixlib.launch import Parser
from seq2seq import finetune, train_bart
from seq2seq import flags as seq2seq_flags
from seq2seq.callbacks import Checkpoints
from tests.conftest import ROOT, run_command
from tests.seq2seq_tiny import make_bart, make_summaries, training_flags

DEMO = ROOT / "data" / "demo"
TUNED = ("finetune", "finetune-top", "adaptertune", "bothtune")
MORE = {  # each mode's own flags, away from their defaults
    "prefixtune": {"preseqlen": 3, "mid_dim": 16},
    "finetune": {},
    "finetune-top": {"top_layers": 2, "top_embeddings": "no"},
    "adaptertune": {"adapter_design": 2, "adapter_bottleneck": 6},
    "bothtune": {"preseqlen": 3, "mid_dim": 16},
}


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def die_after(work):
    """`work`, and then the end."""

    def die(*arguments, **named):
        work(*arguments, **named)
        raise Killed

    return die


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def moved(before, after):
    """The tensors of `after` that are new or differ from `before`; a tied head counts once."""
    return {name for name, tensor in after.items() if name not in before or not torch.equal(tensor, before[name])}


# ---- gpt2 ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def unscored():
    """Scoring is tested elsewhere; METEOR's paraphrase table alone would take most of the time here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_generation, "score_groups", lambda *_: {"BLEU": 1.0})
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


def gpt2_weights(output):
    return {path.relative_to(output): load_file(path) for path in output.rglob("*.safetensors")}


def model_weights(mode, output):
    return load_file(output / ("model" if mode == "bothtune" else "") / "model.safetensors")


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
            load_generator(moved_to / "model", "data2text", None, None, torch.float32)


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
    seen = gpt2_weights(whole)
    assert len(seen) == 2 * {"prefixtune": 2, "bothtune": 3}.get(mode, 1)  # checkpoint-6 and the result
    for path, tensors in gpt2_weights(tmp_path).items():
        assert equal(tensors, seen.pop(path)), path
    assert not seen


def test_gpt2_base_is_where_the_prefix_says(data, tmp_path):
    """A both-tuned checkpoint whose model is lost is refused, not decoded with another one."""
    output = tmp_path / "run"
    run_language_modeling.main(gpt2_flag_words(data, output, "bothtune", max_steps=1, skip_decode="yes"))
    shutil.rmtree(output / "model")
    with pytest.raises(UserError, match=r"the base model of .*run, .*model, is not here"):
        load_generator(output, "data2text", None, None, torch.float32)


def test_gpt2_checkpointing_and_bf16(data, tmp_path):
    for mode in TUNED:
        output = tmp_path / mode
        more = {"gradient_checkpointing": "yes", "bf16": "yes", "max_steps": 2, "skip_decode": "yes"}
        run_language_modeling.main(gpt2_flag_words(data, output, mode, **more))
        assert all(tensor.dtype == torch.float32 for tensor in model_weights(mode, output).values())


def names(directory):
    return [path.name for path in directory.iterdir()]


def test_gpt2_two_processes_equal_one(data, tmp_path):
    """Hooks and frozen parts under DistributedDataParallel: the second loss has seen both processes' gradients.

    The token mean is that of the whole batch, though its halves are not equally long. Weights are not compared: Adam
    makes steps of the same size from gradients of rounding's size.
    """
    logs = []
    for processes in (1, 2):
        output = tmp_path / f"{processes}"
        words = gpt2_flag_words(data, output, "adaptertune", max_steps=3, skip_decode="yes")
        if processes == 1:
            run_language_modeling.main(words)
        else:
            result = run_command("gpt2/train_e2e.py", *words, "--num_processes=2")
            assert result.returncode == 0, result.stderr
        state = json.loads((output / "trainer_state.json").read_text())
        logs.append([(row["loss"], row["grad_norm"]) for row in state["log_history"] if "loss" in row])
    assert len(logs[0]) == 3
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
    generator = load_generator(tmp_path, "data2text", None, None, torch.float32)
    assert generator.layers is None
    assert equal(generator.model.state_dict(), {**generator.model.state_dict(), **model_weights("finetune", tmp_path)})


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


# ---- seq2seq ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("seq2seq")
    make_bart(root / "bart")
    make_summaries(root / "data", train=12, rest=3)
    return root


def seq2seq_words(place, output, mode, **changes):
    own = {"preseqlen": None, "mid_dim": None, **MORE[mode]}
    changes = {"epoch": 1, "save_steps": 2, "learning_rate": 0.01, **own, **changes}
    return training_flags(place / "bart", place / "data", output, tuning_mode=mode, **changes)


@pytest.fixture(scope="module", params=TUNED)
def seq2seq_run(request, place):
    output = place / f"a {request.param}"
    finetune.main(seq2seq_words(place, output, request.param))
    return request.param, output


def test_seq2seq_moves_what_it_says(place, seq2seq_run):
    mode, output = seq2seq_run
    before, after = load_file(place / "bart" / "model.safetensors"), load_file(output / "model" / "model.safetensors")
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
    trained = json.loads((output / "results.json").read_text())["train"]["trainable_parameters"]
    assert trained >= sum(after[name].numel() for name in names)
    assert (output / "prefix_model.safetensors").exists() == (mode == "bothtune")
    config = json.loads((output / "model" / "task_config.json").read_text())
    assert config["task"]["tuning_mode"] == mode
    assert {name: config["task"].get(name) for name in MORE[mode] if "prefix" not in name} == (
        MORE[mode] if mode != "bothtune" else {"preseqlen": None, "mid_dim": None}
    )


def seq2seq_decode(place, mode, checkpoint, output, *more):
    which = "prefix_model_path" if mode == "bothtune" else "finetune_model_path"
    words = ["--mode=xsum", "--do_train=no", f"--{which}={checkpoint}", f"--data_dir={place / 'data'}"]
    words += ["--num_beams=2", "--max_length=12", "--min_length=2", f"--output_dir={output}", "--disable_tqdm=yes"]
    finetune.main([*words, *more])
    return (output / "test_beam_1.0").read_text()


def test_seq2seq_decodes_alike_wherever_the_folder_is(place, seq2seq_run, tmp_path):
    mode, output = seq2seq_run
    text = seq2seq_decode(place, mode, output, tmp_path / "one")
    shutil.copytree(output, tmp_path / "moved")
    assert seq2seq_decode(place, mode, tmp_path / "moved", tmp_path / "two") == text
    assert len(text.splitlines()) == 3
    assert seq2seq_decode(place, mode, output / "best", tmp_path / "best")
    if mode == "bothtune":
        with pytest.raises(UserError, match="was tuned together with a prefix: pass --prefix_model_path"):
            seq2seq_decode(place, "finetune", output, tmp_path / "half")
        with pytest.raises(UserError, match=r"--model_name_or_path .* contradicts .*, which brings its own tuned"):
            seq2seq_decode(place, mode, output, tmp_path / "x", f"--model_name_or_path={place / 'bart'}")
    if mode == "adaptertune":
        with pytest.raises(UserError, match="--adapter_bottleneck 7 contradicts .*, which was trained with .* 6"):
            seq2seq_decode(place, mode, output, tmp_path / "x", "--adapter_bottleneck=7")


def test_seq2seq_killed_and_resumed_equals_whole(place, seq2seq_run, tmp_path, monkeypatch):
    mode, whole = seq2seq_run
    words = seq2seq_words(place, tmp_path, mode)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_save", die_after(Checkpoints._save))
        with pytest.raises(Killed):
            finetune.main(words)
    assert not (tmp_path / "model").exists()
    if mode == "finetune-top":
        with pytest.raises(UserError, match="--top_layers 1 contradicts .*resume.ckpt, which was made with 2"):
            finetune.main([*words, "--resume=yes", "--top_layers=1"])
    finetune.main([*words, "--resume=yes"])
    seen = gpt2_weights(whole)
    assert len(seen) == 2 * (3 if mode == "bothtune" else 1)  # the last and the best
    for path, tensors in gpt2_weights(tmp_path).items():
        assert equal(tensors, seen.pop(path)), path
    assert not seen


@pytest.mark.parametrize("mode", TUNED)
def test_seq2seq_checkpointing_and_accumulation(place, tmp_path, mode):
    """The same losses and weights as without; both trained under gradient accumulation."""
    still = {"model_name_or_path": place / "still", "gradient_accumulation_steps": 2}
    if not (place / "still").exists():
        make_bart(place / "still", dropout=0.0, attention_dropout=0.0)
    weights = []
    for checkpointing in ("no", "yes"):
        output = tmp_path / checkpointing
        finetune.main(seq2seq_words(place, output, mode, **still, gradient_checkpointing=checkpointing, max_steps=1))
        weights.append(load_file(output / "model" / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        if not name.endswith("k_proj.bias"):  # Adam makes whole steps from gradients of rounding's size
            assert (tensor - weights[1][name]).abs().max() < 1e-3, name


def test_seq2seq_refuses_more_layers_than_the_decoder_has(place, tmp_path):
    with pytest.raises(UserError, match="--top_layers 3: the decoder has 2 layers"):
        finetune.main(seq2seq_words(place, tmp_path, "finetune-top", top_layers=3))
    with pytest.raises(UserError, match="--top_layers 0 and --top_embeddings no do not go together"):
        finetune.main(seq2seq_words(place, tmp_path, "finetune-top", top_layers=0))


# ---- which flags go with which ---------------------------------------------------------------------------------------


def other_values(action):
    """Values of a flag that are not its default."""
    if action.choices:
        return [value for value in action.choices if value != action.default]
    if action.type in (int, float):
        return [action.default + 1 if action.type is int else 0.25]
    return ["something"]


def pairs(modes, *adders):
    """(tuning mode, flag, value) for every flag of the method at each value that is not its default."""
    blank = Parser(add_help=False)
    for add in adders:
        add(blank)
    flags = [action for action in blank._actions if action.dest != "tuning_mode"]
    return [(mode, a.dest, value) for mode, a in itertools.product(modes, flags) for value in other_values(a)]


def judge(launch, child, cases):
    """Per mode the flags that launcher and child accept; the rest is refused with one line that names the flag."""
    accepted, refusals = {mode: set() for mode, _, _ in cases}, {}
    for mode, flag, value in cases:
        try:
            command = launch(["--tuning_mode", mode, f"--{flag}", str(value)])
        except UserError as error:
            refusals[mode, flag, value] = str(error)
            continue
        parsed = child(command[2:])
        assert (parsed.tuning_mode, str(getattr(parsed, flag))) == (mode, str(value))
        accepted[mode].add(flag)
    for (_, flag, _), message in refusals.items():
        assert f"--{flag}" in message
        assert "\n" not in message
    return accepted


def test_every_pair_of_tuning_mode_and_gpt2_flag():
    adders = gpt2_flags.add_method_flags, gpt2_flags.add_initialisation_flags, gpt2_flags.add_objective_flags
    cases = pairs(gpt2_flags.TUNING_MODES, *adders)
    assert len(cases) == 5 * 32  # 26 flags, three of which have several other values

    def launch(argv):
        return train_e2e.build_command(train_e2e.parse_args(argv))

    accepted = judge(launch, run_language_modeling.parse_args, cases)
    shared = {"preseqlen"}  # stands in published commands for every mode
    assert {"top_layers", "top_embeddings"} | shared <= accepted["finetune-top"]
    assert {"adapter_design", "adapter_bottleneck"} | shared <= accepted["adaptertune"]
    assert {"mid_dim", "dropout", "objective_mode", "prefix_model_path"} | shared <= accepted["bothtune"]
    for mode in ("finetune", "finetune-top", "adaptertune"):
        assert not accepted[mode] & {"mid_dim", "dropout", "objective_mode", "use_dropout", "prefix_model_path"}
    own = {"top_layers", "top_embeddings", "adapter_design", "adapter_bottleneck"}
    assert all(not accepted[mode] & own for mode in ("prefixtune", "finetune", "bothtune"))


def test_every_pair_of_tuning_mode_and_seq2seq_flag():
    cases = pairs(seq2seq_flags.TUNING_MODES, seq2seq_flags.add_method_flags)
    assert len(cases) == 5 * 19

    def launch(argv):
        parser = train_bart.make_parser("", ("xsum",))
        return train_bart.build_command(*train_bart.parse_args(["--mode", "xsum", *argv], parser))

    accepted = judge(launch, lambda words: finetune.parse_args(words)[0], cases)
    assert accepted["finetune-top"] == {"preseqlen", "top_layers", "top_embeddings"}
    assert accepted["adaptertune"] == {"preseqlen", "adapter_design", "adapter_bottleneck"}
    assert accepted["finetune"] == {"preseqlen"}
    assert accepted["prefixtune"] - accepted["bothtune"] == {"use_dropout"}
    assert {"mid_dim", "dropout", "use_cross_prefix", "prefix_model_path", "init_shallow"} <= accepted["bothtune"]


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
    args = train_e2e.parse_args(argv.split())
    name = train_e2e.run_name(args)
    assert name.endswith(end)
    assert name.startswith(f"data2text{args.tuning_mode}_y_10_act_cat_")
    bart, _ = train_bart.parse_args(["--mode", "xsum", *argv.split()], train_bart.make_parser("", ("xsum",)))
    assert train_bart.run_name(bart).endswith(end.removesuffix("_o=1"))
