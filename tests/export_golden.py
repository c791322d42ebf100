"""What the export tests share: model folders and checkpoints of the original made of the golden arrays."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gpt2.model import save_prefix
from gpt2.prefix_lm import PrefixLM
from gpt2.train_control import PrefixConfig, PrefixTuning
from tests.conftest import GOLDEN, SETTINGS

SPECIAL = {"gpt2": {"<|endoftext|>": 99, "[PAD]": 100}, "bart": {"<s>": 0, "<pad>": 1, "</s>": 2}}
SETTINGS_OF_ORIGINAL = {
    "gpt2": {"optim_prefix": True, "format_mode": "cat", "_my_arg_task_mode": "data2text"},
    "bart": {"use_prefix": True, "mid_dim": 16},
}
TASK = {"mode": "data2text", "tuning_mode": "prefixtune"}


def word_tokenizer(folder, eos, **special):
    """A tokenizer of one token per word for the golden models' 101 ids: the special ones, then w0, w1, ..."""
    names = {index: token for token, index in special.items()}
    vocabulary = {names.get(index, f"w{index}"): index for index in range(101)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w7"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if "<s>" in special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", special["<s>"]), ("</s>", special["</s>"])]
        )
    pad = next(token for token in special if "pad" in token.lower())
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=pad).save_pretrained(folder)


def make_golden_base(folder: Path, name: str) -> Path:
    """A model folder of the golden base model `gpt2` or `bart`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes((GOLDEN / f"{name}_config.json").read_bytes())
    (folder / "model.safetensors").write_bytes((GOLDEN / f"{name}_base.safetensors").read_bytes())
    word_tokenizer(folder, "<|endoftext|>" if name == "gpt2" else "</s>", **SPECIAL[name])
    return folder


def golden_state(name):
    arrays = load_file(GOLDEN / f"{name}_prefix.safetensors")
    return {key.removeprefix("prefix."): a for key, a in arrays.items() if key.startswith("prefix.")}, arrays


def write_original(folder: Path, name: str, **more) -> Path:
    """A checkpoint as the original code wrote it, with the golden weights: config.json + pytorch_model.bin."""
    folder.mkdir(parents=True)
    config = json.loads((GOLDEN / f"{name}_config.json").read_text())
    config |= {"preseqlen": 5, "prefix_dropout": 0.0} | SETTINGS_OF_ORIGINAL[name]
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({**golden_state(name)[0], **more}, folder / "pytorch_model.bin")
    return folder


def save_gpt2(folder, base, base_folder, preseqlen=3):
    """A checkpoint of a random prefix for `base`; returns its folder and the PrefixLM."""
    prefix = PrefixTuning(PrefixConfig.for_model(base, preseqlen=preseqlen, mid_dim=8, **SETTINGS))
    save_prefix(folder, prefix, {"name": str(base_folder), "revision": None}, TASK)
    return folder, PrefixLM(base, prefix).eval()
