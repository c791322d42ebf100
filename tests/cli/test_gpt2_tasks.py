"""Every task mode through training and decoding, and distillation from a teacher, as a user runs them; the demo."""

import json
import shutil

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from gpt2 import run_generation, run_language_modeling, train_e2e
from gpt2.model import Model
from prefixlib.data.tasks import SENTIMENT_OPENINGS, TOPIC_OPENINGS, data_file
from prefixlib.system.errors import UserError
from tests.conftest import ROOT, run_command, train_here

DEMO = ROOT / "data" / "demo"
MODEL = ["--model_name_or_path", str(DEMO / "gpt2"), "--preseqlen", "3"]
STEPS = ["--bsz", "4", "--max_steps", "3", "--learning_rate", "0.01", "--disable_tqdm", "yes"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few lines of each of the demo's sets, in the layout of data/; XSum's are CNN/DM's."""
    folder = tmp_path_factory.mktemp("data")
    for mode in ("sentiment", "topic", "writingPrompts", "cnndm"):
        for split, count in (("train", 12), ("valid", 3), ("test", 4)):
            path = data_file(mode, split, DEMO)
            for name in [path.name, path.with_suffix(".target").name][: 2 if mode == "cnndm" else 1]:
                target = folder / path.parent.name / name
                target.parent.mkdir(exist_ok=True)
                lines = (path.parent / name).read_text().splitlines(keepends=True)[:count]
                target.write_text("".join(lines))
    shutil.copytree(folder / "cnn_dm", folder / "xsum")
    return folder


def train(data, output, mode, *more):
    where = ["--mode", mode, "--data_dir", str(data), "--output_dir", str(output)]
    assert run_language_modeling.main([*where, *MODEL, *STEPS, "--skip_decode", "yes", *more]) == 0
    return output


def decode(data, checkpoint, mode, *more, split="test"):
    where = ["--mode", mode, "--data_dir", str(data), "--checkpoint", str(checkpoint), "--disable_tqdm", "yes"]
    assert run_generation.main([*where, "--length", "12", "--split", split, *more]) == 0
    return json.loads((checkpoint / "results.json").read_text())["decoding"][split]


@pytest.mark.parametrize(
    ("mode", "strategy", "outputs", "gold_lines", "score"),
    [
        ("xsum", "beam", 4, 8, "ROUGE-1"),
        ("cnndm", "beam", 4, 8, "ROUGE-L"),
        ("writingPrompts", "nucleus", 4, 8, "distinct-1"),
        ("classify-sentiment", "greedy", 4, 4, "accuracy"),
        ("classify-topic", "greedy", 4, 4, "accuracy"),
        ("sentiment", "nucleus", 3 * 2 * len(SENTIMENT_OPENINGS), None, "distinct-2"),
        ("topic", "nucleus", 3 * 4 * len(TOPIC_OPENINGS), None, "distinct-2"),
    ],
)
def test_a_mode_is_trained_and_decoded(data, tmp_path, mode, strategy, outputs, gold_lines, score):
    output = train(data, tmp_path / "run", mode)
    task = json.loads((output / "prefix_config.json").read_text())["task"]
    assert task["mode"] == mode
    assert task.get("val_max_target_length") == {"xsum": 60, "cnndm": 142}.get(mode)
    result = decode(data, output, mode)
    assert (result["strategy"], result["sentences"]) == (strategy, outputs)
    assert score in result["scores"]
    written = {path.name.removeprefix("run_test_"): path.read_text() for path in output.glob("run_test_*")}
    assert written.keys() == {strategy, "src"} | ({"gold"} if gold_lines else set())
    assert written[strategy].count("\n") == outputs
    assert written["src"].count("\n") == outputs // result["samples"]
    assert written.get("gold", "").count("\n") == (gold_lines or 0)


def test_split_means_what_it_says(data, tmp_path):
    """The original decoded the test file of classification and summaries whatever SPLIT was."""
    output = train(data, tmp_path / "run", "classify-topic")
    for split, lines in (("valid", 3), ("test", 4)):
        result = decode(data, output, "classify-topic", split=split)
        assert result["sentences"] == lines
        labels = [line.split("||")[0].strip() for line in data_file("topic", split, data).read_text().splitlines()]
        assert (output / f"run_{split}_gold").read_text().splitlines() == labels


@pytest.fixture
def decoded(monkeypatch):
    """The prompts that were given to the decoder, in its order."""
    prompts, decoder = [], Model.decode

    def spy(model, inputs, search, count, **kwargs):
        prompts.extend(example.prompt for example in inputs for _ in range(count))
        return decoder(model, inputs, search, count, **kwargs)

    monkeypatch.setattr(Model, "decode", spy)
    return prompts


def test_samples_stand_below_each_other_and_begin_with_the_opening(data, tmp_path, decoded):
    output = train(data, tmp_path / "run", "sentiment")
    openings = tmp_path / "openings"
    openings.write_text("Hawkford Airport\nThe band\n")
    texts = []
    for seed, batch in (("1", "5"), ("1", "2"), ("2", "5")):
        flags = ["--openings", str(openings), "--samples", "2", "--seed", seed, "--batch_size", batch]
        decode(data, output, "sentiment", *flags)
        texts.append((output / "run_test_nucleus").read_text().splitlines())
    assert texts[0] == texts[1] != texts[2]
    assert [line.startswith("Hawkford Airport") for line in texts[0]] == [True, True, False, False] * 2
    assert [line.startswith("The band") for line in texts[0]] == [False, False, True, True] * 2
    assert (output / "run_test_src").read_text().splitlines() == [
        f" {label} <|endoftext|> {opening}"
        for label in ("negative", "positive")
        for opening in ("Hawkford Airport", "The band")
    ]
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "gpt2", local_files_only=True)
    prompts = tokenizer((output / "run_test_src").read_text().splitlines())["input_ids"]
    assert decoded[:8] == [prompts[n] for n in (0, 0, 1, 1, 2, 2, 3, 3)]


def test_limits_travel_with_the_checkpoint(data, tmp_path, decoded):
    """Decoding cuts documents where training did, with no flag repeated."""
    output = train(data, tmp_path / "run", "cnndm", "--max_source_length", "7", "--train_max_target_length", "5")
    decode(data, output, "cnndm")
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "gpt2", local_files_only=True)
    documents = (data / "cnn_dm" / "test.source").read_text().splitlines()
    assert decoded == [[*ids[:7], tokenizer.eos_token_id] for ids in tokenizer(documents)["input_ids"]]


def test_stories_that_do_not_fit_are_cut_and_counted(data, tmp_path, caplog):
    path = tmp_path / "long"
    path.write_text(f"[ WP ] A door .|||{'It opened . <newline> ' * 200}\n[ WP ] A .|||B .\n" * 2)
    train(data, tmp_path / "run", "writingPrompts", "--train_file", str(path), "--eval_file", str(path))
    assert "2 of 4 examples cut to 253 tokens" in caplog.text  # 256 positions, 3 of them the prefix's


# ---- teachers and students -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("teacher") / "teacher"
    return train(data, output, "sentiment", "--tuning_mode", "finetune", "--learning_rate", "1e-3")


def test_a_teacher_with_its_own_dropout(data, tmp_path):
    flags = ["--tuning_mode", "finetune", "--use_custom_teacher_dropout", "yes", "--dropout", "0.3", "--max_steps", "1"]
    config = json.loads((train(data, tmp_path / "run", "sentiment", *flags) / "config.json").read_text())
    assert (config["resid_pdrop"], config["embd_pdrop"]) == (0.3, 0.0)


def student_command(data, output, teacher, *more):
    where = ["--mode", "sentiment", "--data_dir", data, "--output_dir", output, *MODEL, *STEPS, "--skip_decode", "yes"]
    return ["gpt2/train_e2e.py", *where, "--distill", "yes", "--finetuned_model_path", teacher, *more]


def prefix_weights(directory):
    return load_file(directory / "prefix_model.safetensors")


def test_two_processes_distil_as_one(data, teacher, tmp_path):
    """Over the tokens of the texts: padding differs where two processes pad their halves."""
    flags = ["--matching_positions", "text"]
    train_here(train_e2e, *student_command(data, tmp_path / "1", teacher, *flags)[1:])
    two = run_command(*student_command(data, tmp_path / "2", teacher, *flags, "--num_processes", "2"))
    assert two.returncode == 0, two.stderr
    assert not (tmp_path / "2" / "model.safetensors").exists()
    one, two = prefix_weights(tmp_path / "1"), prefix_weights(tmp_path / "2")
    assert all((two[name] - tensor).abs().max() < 1e-3 for name, tensor in one.items())


def test_distillation_is_recorded_and_not_mixed_up(data, teacher, tmp_path):
    output = tmp_path / "run"
    student = ["--distill", "yes", "--finetuned_model_path", str(teacher), "--matching_objective", "logits"]
    more = [*student, "--save_steps", "2", "--bf16", "yes", "--gradient_checkpointing", "yes"]
    train(data, output, "sentiment", *more)
    task = json.loads((output / "prefix_config.json").read_text())["task"]
    assert (task["distill"], task["matching_objective"], task["matching_positions"]) == ("yes", "logits", "all")
    assert task["finetuned_model_path"] == str(teacher)
    with pytest.raises(UserError, match="--matching_objective kl contradicts"):
        train(data, output, "sentiment", *more, "--resume", "yes", "--matching_objective", "kl")
    with pytest.raises(UserError, match="--mode topic contradicts .*, which was trained with mode sentiment"):
        train(data, tmp_path / "other", "topic", *student)


# ---- the demo --------------------------------------------------------------------------------------------------------


def test_the_demo_learns_topics(tmp_path):
    """Eight topics, so chance is 12.5 %; a quarter of the demo's epochs is enough to leave it far behind."""
    flags = ["--epoch", "3", "--output_dir", tmp_path / "run", "--disable_tqdm", "yes"]
    result = run_command("gpt2/train_e2e.py", "--demo", "yes", "--mode", "classify-topic", *flags)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    accuracy = results["decoding"]["test"]["scores"]["accuracy"]
    assert accuracy >= 80
    assert f"test: accuracy {accuracy:.4g}" in result.stdout
    gen = run_command("gpt2/gen.py", "classify-topic", "yes", "test", tmp_path / "run", "no", "--demo", "yes")
    assert gen.stdout.splitlines()[-1] == f"test: accuracy {accuracy:.4g}"
