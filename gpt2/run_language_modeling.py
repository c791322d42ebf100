"""Entry of table-to-text training: flags -> settings -> model, data, loop, decoding. train_e2e.py fills in the flags.

python gpt2/run_language_modeling.py --mode webnlg --model_name_or_path gpt2-medium --output_dir runs/webnlg
"""

if __name__ == "__main__":
    from prefixlib.system import startup

    startup.begin()

import functools
import logging
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from gpt2 import building, context, model, run_generation
from gpt2.callbacks import recorders
from gpt2.dataset import TableToTextDataset, collate
from gpt2.flags import Decoding, Settings
from gpt2.resuming import Resumption, find_resume, own_files
from gpt2.train_control import FAMILY
from gpt2.trainer_prefix import Distillation, PrefixTrainer, is_exhausted, keep_newest, load_teacher
from prefixlib.base_model import sharding
from prefixlib.checkpoints import best, folder
from prefixlib.data import data_digests
from prefixlib.data.conversations import Chat
from prefixlib.data.readers import Record
from prefixlib.data.special_tokens import check_rows, texts_of, warn_of_lost_characters
from prefixlib.data.tasks import OWN_DATA, categories_of, data_file, given_file, read_groups, read_records
from prefixlib.runs import record, schedule
from prefixlib.settings.flags import USAGE, Parser
from prefixlib.system import files, processes
from prefixlib.system.errors import UserError, one_line_errors

logger = logging.getLogger("gpt2.run_language_modeling")


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves."""

    model: model.Model  # with the weights of the best dev loss where they were kept, else the last; in eval mode
    scores: dict[str, dict[str, float | None]]  # split -> name -> value; empty with skip_decode
    history: list[dict[str, Any]]  # the loop's log: step, loss or eval_loss, ...
    output_dir: Path


def main(argv: list[str] | None = None) -> int:
    processes.end_with_parent()
    record.set_up_logging(verbose=processes.is_first())
    train(parse(argv))
    processes.leave()
    return 0


def parse(argv: list[str] | None) -> Settings:
    """The command line as checked settings."""
    parser = Parser(description=__doc__.split("\n")[0], usage=USAGE)
    Settings.add_to(parser)
    settings = Settings.from_args(parser.parse_args(argv))
    settings.check()
    return settings


def train(settings: Settings) -> TrainResult:
    """Train as train_e2e.py does, decode and score the dev and test files, and leave it all in settings.output_dir.

    Raises UserError for settings that contradict each other, bad data, and an output folder that holds an earlier run
    or that another run is using.

    >>> result = train(Settings(mode="webnlg", output_dir="runs/webnlg", epoch=5))  # doctest: +SKIP
    >>> result.scores["test"]["BLEU all"]  # doctest: +SKIP
    """
    settings.check()
    settings.check_processes(processes.world_size())
    record.check_machine(settings.fp16, settings.bf16)
    record.set_up_reporting(settings.report_to)
    if not settings.output_dir:
        raise UserError("--output_dir is missing: where checkpoints, logs, curves and results go")
    output = Path(settings.output_dir).expanduser().resolve()
    files.check_name(output, "--output_dir", f"{output.name}_valid_nucleus.jsonl")
    processes.connect()
    with files.lock(output):
        record.set_aside_damaged(output)
        return _train(settings, output)


def _train(settings: Settings, output: Path) -> TrainResult:
    resumption = find_resume(settings, output)
    paths = {split: find_file(settings, split) for split in ("train", "valid", "test")}
    to_decode = () if settings.skip_decode else settings.splits_to_decode(paths["test"] is not None, ("valid", "test"))
    record.seed_everything(settings.seed)
    splits = () if settings.context_samples else ("train", "valid")  # else the model writes its own texts
    columns = settings.columns
    records = {split: read_records(settings.mode, paths[split], columns=columns) for split in splits}
    for split, rows in records.items():
        if not any(row.trainable and row.target.strip() for row in rows):
            raise UserError(f"{paths[split]}: no text to train on")
    to_test = []
    if records and paths["test"] and (settings.test_file or "test" in to_decode):
        # fails early on a wrong file name or a bad line
        to_test = read_groups(settings.mode, paths["test"], blind=True, columns=columns)
    task = settings.training_settings()
    if records and isinstance(records["train"][0].source, Chat):
        settings.check_conversations()
        task["chat"] = True
    task["categories"] = categories_of(records.get("train", ()))
    if settings.tuning_mode == "finetune":
        task["lowdata_token"] = settings.source_word()
    if resumption and resumption.earlier:
        task[schedule.EARLIER] = resumption.earlier
    task |= data_of_run(settings, {split: paths[split] for split in records}, resumption)
    texts = [text for row in records.get("train", ())[:20] for text in (row.source, row.target)]
    trained = building.new(settings, resuming=resumption is not None, task=task, texts=texts)
    if settings.mode in OWN_DATA:
        every = (text for row in records["train"] for text in (row.source, row.target))
        warn_of_lost_characters(trained.tokenizer, every)
    for split, rows in records.items():
        check_rows(trained.tokenizer, paths[split], texts_of(rows))
    if to_test:  # now, not when the training is done
        check_rows(trained.tokenizer, paths["test"], texts_of(to_test))
    distillation = make_distillation(settings, trained)
    if records:
        datasets = make_datasets(settings, trained, records)
    else:
        drawn = (settings.context_samples, settings.seed, not settings.disable_tqdm)
        datasets = context.sample_sets(distillation.teacher, trained.tokenizer, *drawn)
    if resumption and not resumption.ended:
        steps = steps_of(settings, len(datasets["train"]))
        data_digests.check_steps_left(resumption.state.global_step, steps, resumption.directory)
    trainer = make_trainer(settings, output, trained, datasets, distillation)
    training = run_training(settings, trainer, trained, resumption, output)
    trained.lm.eval()
    sharding.gather(trained.base)  # the first process decodes alone
    scores = {}
    if trainer.is_world_process_zero():
        best.restore(trained, output, training)
        run = {
            "command": shlex.join(sys.argv),
            **{name: value for name, value in settings.as_flags().items() if name != "output_dir"},
            **task,
            "base_model": trained.base_record["name"],
            "device": record.device_name(),
            **record.versions(),
        }
        results = record.read_results(output)
        known = results.get("decoding", {}) if results.get("training") == training else {}  # of these very weights
        if settings.distill_context and "context" not in training:
            training["context"] = context.what_is_kept(trained.lm, distillation.teacher, datasets["valid"])
        record.update_results(output, {"run": run, "training": training, "decoding": known or None})
        if records and to_decode:
            how = Decoding(
                **{"batch_size": settings.batch_size, "length": settings.max_new_tokens},
                **{"decode_limit": settings.decode_limit, "disable_tqdm": settings.disable_tqdm},
                data_dir=settings.data_dir,
            )
            wanted, where = {split: paths[split] for split in to_decode}, best.chosen(output, training)
            scores = run_generation.decode_splits(trained, output, wanted, how, known, where)
    return TrainResult(trained, scores, trainer.state.log_history, output)


def find_file(settings: Settings, split: str) -> Path | None:
    """The data file of a split: the flag's, or the task's own; None for a test set that is not there."""
    given = {"train": settings.train_file, "valid": settings.eval_file, "test": settings.test_file}[split]
    if given:
        return given_file(settings.mode, given, split)
    if split == "test" and settings.train_file:
        return None  # the standard test set does not belong to the user's own training file
    path = data_file(settings.mode, split, settings.data_dir)
    return path if split != "test" or path.is_file() else None


def data_of_run(settings: Settings, paths: Mapping[str, Path], resumption: Resumption | None) -> dict[str, Any]:
    """What the checkpoints say of the run's data. Raises UserError where a resumed run has others than before."""
    if settings.distill_context:
        paths = {**paths, "distill_context": Path(settings.distill_context).expanduser()}
    if resumption is None:
        return data_digests.of_run(paths)
    where, step = resumption.directory, resumption.state.global_step
    return data_digests.of_resumed(paths, resumption.task, step, where, settings.allow_other_data)


def make_datasets(
    settings: Settings, trained: model.Model, records: Mapping[str, Sequence[Record]]
) -> dict[str, TableToTextDataset]:
    """The records of each split as model inputs."""
    lengths = settings.lengths()
    return {
        split: TableToTextDataset(
            settings.mode,
            rows,
            trained.tokenizer,
            trained.text_positions,
            trained.format,
            source_limit=lengths["max_source_length"],
            target_limit=lengths["train_max_target_length" if split == "train" else "val_max_target_length"],
        )
        for split, rows in records.items()
    }


def make_distillation(settings: Settings, trained: model.Model) -> Distillation | None:
    """The teacher, in the precision of the frozen base: of --distill yes or --distill_context; None without."""
    if settings.distill_context:
        teacher = context.TextInFront(trained.base, building.context_ids(settings, trained.base, trained.tokenizer))
        positions = "text" if settings.matching_positions == "all" else settings.matching_positions
        return Distillation(teacher, settings.matching_objective, positions, settings.matching_top_k)
    if not settings.distill:
        return None
    dtype = trained.base.get_input_embeddings().weight.dtype
    directory = Path(trained.task["finetuned_model_path"])
    teacher = load_teacher(directory, settings.mode, trained.base, trained.text_positions, dtype)
    matching = (settings.matching_objective, settings.matching_positions, settings.matching_top_k)
    return Distillation(teacher, *matching)


def make_trainer(
    settings: Settings,
    output: Path,
    trained: model.Model,
    datasets: Mapping[str, TableToTextDataset],
    distillation: Distillation | None = None,
) -> PrefixTrainer:
    """transformers.Trainer with the original's optimisation: AdamW, linear decay without warm-up, clip 1.0."""
    world = processes.world_size()
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=settings.bsz // world,
        per_device_eval_batch_size=max((settings.eval_batch_size or settings.bsz) // world, 1),
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        num_train_epochs=settings.epoch,
        max_steps=settings.max_steps,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type="linear",
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        bf16=settings.bf16,
        fp16=settings.fp16,
        use_cpu=not torch.cuda.is_available(),
        eval_strategy="steps" if settings.eval_steps else "epoch",
        eval_steps=settings.eval_steps or None,
        save_strategy="steps" if settings.save_steps else "epoch",
        save_steps=settings.save_steps or 500,
        save_total_limit=1,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,  # a NaN or infinite loss must be seen
        include_num_input_tokens_seen="non_padding",
        prediction_loss_only=True,
        remove_unused_columns=False,
        disable_tqdm=settings.disable_tqdm or not processes.is_first(),
        report_to="none",  # see `recorders`
        run_name=output.name,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are used through --num_processes, never by DataParallel
    if settings.shard_base:  # the arguments have connected the processes
        sharding.shard(trained.lm, trained.base, arguments.device.type)
    separator = trained.tokenizer.eos_token_id

    def save(directory: Path) -> None:
        best.save(trained, directory, trainer.state.global_step)

    trainer = PrefixTrainer(
        model=trained.lm,
        args=arguments,
        train_dataset=datasets["train"],
        eval_dataset=datasets["valid"],
        data_collator=functools.partial(collate, pad_token_id=separator),
        objective_mode=settings.objective_mode if settings.has_prefix else 0,  # fine-tuning takes the token mean
        separator_id=separator,
        save_model_to=save,
        load_model_from=trained.load_weights,
        keep_best=settings.keeps_best,
        patience=settings.early_stopping_patience,
        distillation=distillation,
        callbacks=recorders(settings.report_to, output),
    )
    return trainer


def run_training(
    settings: Settings, trainer: PrefixTrainer, trained: model.Model, resumption: Resumption | None, output: Path
) -> dict[str, Any]:
    """Run the loop, save the final model into `output`, and return the `training` entry of results.json."""
    ended = resumption is not None and resumption.ended
    if resumption is None and settings.overwrite_output_dir and trainer.is_world_process_zero():
        folder.clear_run(output, (*own_files(output), "runs"))
    if resumption is not None and trainer.is_world_process_zero():
        keep_newest(output)  # killed while an older one was being removed
    if ended:
        step = resumption.state.global_step
        logger.info("the run in %s was trained to its end, step %d: nothing is left to train", output, step)
        mean_loss = trainer.restore_end(resumption.directory, resumption.state)
        earlier = record.read_results(output).get("training")
        if earlier is not None and earlier.get("steps") == step:  # else of the run that this one prolongs
            return earlier
    if trainer.is_world_process_zero():
        record.write_settings(output, settings)
        log_start(settings, trainer, trained, output)
    started = time.perf_counter()
    try:
        if not ended:
            outcome = trainer.train(resume_from_checkpoint=str(resumption.directory) if resumption else None)
            mean_loss = outcome.metrics["train_loss"]
    except KeyboardInterrupt:
        last = get_last_checkpoint(str(output)) if output.is_dir() else None
        logger.warning(
            "interrupted; %s", f"--resume yes goes on from {last}" if last else "no checkpoint was written yet"
        )
        raise
    seconds = time.perf_counter() - started
    with files.writing(output):
        trainer.save_model()
        trainer.save_state()
    history = trainer.state.log_history
    curves = {
        "train": [(row["step"], row["loss"]) for row in history if "loss" in row],
        "dev": [(row["step"], row["eval_loss"]) for row in history if "eval_loss" in row],
    }
    if trainer.is_world_process_zero():
        title = f"{settings.mode}, {settings.tuning_mode}"
        record.plot_curves(output / "loss.png", curves, xlabel="step", ylabel="loss", title=title)
    step, lowest = min(curves["dev"], key=lambda point: point[1], default=(None, None))
    kept = settings.keeps_best and step is not None and step == best.kept_step(output)
    training = record.training_results(
        seconds=seconds,
        steps=trainer.state.global_step,
        examples=len(trainer.train_dataset),
        curves=curves,
        parameters=trained.count_parameters(),
        train_loss=mean_loss,
        tokens_seen=trainer.state.num_input_tokens_seen,
        tokens_cut=getattr(trainer.train_dataset, "tokens_cut", 0),
        **({"best": {"loss": lowest, "step": step}} if kept else {}),
    )
    if trainer.is_world_process_zero():
        losses = [loss for _, loss in curves["dev"]]
        best.warn_if_constant("loss", losses, is_exhausted(losses, settings.early_stopping_patience))
        decode = settings.decode_command(FAMILY, best.chosen(output, training))
        record.log_end(training, output, "" if settings.context_samples else decode)
    return training


def log_start(settings: Settings, trainer: PrefixTrainer, trained: model.Model, output: Path) -> None:
    """Say what is about to be trained."""
    record.log_start(
        *(trained.base_record["name"], settings.tuning_mode, trained.count_parameters()),
        {"train": trainer.train_dataset, "valid": trainer.eval_dataset},
        size=trained.base.num_parameters(),
        steps=steps_of(settings, len(trainer.train_dataset)),
        batch=settings.bsz * settings.gradient_accumulation_steps,
        output=output,
    )


def steps_of(settings: Settings, examples: int) -> int:
    """Optimiser steps of the run, as the loop counts them."""
    batches = math.ceil(examples / settings.bsz)
    steps = math.ceil(settings.epoch * math.ceil(batches / settings.gradient_accumulation_steps))
    return settings.max_steps if settings.max_steps > 0 else steps


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
