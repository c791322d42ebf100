"""Entry of summarisation and table-to-text with an encoder-decoder: train, or decode a test file and score it.

python seq2seq/finetune.py --mode xsum --preseqlen 200 --mid_dim 800 --output_dir runs/xsum
train_bart.py and train_e2e.py fill in the flags. In Python: `seq2seq.train(seq2seq.Settings(mode="xsum", ...))`.
"""

if __name__ == "__main__":
    from prefixlib.system import startup

    startup.begin()

import logging
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixlib.base_model import sharding
from prefixlib.base_model.load import on_device
from prefixlib.checkpoints import best
from prefixlib.data import data_digests
from prefixlib.data.conversations import Chat
from prefixlib.data.special_tokens import check_rows, warn_of_lost_characters
from prefixlib.data.tasks import OWN_DATA, categories_of, find_task
from prefixlib.methods.table import METHODS
from prefixlib.runs import record, schedule
from prefixlib.settings.flags import USAGE, Parser, explicit_flags
from prefixlib.system import files, processes
from prefixlib.system.errors import UserError, one_line_errors
from seq2seq import run_generation
from seq2seq.building import new
from seq2seq.callbacks import RESUME, Checkpoints, LogLines
from seq2seq.flags import Settings
from seq2seq.frozen_lm import max_positions
from seq2seq.lightning_base import SummarizationModule, generic_train
from seq2seq.model import Model, load
from seq2seq.prefixTuning import FAMILY
from seq2seq.resuming import Resumption, find_resume
from seq2seq.utils import Example, build_loaders, load_examples, texts_of

logger = logging.getLogger("seq2seq.finetune")


@dataclass(frozen=True)
class TrainResult:
    """A trained model and how its training went."""

    model: Model  # with the best weights, those of OUTPUT/best
    scores: dict[str, float]  # of these weights on the dev set: loss, rouge1, rouge2, rougeL, length in tokens
    history: dict[str, list[tuple[int, float]]]  # "train" and "dev": (step, loss per token)
    output_dir: Path
    decoded: dict[str, dict[str, Any]]  # split -> scores of what was decoded after training: see --decode


def main(argv: Sequence[str] | None = None) -> int:
    processes.end_with_parent()
    settings, given = parse_args(sys.argv[1:] if argv is None else argv)
    record.set_up_logging(verbose=not settings.do_train or processes.is_first())
    output = settings.output_folder()
    if not settings.do_train:
        run_generation.decode(settings, given)
        return 0
    finished = settings.resume and is_finished(output, settings.run_length())
    if finished and not left_to_decode(output, settings.decoded_after_training()):
        logger.info("the run in %s has finished: nothing is left to train", output)
        return 0
    train(settings)
    processes.leave()
    return 0


def parse_args(argv: Sequence[str]) -> tuple[Settings, frozenset[str]]:
    """The settings, and the names of those that argv gives. Raises UserError for contradictions."""
    parser = Parser(description=__doc__.split("\n")[0], usage=USAGE)
    Settings.add_to(parser)
    settings = Settings.from_args(parser.parse_args(argv))
    settings.check()
    return settings, frozenset(explicit_flags(parser, argv))


def is_finished(output: Path, wanted: Mapping[str, Any]) -> bool:
    """True where `output` holds a run that was trained to its end, and of the length `wanted`."""
    results = record.read_results(output)
    ran = {**wanted, **results.get("run", {})}  # earlier versions did not record all of them
    return "training" in results and all(ran[name] == value for name, value in wanted.items())


def left_to_decode(output: Path, splits: Sequence[str]) -> list[str]:
    """The splits that the run in `output`, trained to its end, has not decoded: it was stopped before."""
    known = record.read_results(output).get("decoding", {})
    return [split for split in splits if split not in known]


def train(settings: Settings) -> TrainResult:
    """Train, and leave in settings.output_dir the last and the best checkpoint, results.json and the curves.

    With settings.resume a run continues from its newest resumable checkpoint. A run that was trained to its end is
    loaded, and the files that it had not decoded yet are decoded.
    Raises UserError for settings, files or a base model that do not go together, and where the loss is NaN or infinite.

    >>> settings = Settings(mode="xsum", data_dir="data", output_dir="runs/xsum")
    >>> train(settings).model.generate(["The document to summarise."])  # doctest: +SKIP
    """
    settings.check()
    if not settings.do_train:
        raise UserError("train() with do_train=False: load(CHECKPOINT).generate(...) decodes a checkpoint")
    output = settings.output_folder()
    run_generation.quiet_libraries()
    settings.check_processes(processes.world_size())
    record.check_machine(settings.fp16, settings.bf16)
    record.set_up_reporting(settings.report_to)
    run_generation.check_output_name(output, settings.mode)
    processes.connect()
    with files.lock(output):
        if settings.resume and is_finished(output, settings.run_length()):
            return _finished(settings, output)
        record.set_aside_damaged(output)
        return _train(settings, output)


def _train(settings: Settings, output: Path) -> TrainResult:
    resumption = find_resume(settings, output)
    started = time.perf_counter()
    to_decode, columns = settings.decoded_after_training(), settings.columns
    paths = {split: settings.file(split) for split in ("train", "valid", "test")}
    if settings.test_file or "test" in to_decode:  # fails early on a wrong file name
        load_examples(settings.mode, "test", paths["test"], -1, columns)
    examples = {
        split: load_examples(settings.mode, split, paths[split], settings.first(split), columns)
        for split in ("train", "valid")
    }
    record.seed_everything(settings.seed)
    chat = isinstance(examples["train"][0].source, Chat)
    if chat:
        settings.check_conversations()
    model = new(settings, resuming=resumption is not None, texts=first_texts(examples["train"]))
    model.task |= {"chat": True} if chat else {}
    check_texts(model, examples, paths)
    if find_task(settings.mode).is_table:
        model.task["categories"] = categories_of(examples["train"])
    decoded_later = run_generation.read_splits(settings.files_to_decode(to_decode), settings.mode, columns)
    if "test" in decoded_later:  # now, not when the training is done
        run_generation.check_sources(model, paths["test"], decoded_later["test"])
    if resumption and resumption.earlier:
        model.task[schedule.EARLIER] = resumption.earlier
    data = data_of_run({split: paths[split] for split in examples}, resumption, output, settings.allow_other_data)
    model.task |= data
    config = model.base.config
    loaders = build_loaders(
        examples["train"],
        examples["valid"],
        model.tokenizer,
        config,
        settings.lengths(max_positions(config)),
        bsz=settings.bsz,
        eval_bsz=settings.eval_batch_size,
        seed=settings.seed,
        by_length=settings.group_by_length,
        workers=settings.num_workers,
        wording=model.wording,
    )
    steps = settings.steps(len(examples["train"]))
    if resumption:
        check_what_is_left(resumption, data, steps, len(loaders[0]))
    module = SummarizationModule(model.lm, settings, steps, model.tokenizer, model.rule(settings.search()))
    module.data = data
    log = LogLines(settings.logging_steps)

    def save(directory: Path, result: Mapping[str, float]) -> None:
        best.save(model, directory, int(result["step"]), result)

    keep = Checkpoints(output, settings.save_steps, settings.best_in, settings.early_stopping_patience, save)
    parameters = model.count_parameters()
    sizes = {"size": model.base.num_parameters(), "steps": steps, "output": output, "batch": settings.texts_per_step}
    record.write_settings(output, settings.of_the_run())
    record.log_start(model.base_record["name"], settings.tuning_mode, parameters, examples, **sizes)
    trainer = generic_train(module, settings, output, loaders, [log, keep], resumption)
    if trainer.is_global_zero:
        best.save(model, output, trainer.global_step, module.validation_result)
        trained = record.training_results(
            seconds=time.perf_counter() - started,
            steps=trainer.global_step,
            examples=len(examples["train"]),
            curves=log.curves,
            parameters=parameters,
            best=keep.best,
            last=module.validation_result,
        )
        more = data | ({schedule.EARLIER: module.earlier} if module.earlier else {})
        labels = {"xlabel": "step", "ylabel": "loss per token", "title": settings.title}
        record.plot_curves(output / "loss.png", log.curves, **labels)
        run = run_entry(settings.as_flags(), model, settings.best_in, more)
        # the run has finished; what was decoded earlier is not of these weights
        record.update_results(output, {"run": run, "training": trained, "decoding": None})
        record.log_end(trained, output, settings.decode_command(FAMILY, best.chosen(output, trained)))
    model.lm.eval()
    if trainer.world_size == 1:  # Lightning leaves it on the CPU
        on_device(model.lm)
    sharding.gather(model.base)  # the first process decodes alone
    decoded = {}
    if trainer.is_global_zero:
        best.restore(model, output, trained)
        decoded = run_generation.decode_splits(settings, model, decoded_later, output, settings.search())
    return TrainResult(model, scores_of(keep.best), log.curves, output, decoded)


def first_texts(examples: Sequence[Example]) -> list[str]:
    """The texts of the first rows, which show whether a tokenizer can write them."""
    first = [examples[n] for n in range(min(20, len(examples)))]
    return [text for example in first for text in (example.source, *example.references)]


def scores_of(best_result: Mapping[str, float]) -> dict[str, float]:
    """The figures of a validation without its step."""
    return {name: value for name, value in best_result.items() if name != "step"}


def data_of_run(
    paths: Mapping[str, Path], resumption: Resumption | None, output: Path, allow_other: bool
) -> dict[str, Any]:
    """The digests of the run's data for its checkpoints. Raises UserError where a resumed run has other data."""
    if resumption is None:
        return data_digests.of_run(paths)
    step = resumption.state["global_step"]
    return data_digests.of_resumed(paths, resumption.state, step, output / RESUME, allow_other)


def check_what_is_left(resumption: Resumption, data: Mapping[str, Any], steps: int, batches: int) -> None:
    """Raise UserError where the data, of `batches` an epoch and `steps` in all, leave nothing to train.

    A run that was stopped after its last step has nothing left either, and ends as it would have.
    """
    done, position = resumption.state["global_step"], resumption.state["position"]
    other = data.get(data_digests.EARLIER, []) != resumption.state.get(data_digests.EARLIER, [])
    if steps != done or other:
        data_digests.check_steps_left(done, steps, resumption.path)
    if 0 < batches <= position["batches"]:
        raise UserError(
            f"--resume yes: {resumption.path} is in an epoch's middle, after batch {position['batches']}, and these "
            f"data have {batches} batches an epoch: put the earlier data back until the epoch has ended"
        )


def check_texts(model: Model, examples: Mapping[str, Sequence[Example]], paths: Mapping[str, Path]) -> None:
    """Look for characters that are lost, and special tokens. Raises UserError for the token that ends a text."""
    if model.task["mode"] in OWN_DATA:
        every = (text for _, row in texts_of(examples["train"]) for text in row)
        warn_of_lost_characters(model.tokenizer, every)
    for split, rows in examples.items():
        check_rows(model.tokenizer, paths[split], texts_of(rows))


def _finished(settings: Settings, output: Path) -> TrainResult:
    """The result of a run that was trained to its end earlier, from its folder."""
    trained = record.read_results(output)["training"]
    history = {name: [tuple(point) for point in points] for name, points in trained.get("curves", {}).items()}
    base = None if METHODS[settings.tuning_mode].tunes_base else settings.model_name_or_path  # a tuned model is its own
    directory = best.chosen(output, trained)
    model = load(directory, model_name_or_path=base, cache_dir=settings.cache_dir)
    result = trained.get("last", {}) if directory == output else trained["best"]
    model.task.setdefault("step", result.get("step", trained["steps"]))  # earlier versions' checkpoints do not name it
    if processes.is_first():
        left = left_to_decode(output, settings.decoded_after_training())
        for split in left:
            logger.info("the run in %s was trained to its end; decoding its %s file", output, split)
        examples = run_generation.read_splits(settings.files_to_decode(left), settings.mode, settings.columns)
        run_generation.decode_splits(settings, model, examples, output, settings.search())
    decoded = {split: row["scores"] for split, row in record.read_results(output).get("decoding", {}).items()}
    return TrainResult(model, scores_of(result), history, output, decoded)


def run_entry(flags: Mapping[str, Any], model: Model, best_in: str, more: Mapping[str, Any]) -> dict[str, Any]:
    """The `run` entry of results.json."""
    return {
        "command": shlex.join(sys.argv),
        **{name: value for name, value in flags.items() if name != "output_dir"},
        "val_metric": best_in,
        "base_model": model.base_record["name"],
        "device": record.device_name(),
        **record.versions(),
        **more,
    }


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
