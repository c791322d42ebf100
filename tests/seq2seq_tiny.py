"""What the seq2seq tests share: a random BART with a byte vocabulary, small summaries, and training in this process."""

import json
from pathlib import Path

import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import BartConfig, BartForConditionalGeneration

SUBJECTS = ("cat", "dog", "owl", "fox", "hen", "bee")
ACTS = ("sat", "ran", "ate", "hid")


def make_bart(folder: Path, **settings) -> Path:
    """A model folder: 2+2 layers, width 16, one token per byte; dropout 0.1 unless `settings` say otherwise."""
    folder.mkdir(parents=True)
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *sorted(ByteLevel.alphabet()), "<mask>"]
    (folder / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BartTokenizer"}))
    torch.manual_seed(0)
    shape = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    shape |= {
        "init_std": 0.15,
        "attention_dropout": 0.1,
        "d_model": 16,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "max_position_embeddings": 128,
    }
    config = BartConfig(vocab_size=len(tokens), **{**shape, **settings})
    BartForConditionalGeneration(config).save_pretrained(folder)
    return folder


def random_model(family: str, **settings) -> torch.nn.Module:
    """A lively random "Bart", "MBart" or "Pegasus" in eval mode: 2+2 layers, width 16, no dropout."""
    torch.manual_seed(0)
    sides = {"layers": 2, "attention_heads": 2, "ffn_dim": 24}
    shape = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()}
    shape |= {"vocab_size": 90, "d_model": 16, "max_position_embeddings": 64, "init_std": 0.3, "dropout": 0.0}
    config = getattr(transformers, f"{family}Config")(**shape, decoder_start_token_id=2, **settings)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    model.final_logits_bias.copy_(torch.randn(1, 90))
    return model


def make_summaries(folder: Path, train: int = 23, rest: int = 5) -> Path:
    """{train,val,test}.source and .target; sources of different lengths."""
    folder.mkdir(parents=True)
    for split, size, shift in (("train", train, 0), ("val", rest, 1), ("test", rest, 2)):
        pairs = [(SUBJECTS[(n + shift) % 6], ACTS[(n * 5 + shift) % 4]) for n in range(size)]
        sources = [f"the {who} {act}" + " and so on" * (n % 3) + "." for n, (who, act) in enumerate(pairs)]
        (folder / f"{split}.source").write_text("".join(f"{line}\n" for line in sources))
        (folder / f"{split}.target").write_text("".join(f"{who} {act}\n" for who, act in pairs))
    return folder


def training_flags(model: Path, data: Path, output: Path, **changes) -> list[str]:
    """finetune.py's arguments for a run of seconds."""
    values = {
        **{"mode": "xsum", "model_name_or_path": model, "data_dir": data, "output_dir": output},
        **{"preseqlen": 3, "mid_dim": 8, "bsz": 4, "epoch": 2, "learning_rate": 0.01, "num_workers": 0},
        **{"max_source_length": 64, "max_target_length": 16, "num_beams": 2, "max_length": 12, "min_length": 2},
        **{"eval_batch_size": 3, "logging_steps": 1, "disable_tqdm": "yes", **changes},
    }
    return [f"--{name}={value}" for name, value in values.items() if value is not None]
