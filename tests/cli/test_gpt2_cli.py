"""The gpt2 tree as a user runs it: both folders, train -> kill -> resume -> decode -> score, wrong input."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from gpt2 import gen, run_generation, run_language_modeling, train_e2e
from prefixlib.system.errors import UserError
from tests.conftest import ROOT, run_command, train_here

DEMO = ROOT / "data" / "demo"
SETTINGS = ["--preseqlen", "3", "--bsz", "4", "--learning_rate", "0.01", "--disable_tqdm", "yes"]
PREFIX = [*SETTINGS, "--mid_dim", "16"]
ODD = "a b; $(touch ran) 'q' \"d\" `x`"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder in the layout of data/ with a few lines of the demo's sets."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 40), ("valid", 6), ("test", 5)):
        lines = (DEMO / "e2e_data" / f"src1_{split}.txt").read_text().splitlines(keepends=True)[:count]
        target = folder / "e2e_data" / f"src1_{split}.txt"
        target.parent.mkdir(exist_ok=True)
        target.write_text("".join(lines))
    for split, count in (("train", 12), ("dev", 4), ("test", 4)):
        entries = json.loads((DEMO / "webnlg_challenge_2017" / f"{split}.json").read_text())["entries"][:count]
        target = folder / "webnlg_challenge_2017" / f"{split}.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps({"entries": entries}))
    return folder


def training_command(data, output, *more, settings=PREFIX):
    where = ["--model_name_or_path", DEMO / "gpt2", "--data_dir", data, "--output_dir", output]
    return ["gpt2/train_e2e.py", "--mode", "data2text", *settings, *where, *more]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """One whole training of 20 steps with decoding; its folder has a name no shell would survive."""
    output = tmp_path_factory.mktemp("runs") / ODD
    result = run_command(*training_command(data, output, "--epoch", "2", "--logging_steps", "5", "--save_steps", "5"))
    assert result.returncode == 0, result.stderr
    return output, result


def weights(directory):
    return load_file(directory / "prefix_model.safetensors")


def test_training_leaves_everything_a_user_needs(run, data):
    output, result = run
    assert {path.name for path in output.iterdir()} == {
        *(
            "prefix_config.json",
            "prefix_model.safetensors",
            "prefix_flat.safetensors",
            "README.md",
            "trainer_state.json",
        ),
        *("results.json", "loss.png", "command.txt", "settings.json", "runs", "checkpoint-20"),
        *(f"{output.name}_{split}_{kind}" for split in ("valid", "test") for kind in ("beam", "gold", "src")),
    }
    assert not (ROOT / "ran").exists()
    results = json.loads((output / "results.json").read_text())
    training = results["training"]
    assert training["steps"] == 20
    assert training["last_train_loss"] < training["first_train_loss"]
    config = json.loads((DEMO / "gpt2" / "config.json").read_text())
    width, layers = config["n_embd"], config["n_layer"]
    assert training["stored_parameters"] == 3 * 2 * layers * width
    assert training["trainable_parameters"] == 3 * width + (width + 1) * 16 + (16 + 1) * 2 * layers * width
    assert training["examples"] == 40
    assert training["peak_memory_bytes"]["host"] > 2**20
    assert results["run"]["seed"] == 101
    for split in ("valid", "test"):
        assert results["decoding"][split]["scores"]["BLEU"] >= 0
        assert f"{split}: BLEU" in result.stdout
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert any(path.name.startswith("events.out.tfevents") for path in (output / "runs").rglob("*"))
    steps = [line for line in result.stderr.splitlines() if " loss " in line and "dev loss" not in line]
    assert [line.split(" step ")[1].split("/")[0] for line in steps] == ["5", "10", "15", "20"]


def test_its_settings_make_the_same_run(run):
    """settings.json and results.json, fed back: the same settings and so the same folder."""
    output, _ = run
    made = [train_e2e.parse_args(["--config", str(output / name)]) for name in ("settings.json", "results.json")]
    settings = made[0].settings
    assert settings.of_the_run() == made[1].settings.of_the_run()
    assert settings.of_the_run() == json.loads((output / "settings.json").read_text())
    assert (settings.seed, settings.mid_dim, settings.output_dir) == (101, 16, None)


def test_output_files_are_in_the_order_of_the_data(run, data):
    output, _ = run
    for split in ("valid", "test"):
        lines = (data / "e2e_data" / f"src1_{split}.txt").read_text().splitlines()
        sources = list(dict.fromkeys(line.split("||")[0] for line in lines))
        beam, gold, src = (
            (output / f"{output.name}_{split}_{kind}").read_text().split("\n") for kind in ("beam", "gold", "src")
        )
        assert src == [*(f" {source} <|endoftext|>" for source in sources), ""]
        assert len(beam) == len(sources) + 1
        blocks = "\n".join(gold).removesuffix("\n\n").split("\n\n")
        expected = [[t.strip() for s, t in (line.split("||") for line in lines) if s == source] for source in sources]
        assert [block.split("\n") for block in blocks] == expected


def test_both_folders_do_the_same(data):
    printed = []
    for folder, script in ((ROOT, "gpt2/train_e2e.py"), (ROOT / "gpt2", "train_e2e.py")):
        result = run_command(script, "--mode", "webnlg", "--notes", ODD, "--dry_run", cwd=folder)
        assert result.returncode == 0, result.stderr
        printed.append(result.stdout)
    assert printed[0] == printed[1]
    assert f"/gpt2/webnlg_models/webnlg-prefixtune-{ODD}-s101-" in shlex.split(printed[0])[-1]


@pytest.mark.cold
def test_killed_and_resumed_run_ends_with_the_same_weights(run, data, tmp_path, caplog):
    whole, _ = run
    output = tmp_path / "killed"
    command = training_command(data, output, "--epoch", "2", "--save_steps", "5", "--skip_decode", "yes")
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not list(output.glob("checkpoint-*")) and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)  # the launcher has become the child, so this is the training itself
    process.wait()
    assert list(output.glob("checkpoint-*"))
    assert not (output / "prefix_config.json").exists(), "killed too late: the run had ended"
    with pytest.raises(UserError, match="holds an earlier run: --resume yes goes on with it"):
        train_here(train_e2e, *command[1:])
    with pytest.raises(UserError, match=r"--learning_rate 0\.5 contradicts"):
        train_here(train_e2e, *command[1:], "--resume", "yes", "--learning_rate", "0.5")
    resumed = run_command(*command, "--resume", "yes")
    assert resumed.returncode == 0, resumed.stderr
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(output)[name], tensor), name
    before = {path: path.read_bytes() for path in output.glob("*.safetensors")}
    trained = json.loads((output / "results.json").read_text())["training"]
    with caplog.at_level("INFO"):
        train_here(train_e2e, *command[1:], "--resume", "yes")
    assert "trained to its end" in caplog.text
    assert json.loads((output / "results.json").read_text())["training"] == trained
    assert all(path.read_bytes() == data for path, data in before.items())
    (output / "results.json").unlink()  # as if killed between the last checkpoint and the end
    for path in before:
        path.unlink()
    train_here(train_e2e, *command[1:], "--resume", "yes")
    again = json.loads((output / "results.json").read_text())["training"]
    same = ("steps", "dev_loss", "first_train_loss", "last_train_loss", "tokens_seen")
    assert [again[name] for name in same] == [trained[name] for name in same]
    assert {path: path.read_bytes() for path in before} == before


def test_a_plain_model_s_folder_is_not_written_into(data, tmp_path):
    model = data / "model" if (data / "model").is_dir() else ROOT / "data" / "demo" / "gpt2"
    command = gen.build_command(*gen.parse_args(["webnlg", "yes", "valid", str(model), "no", "--demo", "yes"]))
    with pytest.raises(UserError, match="is a model, not the folder of a run: say with --output_dir"):
        run_generation.main(command[2:])


def test_ctrl_c_is_one_line_and_names_the_checkpoint(data, tmp_path):
    output = tmp_path / "stopped"
    command = training_command(data, output, "--epoch", "500", "--save_steps", "5")
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not list(output.glob("checkpoint-*")) and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "--resume yes goes on from" in stderr
    assert stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in stderr


@pytest.mark.cold
def test_two_processes_equal_one_with_the_same_global_batch(run, data, tmp_path):
    compare_processes(data, tmp_path / "two", run[0])


def test_two_processes_equal_one_when_steps_share_a_run_of_the_network(data, tmp_path):
    accumulated = ("--gradient_accumulation_steps", "2")
    single = training_command(data, tmp_path / "one", "--epoch", "2", "--skip_decode", "yes", *accumulated)
    train_here(train_e2e, *single[1:])
    compare_processes(data, tmp_path / "two", tmp_path / "one", *accumulated)


def compare_processes(data, output, single, *flags):
    """Train with two processes and hold the weights to those of the run in `single`."""
    two = ("--epoch", "2", "--skip_decode", "yes", "--num_processes", "2", *flags)
    result = run_command(*training_command(data, output, *two))
    assert result.returncode == 0, result.stderr
    for name, tensor in weights(single).items():
        assert (weights(output)[name] - tensor).abs().max() < 1e-3, name


def test_gen_decodes_as_training_did_whatever_the_batch_size(run, data, tmp_path):
    output, _ = run
    for split in ("valid", "test"):
        result = run_command(
            *("gen.py", "data2text", "yes", split, f"{output}/", "no", "--data_dir", data),
            *("--output_dir", tmp_path, "--batch_size", "2"),
            cwd=ROOT / "gpt2",
        )
        assert result.returncode == 0, result.stderr
        assert f"{split}: BLEU" in result.stdout
        for kind in ("beam", "gold", "src"):
            name = f"{output.name}_{split}_{kind}"
            assert (tmp_path / name).read_bytes() == (output / name).read_bytes()
    assert set(json.loads((tmp_path / "results.json").read_text())["decoding"]) == {"valid", "test"}


def test_gen_refreshes_the_card_of_the_checkpoint_that_it_scores(run, data, tmp_path):
    whole, _ = run
    output = tmp_path / "copy"
    shutil.copytree(whole, output)
    before = (output / "README.md").read_text()
    assert decode(output, data, "--length", "1", "--output_dir", str(tmp_path / "elsewhere")) == 0
    assert (output / "README.md").read_text() == before  # the outputs go elsewhere, and so does everything else
    assert decode(output, data, "--length", "1") == 0
    after = (output / "README.md").read_text()
    scores = json.loads((output / "results.json").read_text())["decoding"]["test"]["scores"]
    assert f"| test NIST | {scores['NIST']:.4g} |" in after
    changed = [line for line in after.splitlines() if line not in before.splitlines()]
    assert changed
    assert all(line.startswith("| test ") for line in changed)


def decode(checkpoint, data, *more, mode="data2text"):
    where = ["--data_dir", str(data), "--disable_tqdm", "yes"]
    return run_generation.main(["--mode", mode, "--split", "test", "--checkpoint", str(checkpoint), *where, *more])


def test_greedy_and_nucleus_write_files_of_their_own(run, data, tmp_path):
    output, _ = run
    texts = {}
    for strategy, seed in (("greedy", 1), ("nucleus", 1), ("nucleus", 2)):
        folder = tmp_path / f"{strategy}{seed}"
        flags = ["--strategy", strategy, "--seed", str(seed), "--output_dir", str(folder), "--length", "30"]
        assert decode(output, data, *flags) == 0
        texts[strategy, seed] = (folder / f"{output.name}_test_{strategy}").read_text()
    assert texts["nucleus", 1] != texts["nucleus", 2]
    assert all(len(text.splitlines()) == len(texts["greedy", 1].splitlines()) for text in texts.values())


def test_finetune_trains_saves_and_decodes(data, tmp_path):
    output = tmp_path / "finetune"
    more = ("--tuning_mode", "finetune", "--max_steps", "6", "--learning_rate", "0.001")
    train_here(train_e2e, *training_command(data, output, *more, settings=SETTINGS)[1:])
    names = {path.name for path in output.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "task_config.json"} <= names
    assert not any(name.startswith("prefix_") for name in names)
    results = json.loads((output / "results.json").read_text())
    assert results["training"]["trainable_parameters"] == results["training"]["stored_parameters"]
    assert decode(output, data, "--output_dir", str(tmp_path / "again")) == 0
    again = (tmp_path / "again" / "finetune_test_beam").read_text()
    assert again == (output / "finetune_test_beam").read_text()
    with pytest.raises(UserError, match="--mode webnlg contradicts .*, which was trained with mode data2text"):
        decode(output, data, mode="webnlg")
    with pytest.raises(UserError, match="is a whole model itself"):
        decode(output, data, "--model_name_or_path", str(DEMO / "gpt2"))


def test_webnlg_is_scored_for_seen_and_unseen_categories(data, tmp_path):
    output = tmp_path / "webnlg"
    arguments = ["--mode", "webnlg", "--model_name_or_path", str(DEMO / "gpt2"), "--data_dir", str(data)]
    arguments += ["--output_dir", str(output), "--max_steps", "3", *PREFIX, "--gradient_checkpointing", "yes"]
    assert run_language_modeling.main(arguments) == 0
    categories = json.loads((output / "prefix_config.json").read_text())["task"]["categories"]
    entries = json.loads((data / "webnlg_challenge_2017" / "train.json").read_text())["entries"]
    assert categories == sorted({next(iter(entry.values()))["category"] for entry in entries})
    scores = json.loads((output / "results.json").read_text())["decoding"]["test"]["scores"]
    assert {"BLEU all"} <= scores.keys()


# ---- wrong input: each is one line that names the flag or the place, and changes nothing that was there --------------


def train(data, tmp_path, *more):
    where = ["--model_name_or_path", str(DEMO / "gpt2"), "--output_dir", str(tmp_path / "out")]
    files = ["--train_file", str(data), "--eval_file", str(data)] if data else []
    return run_language_modeling.main(["--mode", "data2text", *where, *PREFIX, *files, *more])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name : A||A text .\nno bars here\n", r"bad:2: expected source\|\|target"),
        ("", "bad: no examples in it"),
        (b"name : \xff||x\n", "bad: not UTF-8 text"),
        ("name : A <|endoftext|>||x\n", "bad:1: .*separates source and target"),
        (None, "bad: no such file for mode data2text"),
    ],
)
def test_a_bad_training_file_is_named(tmp_path, content, message):
    path = tmp_path / "bad"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        train(path, tmp_path)
    assert "\n" not in str(error.value)


def test_json_of_another_shape_is_named(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"entries": [{"1": {"triples": []}}]}))
    with pytest.raises(UserError, match=r"bad.json: entry 1: expected .*modifiedtripleset"):
        train(path, tmp_path, "--mode", "webnlg")


def test_a_prefix_longer_than_the_model_is_refused(data, tmp_path):
    path = data / "e2e_data" / "src1_valid.txt"
    positions = json.loads((DEMO / "gpt2" / "config.json").read_text())["n_positions"]
    with pytest.raises(UserError, match=f"--preseqlen 5000: the model has {positions} positions"):
        train(path, tmp_path, "--preseqlen", "5000")


def test_texts_longer_than_the_model_are_cut_and_counted(tmp_path, caplog):
    path = tmp_path / "long"
    path.write_text(f"name : {'long ' * 2000}||{'text ' * 2000}\nname : A||A .\n" * 4)
    assert train(path, tmp_path, "--max_steps", "1", "--batch_size", "2") == 0
    assert "4 of 8 examples cut to" in caplog.text
    assert "1 of 2 sources cut to" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_fp16_without_a_gpu_is_refused(data, tmp_path):
    with pytest.raises(UserError, match="--fp16 yes needs a GPU and there is none here: use --bf16 yes"):
        train(data / "e2e_data" / "src1_valid.txt", tmp_path, "--fp16", "yes")


def test_a_diverging_run_says_so(data, tmp_path):
    path = data / "e2e_data" / "src1_train.txt"
    with pytest.raises(UserError, match=r"training stopped at step \d+: the loss is not a number"):
        train(path, tmp_path, "--learning_rate", "1e30", "--max_grad_norm", "0", "--logging_steps", "1")


def test_wrong_checkpoints_for_decoding(run, data, tmp_path):
    output, _ = run
    with pytest.raises(UserError, match="--mode webnlg contradicts .*, which was trained with mode data2text"):
        decode(output, data, mode="webnlg")
    with pytest.raises(UserError, match="no such folder"):
        decode(tmp_path / "nowhere", data)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is not a prefix checkpoint"):
        decode(tmp_path / "empty", data)
    damaged = tmp_path / "damaged"
    shutil.copytree(output, damaged)
    content = bytearray((damaged / "prefix_flat.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "prefix_flat.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="prefix_flat.safetensors is damaged"):
        decode(damaged, data)


def test_a_base_model_of_another_shape_is_refused(run, data, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    other = tmp_path / "other"
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=60)).save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "gpt2" / name, other / name)
    with pytest.raises(UserError, match="was trained for a model of another shape"):
        decode(run[0], data, "--model_name_or_path", str(other))


def test_no_network_is_one_line_that_says_what_to_pass(data, tmp_path):
    result = run_command(
        "gpt2/train_e2e.py", "--mode", "data2text", "--data_dir", data, "--output_dir", tmp_path / "out", *PREFIX
    )
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "cannot load openai-community/gpt2-medium from the hub" in result.stderr
    assert "--model_name_or_path DIR" in result.stderr


@pytest.mark.cold
def test_launchers_import_the_standard_library_alone():
    heavy = "{'torch', 'transformers', 'numpy', 'datasets', 'tqdm'}"
    check = f"import sys, gpt2.train_e2e, gpt2.gen; print(sorted({heavy} & set(sys.modules)))"
    assert run_command("-c", check).stdout == "[]\n"
    for script in ("train_e2e.py", "gen.py"):
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            assert run_command(ROOT / "gpt2" / script, "--help").returncode == 0
            seconds.append(time.perf_counter() - started)
        assert min(seconds) < 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["webnlg", "no", "test", ".", "no"], "invalid choice: 'no'"),
        (["webnlg", "yes", "train", ".", "no"], "invalid choice: 'train'"),
        (["poems", "yes", "test", ".", "no"], "invalid choice: 'poems'"),
        (["webnlg", "yes", "test", "/nowhere", "no"], "checkpoint /nowhere: no such folder"),
        (["webnlg", "yes", "test", ".", "no", "more"], "'more': too many arguments"),
        (["webnlg", "yes", "test", ".", "no", "--demo", "yes", "--data_dir", "x"], "--demo yes and --data_dir"),
    ],
)
def test_gen_refuses_what_cannot_be_meant(arguments, message):
    result = run_command("gpt2/gen.py", *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
