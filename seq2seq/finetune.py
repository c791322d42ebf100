"""Entry of summarisation and table-to-text with an encoder-decoder: data, model, fit / predict.

python seq2seq/finetune.py --mode xsum --preseqlen 200 --mid_dim 800 --output_dir runs/xsum
train_bart.py and train_e2e.py fill in the flags.
"""

import argparse
import functools
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from prefixlib.text import text_or_file

from prefixlib import adapters, attention, checkpoint, files, layers, record
from prefixlib.base_model import OWN_MODEL, load_model, load_tokenizer, resolve_model_name, save_whole
from prefixlib.beam_search import DecodingRule
from prefixlib.errors import UserError, one_line_errors
from prefixlib.launch import Parser, explicit_flags, tuning_settings
from seq2seq import flags, generation, predict, rouge
from seq2seq.callbacks import Checkpoints, LogLines
from seq2seq.initialise import start_from_text
from seq2seq.lightning_base import RESUME, BaseModule, find_resume, generic_train
from seq2seq.prefix_io import load_prefix, save_prefix
from seq2seq.prefixTuning import FAMILY, PrefixConfig, PrefixLM, PrefixTuning
from seq2seq.utils import (
    Collator,
    EpochBatches,
    ResumableLoader,
    find_file,
    find_lengths,
    load_examples,
    source_lengths,
)

logger = logging.getLogger("seq2seq.finetune")

DEFAULT_MODEL = "bart-large"
INPUTS = ("input_ids", "attention_mask", "decoder_input_ids", "labels")
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}


class SummarizationModule(BaseModule):
    """Training and validation of a PrefixLM on batches of Collator."""

    def __init__(self, lm: PrefixLM, args: argparse.Namespace, total_steps: int, tokenizer, rule: DecodingRule):
        super().__init__(lm, args, total_steps)
        self.tokenizer, self.rule = tokenizer, rule

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """The mean over the tokens of the global batch; each process holds a part of them."""
        total, count = self.lm.loss(*(batch[name] for name in INPUTS), smoothing=self.args.label_smoothing)
        sums = self._over_processes(torch.stack([total.detach(), count.to(total.dtype)]))
        # DDP divides the sum of the processes' gradients by their number
        loss = total * self.world / sums[1]
        tokens = batch["attention_mask"].sum() + count
        return {"loss": loss, "mean": sums[0] / sums[1], "tokens": tokens.detach() * self.world}

    def on_validation_start(self) -> None:
        prefix = self.lm.prefix(1) if self.lm.prefix is not None else {}
        self.frozen_prefix = {site: [(k.detach(), v.detach()) for k, v in layers] for site, layers in prefix.items()}
        self.sums = torch.zeros(7, dtype=torch.float64)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        total, count = self.lm.loss(*(batch[name] for name in INPUTS))
        best = generation.decode_batch(
            self.lm.base, batch["input_ids"], batch["attention_mask"], self.rule, self.frozen_prefix
        )
        self.sums[:2] += torch.tensor([total.item(), count.item()])
        for references, hypothesis in zip(batch["references"], best, strict=True):
            if references is not None:  # None: a filler
                scores = rouge.sentence_scores(generation.to_text(self.tokenizer, hypothesis.tokens), references)
                self.sums[2:] += torch.tensor([*scores.values(), len(hypothesis.tokens), 1])

    def on_validation_epoch_end(self) -> None:
        del self.frozen_prefix  # the next steps move the prefix
        loss, tokens, *sums, examples = self._over_processes(self.sums.float().to(self.device)).tolist()
        names = (*rouge.KINDS, "length")
        self.validated_step = self.trainer.global_step
        self.validation_result = {"loss": loss / tokens} | {n: s / examples for n, s in zip(names, sums, strict=True)}

    def _over_processes(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over the processes."""
        if self.world > 1:
            torch.distributed.all_reduce(values)
        return values


def main(argv: list[str] | None = None) -> int:
    args, given = parse_args(sys.argv[1:] if argv is None else argv)
    record.set_up_logging(verbose=os.environ.get("RANK", "0") == "0")
    _quiet_libraries()
    record.check_machine(fp16=args.fp16 == "yes")
    output = Path(args.output_dir).expanduser().resolve()
    if args.do_train == "yes":
        fit(args, output)
    else:
        predict.predict(args, given, output)
    return 0


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, set[str]]:
    """The flags, and which of them argv sets."""
    parser = Parser(description=__doc__.split("\n")[0])
    flags.add_all(parser)
    parser.add_argument("--output_dir", required=True, help="where the run is written")
    args, given = parser.parse_args(argv), explicit_flags(parser, argv)
    flags.check(args, given)
    return args, given


def _quiet_libraries() -> None:
    """Leave warnings to those that a user can act on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def fit(args: argparse.Namespace, output: Path) -> None:
    """Train, and leave in `output` the last and the best checkpoint, results.json and the curves."""
    resume_from = find_resume(args=args, output=output)
    started = time.perf_counter()
    paths = {
        split: find_file(args.mode, split, getattr(args, f"{split}_file"), args.data_dir) for split in ("train", "eval")
    }
    examples = {
        split: load_examples(args.mode, split, paths[split], getattr(args, f"n_{short}"))
        for split, short in (("train", "train"), ("eval", "val"))
    }
    record.seed_everything(args.seed)
    name = resolve_model_name(args.model_name_or_path or DEFAULT_MODEL)
    base = {"name": name, "revision": args.model_revision}
    tokenizer = load_tokenizer(name, revision=args.model_revision, cache_dir=args.cache_dir)
    lm = build_lm(args, base, tokenizer)
    lengths = find_lengths(args, lm.base.config)
    loaders = build_loaders(args, examples, tokenizer, lm.base.config, lengths)
    steps = -(-len(loaders[0]) // args.gradient_accumulation_steps) * args.epoch
    steps = min(steps, args.max_steps) if args.max_steps > 0 else steps
    module = SummarizationModule(lm, args, steps, tokenizer, generation.decoding_rule(args, lm.base.config))
    task = {
        "mode": args.mode,
        "tuning_mode": args.tuning_mode,
        "seed": args.seed,
        "max_source_length": lengths["source"],
        **tuning_settings(args),
    }
    save = functools.partial(save_model, lm=lm, tokenizer=tokenizer, base=base, task=task)
    log = LogLines(args.logging_steps)
    keep = Checkpoints(output, args.save_steps, args.val_metric, args.early_stopping_patience, save)
    trainable = sum(p.numel() for p in module.trainable().values())
    logger.info(
        "%s: %d of %d parameters are trained; %d training examples, %d steps",
        args.tuning_mode,
        trainable,
        sum(p.numel() for p in lm.parameters()),
        len(examples["train"]),
        steps,
    )
    trainer = generic_train(module, args, output, loaders, [log, keep], resume_from)
    if trainer.is_global_zero:
        finish(output, args, module, log, keep, save, seconds=time.perf_counter() - started, trainable=trainable)


def finish(
    output: Path,
    args: argparse.Namespace,
    module: SummarizationModule,
    log: LogLines,
    keep: Checkpoints,
    save,
    seconds: float,
    trainable: int,
) -> None:
    """Write the last weights, results.json and the curves; the resumable checkpoint has done its work."""
    save(output, module.validation_result)
    (output / RESUME).unlink(missing_ok=True)
    results = {
        "steps": module.trainer.global_step,
        "seconds": round(seconds, 1),
        "trainable_parameters": trainable,
        "best": keep.best,
        "last": module.validation_result,
        "curves": log.curves,
        "peak_memory_bytes": record.peak_memory_bytes(),
    }
    settings = {name: value for name, value in vars(args).items() if name not in ("output_dir",)}
    record.update_results(
        output, {"settings": settings, "train": results, "versions": record.versions(), "device": record.device_name()}
    )
    record.plot_curves(output / "loss.png", log.curves, xlabel="step", ylabel="loss per token", title=args.mode)
    best = f"best {args.val_metric}: {keep.best[args.val_metric]:.4g}" if keep.best else "not validated"
    logger.info("trained in %.0f s -> %s (%s)", seconds, output, best)


def build_lm(args: argparse.Namespace, base: dict[str, Any], tokenizer) -> PrefixLM:
    """The base model, with a prefix or adapters where the tuning mode has them; just what it trains needs gradients.

    A prefix is new or from --prefix_model_path.
    """
    dropout = NO_DROPOUT if args.tuning_mode == "prefixtune" and args.use_dropout == "no" else {}
    model = load_model(base["name"], FAMILY, revision=base["revision"], cache_dir=args.cache_dir, **dropout)
    prefix = None
    if args.tuning_mode == "finetune-top":
        layers.train_top(model, args.top_layers, embeddings=args.top_embeddings == "yes")
    elif args.tuning_mode == "adaptertune":
        adapters.insert(model, args.adapter_design, args.adapter_bottleneck)
        adapters.train_only_adapters(model)
    elif args.tuning_mode in flags.WITH_PREFIX:
        attention.install(model)
        prefix = new_prefix(args, model, tokenizer)
        if args.prefix_model_path:
            loaded = load_prefix(args.prefix_model_path)
            if loaded.config != prefix.config:
                raise UserError(
                    f"--prefix_model_path {args.prefix_model_path} was trained with other settings: "
                    + _differences(loaded.config, prefix.config)
                )
            prefix.load_state_dict(loaded.network)
    lm = PrefixLM(model, prefix, freeze=args.tuning_mode != "bothtune")
    if args.gradient_checkpointing == "yes":
        attention.enable_checkpointing(lm.base)
    return lm


def _differences(one: PrefixConfig, other: PrefixConfig) -> str:
    pairs = ((name, value, getattr(other, name)) for name, value in one.as_dict().items())
    return ", ".join(f"{name} {value}, not {wanted}" for name, value, wanted in pairs if value != wanted)


def new_prefix(args: argparse.Namespace, model: torch.nn.Module, tokenizer) -> PrefixTuning:
    """A prefix with the initialisation asked for: random, a text's keys and values, or the MLP regressed onto them."""
    shallow = args.init_shallow == "yes"
    text = args.init_shallow_word if shallow else args.lowdata_token if args.use_lowdata_token == "yes" else "no"
    if args.init_text is not None:
        text = text_or_file("--init_text", args.init_text)
    ids = [] if text == "no" and args.init_text is None else tokenizer(text, add_special_tokens=False)["input_ids"]
    limit = model.config.max_position_embeddings
    if (text != "no" or args.init_text is not None) and not 0 < len(ids) <= limit:
        raise UserError(f"the initial text has {len(ids)} tokens; it needs 1 to {limit}")
    if ids and len(ids) != args.preseqlen:
        logger.info("preseqlen %d: the tokens of the initial text", len(ids))
    config = PrefixConfig.for_model(
        model.config,
        preseqlen=len(ids) or args.preseqlen,
        mid_dim=args.mid_dim,
        prefix_dropout=args.dropout,
        use_deep=args.use_deep == "yes",
        **{f"use_{site}_prefix": getattr(args, f"use_{site}_prefix") == "yes" for site in flags.SITES},
        init_shallow=shallow,
    )
    prefix = PrefixTuning(config)
    if ids:
        start_from_text(prefix, model, ids)
    return prefix


def build_loaders(args, examples, tokenizer, config, lengths) -> tuple[ResumableLoader, torch.utils.data.DataLoader]:
    """Training batches, shuffled by the seed, and validation batches in file order; each process its own part."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    collate = functools.partial(
        Collator, tokenizer, config.pad_token_id, config.decoder_start_token_id, lengths["source"]
    )
    sizes = source_lengths(examples["train"]) if args.group_by_length == "yes" else None
    train = EpochBatches(len(examples["train"]), args.bsz, args.seed, rank, world, sizes)
    validation = EpochBatches(len(examples["eval"]), args.eval_batch_size * world, None, rank, world)
    return (
        ResumableLoader(examples["train"], train, collate(lengths["target"]), args.num_workers),
        ResumableLoader(examples["eval"], validation, collate(lengths["val_target"]), args.num_workers),
    )


def save_model(directory: Path, scores: dict[str, Any], *, lm: PrefixLM, tokenizer, base, task) -> None:
    """The prefix in its own format, and a model that was tuned in transformers', in DIRECTORY/model."""

    def write(folder: Path) -> None:
        lm.base.set_attn_implementation("sdpa")
        save_whole(folder, lm.base, tokenizer)
        attention.install(lm.base)
        checkpoint.save_task(folder, {**task, "base_model": base})

    if task["tuning_mode"] != "prefixtune":
        (directory / checkpoint.CONFIG).unlink(missing_ok=True)  # no prefix vouches for a model it wasn't tuned with
        files.replace_directory(directory / OWN_MODEL, write)
    if task["tuning_mode"] == "bothtune":
        task, base = {**task, "tuned_from": base["name"]}, {"name": OWN_MODEL, "revision": None}
    if lm.prefix is not None:
        save_prefix(directory, lm.prefix, base, task, scores)


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
