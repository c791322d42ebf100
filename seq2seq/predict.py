"""Decoding a test file with a trained checkpoint: outputs in file order, scores, results.json. finetune.py calls it."""

import argparse
import logging
import time
from pathlib import Path
from typing import Any

import torch

from prefixlib import attention, checkpoint, files, record
from prefixlib.base_model import choose_base, load_model, load_tokenizer
from prefixlib.errors import UserError
from prefixlib.metrics import score_task, shown
from seq2seq import flags, generation, rouge
from seq2seq.generation import decoding_rule
from seq2seq.prefix_io import LoadedPrefix, load_prefix
from seq2seq.prefixTuning import FAMILY, PrefixConfig
from seq2seq.utils import count_cut, find_file, find_lengths, load_examples

logger = logging.getLogger(__name__)


def predict(args: argparse.Namespace, given: set[str], output: Path) -> None:
    """Decode the test file with a checkpoint; write test_beam_LENGTHPENALTY and the scores."""
    model, tokenizer, prefix, task = load_checkpoint(args, given)
    path = find_file(args.mode, "test", args.test_file, args.data_dir)
    examples = load_examples(args.mode, "test", path, args.n_test)
    examples = [examples[n] for n in range(len(examples))]
    if args.max_source_length is None:
        args.max_source_length = task.get("max_source_length")
    lengths = find_lengths(args, model.config)
    rule = decoding_rule(args, model.config)
    encoded = tokenizer([e.source for e in examples], max_length=lengths["source"], truncation=True)
    cut = count_cut(encoded)
    if cut:
        logger.warning("%d of %d sources cut to %d tokens", cut, len(examples), lengths["source"])
    started = time.perf_counter()
    layers = prefix.layers(model.device) if prefix is not None else {}
    best = generation.decode(
        model,
        encoded["input_ids"],
        rule,
        prefix=layers,
        batch_size=args.eval_batch_size,
        progress=args.disable_tqdm == "no",
    )
    seconds = time.perf_counter() - started
    texts = [generation.to_text(tokenizer, hypothesis.tokens) for hypothesis in best]
    target = output / f"test_beam_{rule.length_penalty}"
    files.write_text(target, "".join(f"{text}\n" for text in texts))
    scores = score(args, texts, examples, tokenizer, lengths["test_target"])
    record.update_results(
        output,
        {
            "test": {
                "data_file": str(path),
                "sources": len(texts),
                "sources_cut": cut,
                "seconds": round(seconds, 2),
                "rule": {name: getattr(rule, name) for name in rule.__dataclass_fields__},
                "scores": scores,
            },
            "versions": record.versions(),
            "device": record.device_name(),
        },
    )
    logger.info("%d texts in %.1f s (%.2f/s) -> %s", len(texts), seconds, len(texts) / seconds, target)
    for name, value in scores.items():
        logger.info("%s: %s", name, shown(value))


def load_checkpoint(args: argparse.Namespace, given: set[str]) -> tuple[Any, Any, LoadedPrefix | None, dict[str, Any]]:
    """Model on its device, tokenizer, prefix (None for a whole model), task. Raises UserError on any mismatch."""
    directory = Path(args.prefix_model_path or args.finetune_model_path).expanduser()
    told = {name: getattr(args, name) for name in given if name != "max_source_length"}
    prefix, revision = None, args.model_revision
    if args.prefix_model_path:
        prefix = load_prefix(directory)
        checkpoint.check_agrees(told, {**prefix.settings(), **prefix.task}, directory)
        task = prefix.task
        name, revision = choose_base(prefix.base, args.model_name_or_path, directory)
    else:
        directory = directory / "model" if (directory / "model" / "config.json").is_file() else directory
        if not (directory / "config.json").is_file():
            raise UserError(f"--finetune_model_path {directory}: no model folder there (it needs a config.json)")
        task = checkpoint.load_task(directory)
        if task.get("tuning_mode") == "bothtune":
            raise UserError(
                f"--finetune_model_path {directory} was tuned together with a prefix: pass --prefix_model_path "
                f"{directory.parent}, which holds both"
            )
        checkpoint.check_agrees(told, task, directory)
        name = str(directory.resolve())
    dtype = torch.float16 if args.fp16 == "yes" else torch.bfloat16 if args.bf16 == "yes" else torch.float32
    model = load_model(name, FAMILY, revision=revision, cache_dir=args.cache_dir, dtype=dtype)
    tokenizer = load_tokenizer(name, revision=revision, cache_dir=args.cache_dir)
    if prefix is not None:
        kept = {
            k: v for k, v in prefix.config.as_dict().items() if not k.startswith(("encoder_", "decoder_", "d_model"))
        }
        if PrefixConfig.for_model(model.config, **kept) != prefix.config:
            raise UserError(f"the prefix in {directory} was trained for a model of another shape than {name}")
    attention.install(model)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, prefix, task


def score(args: argparse.Namespace, texts: list[str], examples: list, tokenizer, target_length: int) -> dict[str, Any]:
    """The task's metrics over the corpus; for summaries also ROUGE-Lsum and the original's average, named as such."""
    row = flags.MODES[args.mode]
    pairs = [(text, example) for text, example in zip(texts, examples, strict=True) if example.references]
    if not pairs:  # a blind test set
        return {}
    texts, references = [text for text, _ in pairs], [list(example.references) for _, example in pairs]
    if row.is_table:
        categories = [example.category for _, example in pairs]
        return score_task(row.data, texts, references, categories=categories if any(categories) else None)
    ids = tokenizer(text_target=[r[0] for r in references], max_length=target_length, truncation=True)["input_ids"]
    cut = [generation.to_text(tokenizer, tokens) for tokens in ids]
    batch = 8 if args.prefix_model_path else 10  # the original's batch sizes, which its average depends on
    return {
        **score_task("xsum", texts, references),
        "ROUGE-Lsum": rouge.rouge_lsum(texts, references),
        "original's average": rouge.original_way(texts, cut, batch),
    }
