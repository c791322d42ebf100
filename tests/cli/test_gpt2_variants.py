"""Every kind of prefix as a user runs it: train, decode, resume, start from another run's weights."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gpt2 import building, run_generation, run_language_modeling
from prefixlib.decoding import outputs
from prefixlib.system.errors import UserError
from tests.conftest import ROOT, run_command

DEMO = ROOT / "data" / "demo"
FLAGS = ["--preseqlen", "3", "--bsz", "4", "--learning_rate", "0.01", "--disable_tqdm", "yes", "--save_steps", "2"]
MLP = ["--mid_dim", "8"]
VARIANTS = {  # name -> flags, the arrays that decoding loads
    "embedding": (["--prefix_mode", "embedding", *MLP], {"prefix"}),
    "embedding from text": (
        ["--prefix_mode", "embedding", "--parametrize_emb", "Emb", "--init_text", "the name"],
        {"prefix"},
    ),
    "infix": (["--format_mode", "infix", *MLP], {"prefix", "wte2"}),
    "infix from text": (
        ["--format_mode", "infix", "--init_shallow", "yes", "--init_text", "the name"],
        {"prefix", "wte2"},
    ),
    "nopeek": (["--format_mode", "nopeek", *MLP], {"prefix"}),
    "shallow word": (["--init_shallow", "yes"], {"prefix"}),
    "shallow random": (["--init_shallow", "yes", "--init_shallow_word", "no"], {"prefix"}),
    "deep": (["--use_deep", "yes", *MLP], {"prefix"}),
    "low data": (["--use_lowdata_token", "yes", "--lowdata_token", "table-to-text:", *MLP], {"prefix"}),
    "words": (["--optim_prefix", "no", *MLP], set()),
    "words of the source": (["--optim_prefix", "no", "--format_mode", "peek", *MLP], set()),
}


@pytest.fixture(autouse=True)
def unscored(monkeypatch):
    """Scores and plots have their own tests; METEOR's tables alone take longer to load than everything here."""
    monkeypatch.setattr(run_language_modeling.record, "plot_curves", lambda *arguments, **names: None)
    monkeypatch.setattr(outputs, "score", lambda *arguments: {})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sixteen training lines and three to decode, none of them much longer than the demo's shortest."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "e2e_data").mkdir()
    for split, count in (("train", 16), ("valid", 3)):
        lines = (DEMO / "e2e_data" / f"src1_{split}.txt").read_text().splitlines(keepends=True)
        (folder / "e2e_data" / f"src1_{split}.txt").write_text("".join(lines[:count]))
    return folder


def train(data, output, *more):
    where = ["--model_name_or_path", DEMO / "gpt2", "--data_dir", data, "--output_dir", output]
    return run_language_modeling.main([*map(str, [*where, *FLAGS, "--max_steps", "4", *more])])


def decode(checkpoint, data, output, *more):
    flags = ["--mode", "data2text", "--split", "valid", "--checkpoint", checkpoint, "--data_dir", data]
    flags += ["--output_dir", output, "--disable_tqdm", "yes", "--batch_size", "1", *more]
    assert run_generation.main([*map(str, flags)]) == 0
    return (output / f"{checkpoint.name}_valid_beam").read_text()


@pytest.mark.parametrize("variant", VARIANTS)
def test_train_decode_resume_and_start_again(data, tmp_path, variant, monkeypatch):
    flags, stored = VARIANTS[variant]
    whole = tmp_path / "whole"
    assert train(data, whole, *flags) == 0
    assert load_file(whole / "prefix_flat.safetensors").keys() == stored
    # decoded from the file, one by one, as the run itself decoded its module in a batch
    assert decode(whole, data, tmp_path / "again") == (whole / "whole_valid_beam").read_text()
    results = json.loads((whole / "results.json").read_text())
    assert results["training"]["steps"] == 4

    # a run that stopped after two of its four steps, and went on: the same weights, and no second start
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(run_language_modeling.PrefixTrainer, "training_step", stop_after_two_steps())
        with pytest.raises(KeyboardInterrupt):
            train(data, stopped, *flags, "--skip_decode", "yes")
    monkeypatch.setitem(building.STARTS, "text", lambda *a: pytest.fail("a resumed run started anew"))
    assert train(data, stopped, *flags, "--skip_decode", "yes", "--resume", "yes") == 0
    network = load_file(whole / "prefix_model.safetensors")
    for name, tensor in load_file(stopped / "prefix_model.safetensors").items():
        assert torch.equal(tensor, network[name]), name
    with pytest.raises(UserError, match=r"contradicts|says otherwise"):
        train(data, stopped, *flags, "--resume", "yes", "--dropout", "0.5")

    # another run starts from these weights; its first loss is the loss they had
    length = json.loads((whole / "prefix_config.json").read_text())["prefix"]["preseqlen"]
    texts = ("--init_text", "--use_lowdata_token", "--lowdata_token")
    same = [word for n, word in enumerate(flags) if word not in texts and (n == 0 or flags[n - 1] not in texts)]
    more = [
        "--preseqlen",
        length or 3,
        "--prefix_model_path",
        whole,
        "--learning_rate",
        "1e-12",
        "--skip_decode",
        "yes",
    ]
    assert train(data, tmp_path / "on", *same, *more) == 0
    for name, tensor in load_file(tmp_path / "on" / "prefix_model.safetensors").items():
        assert (tensor - network[name]).abs().max() < 1e-9, name


def stop_after_two_steps():
    step = run_language_modeling.PrefixTrainer.training_step
    seen = []

    def stopping(self, *args, **kwargs):
        seen.append(1)
        if len(seen) > 2:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    return stopping


def test_low_data_fine_tuning_puts_the_word_before_every_source(data, tmp_path):
    output = tmp_path / "finetuned"
    flags = ["--tuning_mode", "finetune", "--use_lowdata_token", "yes", "--lowdata_token", "sum up"]
    assert train(data, output, *flags, "--max_steps", "2") == 0
    sources = (output / "finetuned_valid_src").read_text().splitlines()
    assert sources
    assert all(source.startswith(" sum up name : ") for source in sources)
    again = decode(output, data, tmp_path / "again")
    assert (tmp_path / "again" / "finetuned_valid_src").read_text().splitlines() == sources
    assert again == (output / "finetuned_valid_beam").read_text()
    with pytest.raises(UserError, match="--lowdata_token another contradicts"):
        train(data, output, *flags[:-1], "another", "--max_steps", "2", "--resume", "yes")


def test_activation_checkpointing_trains_the_same_infix(data, tmp_path):
    losses = []
    for name, more in (("plain", []), ("recomputed", ["--gradient_checkpointing", "yes"])):
        flags = ["--format_mode", "infix", *MLP, "--skip_decode", "yes"]
        assert train(data, tmp_path / name, *flags, *more) == 0
        losses.append(json.loads((tmp_path / name / "results.json").read_text())["training"]["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("flags", [["--init_text", "the name of it"], ["--format_mode", "infix"]], ids=["cat", "infix"])
def test_a_llama_folder_trains_and_decodes_through_the_launchers(data, tmp_path, flags):
    """Grouped heads, rotary positions, an untied head, a tokenizer with its own eos and no padding token."""
    torch.manual_seed(0)
    words = {word for line in (data / "e2e_data" / "src1_train.txt").read_text().split("\n") for word in line.split()}
    vocabulary = {word: n for n, word in enumerate(["<unk>", "</s>", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path / "llama"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=2, eos_token_id=1,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
        )
    ).save_pretrained(folder)  # fmt: skip
    output = tmp_path / "run"
    where = ["--model_name_or_path", folder, "--data_dir", data, "--output_dir", output, "--max_steps", 4, *MLP]
    trained = run_command("gpt2/train_e2e.py", *FLAGS, *where, *flags, "--skip_decode", "yes")
    assert trained.returncode == 0, trained.stderr
    settings = json.loads((output / "prefix_config.json").read_text())["prefix"]
    assert (settings["n_head"], settings["head_dim"]) == (2, 4)
    assert settings["preseqlen"] == (4 if "--init_text" in flags else 3)
    outputs = {decode(output, data, tmp_path / str(n), "--batch_size", n) for n in (1, 3)}
    assert len(outputs) == 1
    assert len(outputs.pop().splitlines()) == len((tmp_path / "1" / "run_valid_src").read_text().splitlines())


def test_an_infix_made_of_words_is_refused(data, tmp_path):
    with pytest.raises(UserError, match="--optim_prefix no and --format_mode infix do not go together"):
        train(data, tmp_path / "x", "--optim_prefix", "no", "--format_mode", "infix")
