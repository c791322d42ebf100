"""Entry of table-to-text training: flags -> settings -> model, data, loop, decoding. train_e2e.py fills in the flags.

python gpt2/run_language_modeling.py --mode webnlg --model_name_or_path gpt2-medium --output_dir runs/webnlg
"""

if __name__ == "__main__":
    from prefixlib.system import startup

    startup.begin()

import functools
import logging
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
from gpt2.flags import Settings
from gpt2.resuming import Resumption, find_resume, own_files
from gpt2.train_control import FAMILY
from gpt2.trainer_prefix import Distillation, PrefixTrainer, is_exhausted, keep_newest
from prefixlib.base_model import sharding
from prefixlib.checkpoints import best, folder
from prefixlib.data import data_digests
from prefixlib.data.conversations import Chat
from prefixlib.data.readers import Record
from prefixlib.data.special_tokens import check_rows, texts_of, warn_of_lost_characters
from prefixlib.data.tables import Columns
from prefixlib.data.tasks import OWN_DATA, categories_of, read_groups, read_records
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
    output = settings.output_folder()
    files.check_name(output, "--output_dir", f"{output.name}_valid_nucleus.jsonl")
    processes.connect()
    with files.lock(output):
        record.set_aside_damaged(output)
        return _train(settings, output)


def _train(settings: Settings, output: Path) -> TrainResult:
    resumption = find_resume(settings, output)
    paths = {split: settings.file(split) for split in ("train", "valid", "test")}
    to_decode = settings.decoded_after_training()
    record.seed_everything(settings.seed)
    splits = () if settings.context_samples else ("train", "valid")  # else the model writes its own texts
    if splits and settings.has_test and (settings.test_file or "test" in to_decode):
        splits = (*splits, "test")  # fails early on a wrong file name or a bad line
    records = read_data(settings.mode, {split: paths[split] for split in splits}, settings.columns)
    to_train = {split: rows for split, rows in records.items() if split != "test"}
    task = settings.training_settings()
    if records and isinstance(records["train"][0].source, Chat):
        settings.check_conversations()
        task["chat"] = True
    task["categories"] = categories_of(records.get("train", ()))
    if settings.tuning_mode == "finetune":
        task["lowdata_token"] = settings.source_word()
    if resumption and resumption.earlier:
        task[schedule.EARLIER] = resumption.earlier
    digested = {split: paths[split] for split in to_train}
    if settings.distill_context:
        digested["distill_context"] = settings.start_path
    task |= data_of_run(digested, resumption, settings.allow_other_data)
    texts = [text for row in records.get("train", ())[:20] for text in (row.source, row.target)]
    trained = building.new(settings, resuming=resumption is not None, task=task, texts=texts)
    if settings.mode in OWN_DATA:
        every = (text for row in records["train"] for text in (row.source, row.target))
        warn_of_lost_characters(trained.tokenizer, every)
    for split, rows in records.items():
        check_rows(trained.tokenizer, paths[split], texts_of(rows))
    distillation = context.make_distillation(trained, settings.preseqlen, settings.start_path, *settings.matching)
    if records:
        datasets = make_datasets(trained, to_train, settings.lengths())
    else:
        drawn = (settings.context_samples, settings.seed, not settings.disable_tqdm)
        datasets = context.sample_sets(distillation.teacher, trained.tokenizer, *drawn)
    steps = settings.steps(len(datasets["train"]))
    if resumption and not resumption.ended:
        data_digests.check_steps_left(resumption.state.global_step, steps, resumption.directory)
    trainer = make_trainer(settings, output, trained, datasets, distillation)
    first = trainer.is_world_process_zero()
    if first and resumption:
        keep_newest(output)  # killed while an older one was being removed
    elif first and settings.overwrite_output_dir:
        folder.clear_run(output, (*own_files(output), "runs"))
    mean_loss, training = None, None
    if resumption and resumption.ended:
        mean_loss, training = restore_end(trainer, resumption, output)
    if training is None:
        if first:
            record.write_settings(output, settings.of_the_run())
            log_start(trainer, trained, steps, settings.texts_per_step)
        training = run_training(trainer, trained, resumption, mean_loss)
        if first:
            decode = settings.decode_command(FAMILY, best.chosen(output, training))
            record.log_end(training, output, "" if settings.context_samples else decode)
    trained.lm.eval()
    sharding.gather(trained.base)  # the first process decodes alone
    scores = {}
    if first:
        best.restore(trained, output, training)
        known = decoded_earlier(output, training)
        if settings.distill_context and "context" not in training:
            training["context"] = context.what_is_kept(trained.lm, distillation.teacher, datasets["valid"])
        run = run_entry(settings.as_flags(), trained)
        record.update_results(output, {"run": run, "training": training, "decoding": known or None})
        if records and to_decode:
            wanted = {split: paths[split] if split == "valid" or settings.has_test else None for split in to_decode}
            how, where = settings.decoding(), best.chosen(output, training)
            scores = run_generation.decode_splits(trained, output, wanted, how, known, where)
    return TrainResult(trained, scores, trainer.state.log_history, output)


def read_data(mode: str, paths: Mapping[str, Path], columns: Columns) -> dict[str, Sequence[Any]]:
    """Records of the training and dev file, and the groups of the test file where `paths` has one."""
    found: dict[str, Sequence[Any]] = {}
    for split, path in paths.items():
        if split == "test":
            found[split] = read_groups(mode, path, blind=True, columns=columns)
            continue
        found[split] = read_records(mode, path, columns=columns)
        if not any(row.trainable and row.target.strip() for row in found[split]):
            raise UserError(f"{path}: no text to train on")
    return found


def run_entry(flags: Mapping[str, Any], trained: model.Model) -> dict[str, Any]:
    """The `run` entry of results.json."""
    return {
        "command": shlex.join(sys.argv),
        **{name: value for name, value in flags.items() if name != "output_dir"},
        **trained.task,
        "base_model": trained.base_record["name"],
        "device": record.device_name(),
        **record.versions(),
    }


def decoded_earlier(output: Path, training: Mapping[str, Any]) -> dict[str, Any]:
    """The `decoding` entries of results.json that were made with the weights of this training."""
    results = record.read_results(output)
    return results.get("decoding", {}) if results.get("training") == training else {}


def data_of_run(paths: Mapping[str, Path], resumption: Resumption | None, allow_other: bool) -> dict[str, Any]:
    """The digests of the run's data for its checkpoints. Raises UserError where a resumed run has other data."""
    if resumption is None:
        return data_digests.of_run(paths)
    where, step = resumption.directory, resumption.state.global_step
    return data_digests.of_resumed(paths, resumption.task, step, where, allow_other)


def make_datasets(
    trained: model.Model, records: Mapping[str, Sequence[Record]], lengths: Mapping[str, int | None]
) -> dict[str, TableToTextDataset]:
    """The records of each split as model inputs."""
    return {
        split: TableToTextDataset(
            trained.task["mode"],
            rows,
            trained.tokenizer,
            trained.text_positions,
            trained.format,
            source_limit=lengths["max_source_length"],
            target_limit=lengths["train_max_target_length" if split == "train" else "val_max_target_length"],
        )
        for split, rows in records.items()
    }


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


def restore_end(
    trainer: PrefixTrainer, resumption: Resumption, output: Path
) -> tuple[float | None, dict[str, Any] | None]:
    """The mean training loss of a run that was trained to its end, and its `training` entry, None if it is missing."""
    step = resumption.state.global_step
    logger.info("the run in %s was trained to its end, step %d: nothing is left to train", output, step)
    mean_loss = trainer.restore_end(resumption.directory, resumption.state)
    earlier = record.read_results(output).get("training")
    is_its = earlier is not None and earlier.get("steps") == step  # else of the run that this one prolongs
    return mean_loss, earlier if is_its else None


def run_training(
    trainer: PrefixTrainer, trained: model.Model, resumption: Resumption | None, mean_loss: float | None
) -> dict[str, Any]:
    """Run the loop, save the final model, and return the `training` entry of results.json.

    A run that has ended only writes what is missing after its last step; `mean_loss` is its training loss.
    """
    output, started = Path(trainer.args.output_dir), time.perf_counter()
    try:
        if resumption is None or not resumption.ended:
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
        title = f"{trained.task['mode']}, {trained.task['tuning_mode']}"
        record.plot_curves(output / "loss.png", curves, xlabel="step", ylabel="loss", title=title)
        losses = [loss for _, loss in curves["dev"]]
        best.warn_if_constant("loss", losses, is_exhausted(losses, trainer.patience))
    step, lowest = min(curves["dev"], key=lambda point: point[1], default=(None, None))
    kept = trainer.keep_best and step is not None and step == best.kept_step(output)
    return record.training_results(
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


def log_start(trainer: PrefixTrainer, trained: model.Model, steps: int, batch: int) -> None:
    """Say what is about to be trained. batch: texts per step."""
    record.log_start(
        trained.base_record["name"],
        trained.task["tuning_mode"],
        trained.count_parameters(),
        {"train": trainer.train_dataset, "valid": trainer.eval_dataset},
        size=trained.base.num_parameters(),
        steps=steps,
        batch=batch,
        output=Path(trainer.args.output_dir),
    )


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
