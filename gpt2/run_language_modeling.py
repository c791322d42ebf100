"""Entry of table-to-text training: data, model, trainer, then decoding and scores. train_e2e.py fills in the flags.

python gpt2/run_language_modeling.py --mode webnlg --model_name_or_path gpt2-medium --output_dir runs/webnlg
"""

import argparse
import functools
import logging
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from gpt2 import flags, run_generation
from gpt2.dataset import Format, TableToTextDataset, collate
from gpt2.distillation import Distillation, load_teacher
from gpt2.generator import Generator
from gpt2.prefix_config import PrefixConfig, max_positions
from gpt2.train_control import PrefixLM
from gpt2.trainer_prefix import PrefixTrainer, is_exhausted
from gpt2.tuning import base_record, check_same_prefix, load_base, load_weights, make_model, save_model
from prefixlib import checkpoint, files, record
from prefixlib.base_model import load_tokenizer, resolve_model_name
from prefixlib.errors import UserError, one_line_errors
from prefixlib.launch import Parser, tuning_settings
from prefixlib.readers import data_file, read_records

logger = logging.getLogger("gpt2.run_language_modeling")

# Settings that shape the weights: a resumed run must repeat them, so they stand in the checkpoint.
TRAINING_SETTINGS = (
    *(
        "mode",
        "tuning_mode",
        "objective_mode",
        "use_dropout",
        "bsz",
        "gradient_accumulation_steps",
        "epoch",
        "max_steps",
    ),
    "early_stopping_patience",
    *("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "dropout", "seed", "bf16", "fp16"),
    *("max_source_length", "train_max_target_length", "val_max_target_length"),
    *("distill", "finetuned_model_path", "matching_objective", "matching_positions", "use_custom_teacher_dropout"),
)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    rank = int(os.environ.get("RANK", "0"))
    record.set_up_logging(verbose=rank == 0)
    output = Path(args.output_dir).expanduser().resolve()
    resume_from = find_resume(args, output)
    paths = {split: find_file(args, split) for split in ("train", "valid", "test")}
    record.seed_everything(args.seed)
    name = resolve_model_name(args.model_name_or_path)
    tokenizer = load_tokenizer(name, revision=args.model_revision, cache_dir=args.cache_dir)
    records = {split: read_records(args.mode, paths[split]) for split in ("train", "valid")}
    base = load_base(name, args)
    task = training_settings(args)
    task["categories"] = sorted({row.category for row in records["train"]} - {""})
    if args.tuning_mode == "finetune":
        task["lowdata_token"] = args.lowdata_token if args.use_lowdata_token == "yes" else ""
    model = make_model(args, base, tokenizer, resuming=resume_from is not None)
    room = max_positions(base.config) - (model.prefix.config.preseqlen if isinstance(model, PrefixLM) else 0)
    form = model.prefix.config.form if isinstance(model, PrefixLM) else Format(word=task.get("lowdata_token", ""))
    distillation = make_distillation(args, model, room)
    limits = {"train": args.train_max_target_length, "valid": args.val_max_target_length}
    datasets = {
        split: TableToTextDataset(args.mode, rows, tokenizer, room, form, args.max_source_length, limits[split])
        for split, rows in records.items()
    }
    save = functools.partial(
        save_model, model=model, tokenizer=tokenizer, base=base_record(name, base, args), task=task
    )
    trainer = make_trainer(args, output, model, tokenizer, datasets, save, distillation)
    training = train(args, trainer, model, resume_from, output)
    training["examples"] = len(datasets["train"])
    training["tokens_cut"] = datasets["train"].tokens_cut
    if rank != 0:
        return 0
    run = {
        "command": shlex.join(sys.argv),
        **task,
        "base_model": name,
        "device": record.device_name(),
        **record.versions(),
    }
    record.update_results(output, {"run": run, "training": training})
    if args.skip_decode == "no":
        decode_splits(args, model, tokenizer, task, output, paths, save)
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0])
    flags.add_all(parser)
    parser.add_argument("--output_dir", required=True, help="where checkpoints, logs, curves and results go")
    args = parser.parse_args(argv)
    flags.check(args)
    flags.fill_limits(args)
    if args.finetuned_model_path:  # resolved: it stands in the checkpoint, and a resumed run must name the same one
        args.finetuned_model_path = str(Path(args.finetuned_model_path).expanduser().resolve())
    if not args.model_name_or_path:
        raise UserError("--model_name_or_path is missing (train_e2e.py fills it in)")
    record.check_machine(fp16=args.fp16 == "yes")
    return args


def training_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What shapes the weights of this run, under the flags' names."""
    settings = {key: getattr(args, key) for key in TRAINING_SETTINGS if getattr(args, key) is not None}
    return settings | tuning_settings(args)


def find_file(args: argparse.Namespace, split: str) -> Path | None:
    """The data file of a split: the flag's, or the mode's own; None for a test set that is not there."""
    given = {"train": args.train_file, "valid": args.eval_file, "test": args.test_file}[split]
    if given:
        return Path(given).expanduser().resolve()
    if split == "test" and args.train_file:
        return None  # the standard test set does not belong to one's own training file
    path = data_file(args.mode, split, args.data_dir)
    return path if split != "test" or path.is_file() else None


def find_resume(args: argparse.Namespace, output: Path) -> Path | None:
    """The checkpoint to go on from, if any. Raises UserError where a result would be overwritten or does not fit."""
    last = get_last_checkpoint(str(output)) if output.is_dir() else None
    if args.resume == "no":
        finished = [name for name in (checkpoint.CONFIG, "model.safetensors") if (output / name).exists()]
        if (last or finished) and args.overwrite_output_dir == "no":
            raise UserError(
                f"{output} holds an earlier run: --resume yes goes on with it, --overwrite_output_dir yes replaces it, "
                "--notes or --output_dir keep both"
            )
        return None
    if last is None:
        logger.info("nothing to resume in %s: starting from the beginning", output)
        return None
    if checkpoint.is_checkpoint(last):
        saved = checkpoint.read_config(last)
        settings, given = saved["task"], {}
        check_same_prefix(args, PrefixConfig.from_saved(saved["prefix"], last), last)
    else:
        settings = checkpoint.load_task(last)
        given = {"lowdata_token": args.lowdata_token if args.use_lowdata_token == "yes" else ""}
    checkpoint.check_agrees({**training_settings(args), **given}, settings, last)
    return Path(last)


def make_distillation(args: argparse.Namespace, model: nn.Module, room: int) -> Distillation | None:
    """The teacher of --distill yes, in the precision of the frozen base; None without."""
    if args.distill == "no":
        return None
    dtype = model.base.get_input_embeddings().weight.dtype
    teacher = load_teacher(Path(args.finetuned_model_path), args.mode, model.base, room, dtype)
    return Distillation(teacher, args.matching_objective, args.matching_positions)


def make_trainer(
    args, output: Path, model: nn.Module, tokenizer, datasets, save, distillation: Distillation | None
) -> PrefixTrainer:
    """transformers.Trainer with the original's optimisation: AdamW, linear decay without warm-up, clip 1.0."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(output / "runs"))
    settings = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=args.bsz // processes,
        per_device_eval_batch_size=max((args.eval_batch_size or args.bsz) // processes, 1),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        num_train_epochs=args.epoch,
        max_steps=args.max_steps,
        learning_rate=args.learning_rate,
        warmup_steps=args.warmup_steps,
        lr_scheduler_type="linear",
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        seed=args.seed,
        bf16=args.bf16 == "yes",
        fp16=args.fp16 == "yes",
        use_cpu=not torch.cuda.is_available(),
        eval_strategy="steps" if args.eval_steps else "epoch",
        eval_steps=args.eval_steps or None,
        save_strategy="steps" if args.save_steps else "epoch",
        save_steps=args.save_steps or 500,
        save_total_limit=1,
        logging_steps=args.logging_steps,
        logging_nan_inf_filter=False,  # a loss that is no number must be seen
        include_num_input_tokens_seen="non_padding",
        prediction_loss_only=True,
        remove_unused_columns=False,
        disable_tqdm=args.disable_tqdm == "yes" or (processes > 1 and os.environ["RANK"] != "0"),
        report_to="tensorboard",
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    settings._n_gpu = min(settings.n_gpu, 1)  # several GPUs are used through --num_processes, never by DataParallel
    return PrefixTrainer(
        model=model,
        args=settings,
        train_dataset=datasets["train"],
        eval_dataset=datasets["valid"],
        data_collator=functools.partial(collate, pad_token_id=tokenizer.eos_token_id),
        objective_mode=args.objective_mode,
        separator_id=tokenizer.eos_token_id,
        save_model_to=save,
        load_model_from=functools.partial(load_weights, model=model),
        keep_best=args.keep_best == "yes",
        patience=args.early_stopping_patience,
        distillation=distillation,
    )


def train(args, trainer: PrefixTrainer, model: nn.Module, resume_from: Path | None, output: Path) -> dict[str, Any]:
    """Run the training, save the final model into `output`, and return the numbers worth keeping."""
    if resume_from is None and args.overwrite_output_dir == "yes" and trainer.is_world_process_zero():
        outputs = (f"{output.name}_{split}_*" for split in ("valid", "test"))
        own = ("checkpoint-*", "config.json", "model*.safetensors*", "trainer_state.json", "runs", *outputs)
        files.clear_run(output, (*checkpoint.RUN_FILES, *own))
    ended = ended_run(resume_from, trainer.patience)
    if ended is not None:
        logger.info(
            "the run in %s was trained to its end, step %d: nothing is left to train", output, ended.global_step
        )
        trainer.load_model_from(resume_from)
        trainer.state = ended
        trained = record.read_results(output).get("training")
        if trained is not None:
            return trained
        if not any(row["step"] == ended.global_step for row in ended.log_history if "eval_loss" in row):
            trainer.evaluate()
    started = time.perf_counter()
    try:
        outcome = None if ended else trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    except KeyboardInterrupt:
        last = get_last_checkpoint(str(output)) if output.is_dir() else None
        logger.warning(
            "interrupted; %s", f"--resume yes goes on from {last}" if last else "no checkpoint was written yet"
        )
        raise
    seconds = time.perf_counter() - started
    trainer.save_model()
    trainer.save_state()
    history = trainer.state.log_history
    curves = {
        "train": [(row["step"], row["loss"]) for row in history if "loss" in row],
        "dev": [(row["step"], row["eval_loss"]) for row in history if "eval_loss" in row],
    }
    if trainer.is_world_process_zero():
        title = f"{args.mode}, {args.tuning_mode}"
        record.plot_curves(output / "loss.png", curves, xlabel="step", ylabel="loss", title=title)
    stored = 0
    if isinstance(model, PrefixLM):  # what decoding needs; a prefix made of the source needs its network
        prefix = model.prefix.stored(model.base) or model.prefix.state_dict()
        stored = sum(tensor.numel() for tensor in prefix.values())
    parameters = list(model.parameters())
    whole = sum(p.numel() for p in (model.base if stored else model).parameters())
    return {
        "seconds": round(seconds, 2),
        "steps": trainer.state.global_step,
        "train_loss": outcome.training_loss if outcome else None,
        "dev_loss": curves["dev"][-1][1] if curves["dev"] else None,
        "first_train_loss": curves["train"][0][1] if curves["train"] else None,
        "last_train_loss": curves["train"][-1][1] if curves["train"] else None,
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "base_parameters": whole if stored else None,
        "stored_parameters": stored if args.tuning_mode == "prefixtune" else stored + whole,
        "tokens_seen": trainer.state.num_input_tokens_seen,
        "peak_memory_bytes": record.peak_memory_bytes(),
    }


def ended_run(resume_from: Path | None, patience: int) -> TrainerState | None:
    """The trainer's state where a checkpoint is that of the run's last step: killed in what comes after training."""
    if resume_from is None:
        return None
    state = TrainerState.load_from_json(str(resume_from / "trainer_state.json"))
    losses = [row["eval_loss"] for row in state.log_history if "eval_loss" in row]
    return state if state.global_step >= state.max_steps or is_exhausted(losses, patience) else None


def decode_splits(args, model: nn.Module, tokenizer, task, output: Path, paths: dict[str, Path | None], save) -> None:
    """Decode and score valid and test, as the original does after training; scores go to results.json and the card."""
    argv = ["--mode", args.mode, "--split", "valid", "--checkpoint", str(output)]
    argv += ["--batch_size", str(args.batch_size), "--disable_tqdm", args.disable_tqdm]
    decoding_args = run_generation.make_parser().parse_args(argv)
    model.eval()
    base = model.base if isinstance(model, PrefixLM) else model
    prefix = model.prefix if isinstance(model, PrefixLM) else None
    generator = Generator.of(base, tokenizer, prefix, task)
    decoded = {}
    for split in ("valid", "test"):
        if paths[split] is None:
            logger.info("no test file: %s is not decoded", split)
            continue
        stem = output / f"{output.name}_{split}"
        decoded[split] = run_generation.decode_file(generator, args.mode, paths[split], stem, decoding_args)
        record.update_results(output, {"decoding": decoded})
        run_generation.print_scores(split, decoded[split]["scores"])
    scores = {f"{split} {name}": value for split, result in decoded.items() for name, value in result["scores"].items()}
    if isinstance(model, PrefixLM):
        save(output, scores=scores)


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
