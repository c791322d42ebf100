"""Training through the real loops on real lengths, and the WebNLG recipe (scripts/benchmark.py epoch, recipe).

This package: PrefixTrainer as run_language_modeling.py makes it. Peers: the stock transformers.Trainer on the same
examples in the same order, padded by the same collator.
"""

import argparse
import functools
import logging
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from benchmarks.decode import causal_steps, make_work, rule_of, sharpen
from benchmarks.lengths import draw, load_lengths
from benchmarks.models import (
    GROUPED,
    IDS,
    POSITIONS,
    STOCK,
    Batch,
    check_equal_losses,
    config_of,
    decoder_inputs,
    is_seq2seq,
    our_model,
)
from benchmarks.steps import in_turn, now, timed
from gpt2 import decoding, run_language_modeling
from gpt2.callbacks import TensorBoard
from gpt2.dataset import Encoded, collate
from gpt2.flags import Settings
from gpt2.model import Model
from prefixlib.system.errors import UserError
from seq2seq.utils import EpochBatches

LEARNING_RATE = 5e-5
RECIPE = {"epochs": 5}
RECIPE_SIZES = {"batches": 18_025 // 5, "sentences": 1_862}  # WebNLG 2017: good training texts at bsz 5; test inputs


class Stopwatch(TrainerCallback):
    """Seconds from the first to the last moment of training, and the loss of every step."""

    def __init__(self, device: str):
        self.device, self.losses = device, []

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = now(self.device)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds = now(self.device) - self.started


def make_examples(args: argparse.Namespace, count: int) -> list[Encoded]:
    """Random ids of real training lengths."""
    generator = torch.Generator().manual_seed(args.seed)

    def ids(number: int) -> list[int]:
        return torch.randint(*IDS, (number,), generator=generator).tolist()

    positions = POSITIONS - args.preseqlen
    pairs = draw(load_lengths(args, args.train_lengths), count, args.seed)
    return [Encoded(ids(min(s, positions // 2)), ids(min(t, positions // 2))) for s, t in pairs]


def our_trainer(args: argparse.Namespace, output: Path, model: nn.Module, examples, epochs: int, every: int):
    """PrefixTrainer from the entry's own function, without evaluation, saving and TensorBoard."""
    settings = Settings(
        mode="webnlg",
        bsz=args.bsz,
        epoch=epochs,
        learning_rate=LEARNING_RATE,
        logging_steps=every,
        objective_mode=0,  # the token mean, as in the stock Trainer
        disable_tqdm=True,
        seed=args.seed,
    )
    tokenizer = SimpleNamespace(eos_token_id=model.config.eos_token_id)
    trained = Model(model, tokenizer, {"mode": "webnlg"})
    trainer = run_language_modeling.make_trainer(settings, output, trained, {"train": examples, "valid": examples})
    trainer.args.eval_strategy, trainer.args.save_strategy = IntervalStrategy.NO, SaveStrategy.NO
    trainer.remove_callback(TensorBoard)
    return trainer


def stock_trainer(args: argparse.Namespace, output: Path, model: nn.Module, examples, epochs: int, every: int):
    """transformers.Trainer with the same optimisation: AdamW, linear decay without warm-up, clip 1.0."""
    settings = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=args.bsz,
        num_train_epochs=epochs,
        learning_rate=LEARNING_RATE,
        weight_decay=0.0,
        max_grad_norm=1.0,
        lr_scheduler_type="linear",
        seed=args.seed,
        use_cpu=args.device == "cpu",
        eval_strategy="no",
        save_strategy="no",
        logging_steps=every,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=args.device == "cuda",
    )
    pad = functools.partial(collate, pad_token_id=model.config.eos_token_id)
    trainer = Trainer(model=model, args=settings, train_dataset=examples, data_collator=pad)
    trainer.remove_callback(PrinterCallback)
    return trainer


def check_device(args: argparse.Namespace) -> None:
    if is_seq2seq(args):
        raise UserError(f"{args.what} is for GPT-2's shapes, not --shape {args.shape}")
    if torch.cuda.is_available() and args.device == "cpu":
        raise UserError(f"{args.what} --device cpu: Trainer uses a GPU if there is one; hide it first")


def train(args: argparse.Namespace, make_trainer, model: nn.Module, examples, epochs: int = 1, every: int = 1):
    """Train once; the stopwatch."""
    with tempfile.TemporaryDirectory() as folder:
        watch = Stopwatch(args.device)
        trainer = make_trainer(args, Path(folder), model, examples, epochs, every)
        trainer.add_callback(watch)
        quiet = logging.getLogger("gpt2")
        level = quiet.level
        quiet.setLevel(logging.WARNING)
        trainer.train()
        quiet.setLevel(level)
    return watch


def epoch(args: argparse.Namespace) -> dict[str, dict]:
    """Seconds of `--batches` batches per row, in turn; the first step's losses must agree."""
    if is_seq2seq(args):
        return bart_epoch(args)
    check_device(args)
    examples = make_examples(args, args.batches * args.bsz)
    models = {"prefix": our_model(args), **{row: STOCK[row](args) for row in args.rows if row in STOCK}}
    kinds = {row: our_trainer if row == "prefix" else stock_trainer for row in models}
    seconds: dict[str, list[float]] = {row: [] for row in models}
    losses: dict[str, list[float]] = {}
    for number in range(args.rounds + 1):  # the first is the warm-up, and gives the losses of equal weights
        for row, model in models.items():
            watch = train(args, kinds[row], model, examples)
            if number:
                seconds[row].append(watch.seconds)
            else:
                losses[row] = watch.losses
        if not number:
            check_equal_losses(args, {row: found[0] for row, found in losses.items()})
    table = timed(seconds)
    real = sum(map(len, examples))
    for row, numbers in table.items():
        numbers["tokens_per_second"] = real / numbers["seconds"]
        numbers["first_loss"], numbers["last_loss"] = losses[row][0], losses[row][-1]
    return table


def bart_epoch(args: argparse.Namespace) -> dict[str, dict]:
    """BART's rows on batches of XSum's lengths, without the loops around them; and grouped by length."""
    count = args.batches * args.bsz
    pairs = draw(load_lengths(args, args.train_lengths), count, args.seed)
    plain = EpochBatches(count, args.bsz, args.seed)
    grouped = EpochBatches(count, args.bsz, args.seed, lengths=[source for source, _ in pairs])
    batches = {row: [padded(args, pairs, members) for members in plain] for row in args.rows}
    batches[GROUPED] = [padded(args, pairs, members) for members in grouped]
    table = in_turn(args, batches)
    for numbers in table.values():
        numbers["tokens_per_second"] = sum(map(sum, pairs)) / numbers["seconds"]
    return table


def padded(args: argparse.Namespace, pairs: list[tuple[int, int]], members: list[int]) -> Batch:
    """Random ids of these examples' lengths, the same for an example in whichever batch, padded on the right."""
    sources, targets = [], []
    for n in members:
        generator = torch.Generator().manual_seed(args.seed + n)
        for side, length in zip((sources, targets), pairs[n], strict=True):
            side.append(torch.randint(*IDS, (length,), generator=generator))
    pad = config_of(args.shape).pad_token_id
    input_ids, labels = (
        nn.utils.rnn.pad_sequence(side, batch_first=True, padding_value=pad) for side in (sources, targets)
    )
    batch = {"input_ids": input_ids, "attention_mask": input_ids.ne(pad).long(), "labels": labels}
    batch["decoder_input_ids"] = decoder_inputs(args, labels)
    return {name: ids.to(args.device) for name, ids in batch.items()}


def recipe(args: argparse.Namespace) -> dict[str, dict]:
    """The WebNLG recipe's sizes on a GPU."""
    if args.device != "cuda":
        raise UserError("recipe would take hours on a CPU: run it with --device cuda")
    check_device(args)
    return train_and_decode(args)


def train_and_decode(args: argparse.Namespace) -> dict[str, dict]:
    """Random weights and ids of real lengths: 5 epochs of training, then the test inputs decoded."""
    model = our_model(args)
    watch = train(args, our_trainer, model, make_examples(args, args.batches * args.bsz), RECIPE["epochs"], every=50)
    work = make_work(args)
    base, eos = sharpen(model.eval().base), model.base.config.eos_token_id
    steps = causal_steps(work, eos)
    with torch.no_grad(), mock.patch.object(decoding, "CausalSteps", steps):
        started = now(args.device)
        decoding.decode(base, work.prompts, rule_of(args, eos), layers=model.prefix(1), batch_size=args.batch_size)
        seconds = now(args.device) - started
    numbers = {"training_seconds": watch.seconds, "decoding_seconds": seconds, "seconds": watch.seconds + seconds}
    return {"prefix": {**numbers, "examples": args.batches * args.bsz, "sources": args.sentences, **RECIPE}}
