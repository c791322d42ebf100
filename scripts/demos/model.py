"""Shared parts of the two demo models: byte-level BPE, heads that start as a copying circuit, pretraining, saving."""

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup


def train_bpe(texts, vocabulary, first=(), last=()):
    """GPT-2's byte-level BPE over `texts`: `vocabulary` tokens, with the special tokens `first` and `last`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(last),
        special_tokens=list(first),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(last))
    return tokenizer


class CopyingStart:
    """The parts of an induction circuit (Olsson et al. 2022): with it copying is learned in minutes, not hours.

    One head attends to the previous token, by way of sinusoidal position codes, and writes that token's code beside the
    present one. A head in a later layer looks for positions whose previous token is the present one and copies the
    token there. Both models start with such a pair and are then trained. `weight(E, D)` maps E inputs to D outputs.
    """

    def __init__(self, width, size):
        self.size = size
        rates = torch.logspace(0.45, -2.2, size // 2)
        cos, sin = rates.cos().diag(), rates.sin().diag()
        self.rates = rates
        self.position_query = torch.zeros(width, size)  # the code of t becomes the code of t - 1
        self.position_query[:size] = torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)])
        self.position_key = torch.eye(width, size)
        axes = torch.zeros(width, width - size)  # tokens use the dimensions after the first `size`, which positions use
        axes[size:] = torch.linalg.qr(torch.randn(width - size, width - size))[0]
        self.token, self.before, self.copied = axes.split(size, dim=1)[:3]

    def embed(self, text, positions):
        """Set the position table to sinusoids in the first dimensions; clear these in the token table."""
        angles = torch.arange(len(positions))[:, None] * self.rates
        text[:, : self.size] = 0
        positions.zero_()
        positions[:, : self.size] = 0.15 * torch.cat([angles.sin(), angles.cos()], 1)


def pretrain(model, batches, steps, learning_rate):
    """Plain training on `batches` (dicts of model inputs): AdamW, 5 % warm-up, then cosine decay to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    model.train()
    bar = tqdm(batches, total=steps, desc="pretraining", mininterval=5)
    for step, batch in enumerate(bar):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def save(model, tokenizer, folder):
    """An HF folder with float16 weights; config.json says float32, so that they are loaded as float32."""
    model.config.dtype = "float32"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json, merges.txt
    weights = folder / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    weights.chmod(0o644)
