"""Entry of summarisation and table-to-text with an encoder-decoder: train, or decode a test file and score it.

python seq2seq/finetune.py --mode xsum --preseqlen 200 --mid_dim 800 --output_dir runs/xsum
train_bart.py and train_e2e.py fill in the flags. In Python: `seq2seq.train(seq2seq.Settings(mode="xsum", ...))`.
"""

if __name__ == "__main__":
    from prefixlib.system import startup

    startup.begin()

import dataclasses
import logging
import os
import shlex
import sys
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prefixlib.base_model import sharding
from prefixlib.base_model.load import on_device
from prefixlib.checkpoints import best, checkpoint, original
from prefixlib.data import data_digests
from prefixlib.data.conversations import Chat
from prefixlib.data.special_tokens import check_rows, warn_of_lost_characters
from prefixlib.data.tables import Columns
from prefixlib.data.tasks import OWN_DATA, categories_of, find_task, is_there
from prefixlib.decoding.outputs import Outputs, seen_categories, with_references
from prefixlib.methods.table import METHODS
from prefixlib.metrics import rouge, shown
from prefixlib.runs import record, schedule
from prefixlib.settings.flags import USAGE, Parser, explicit_flags
from prefixlib.settings.search import Search
from prefixlib.system import files, processes
from prefixlib.system.errors import UserError, one_line_errors
from seq2seq.building import new
from seq2seq.callbacks import RESUME, Checkpoints, LogLines
from seq2seq.decoding import to_text
from seq2seq.flags import Settings
from seq2seq.frozen_lm import max_positions
from seq2seq.lightning_base import Resumption, SummarizationModule, find_resume, generic_train
from seq2seq.model import Model, load, load_prefix, saved_settings
from seq2seq.prefixTuning import FAMILY
from seq2seq.utils import Example, build_loaders, examples_of, read_examples, texts_of

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
    output = _output_dir(settings)
    if not settings.do_train:
        decode(settings, given)
    elif settings.resume and is_finished(settings, output) and not left_to_decode(settings, output):
        logger.info("the run in %s has finished: nothing is left to train", output)
    else:
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


def _output_dir(settings: Settings) -> Path:
    if settings.output_dir is None:
        raise UserError("the following arguments are required: --output_dir, where the run is written")
    return Path(settings.output_dir).expanduser().resolve()


def _named_after(output: Path, settings: Settings) -> tuple[str, ...]:
    """The longest name of a file that gets the folder's name: see `decode_split`."""
    return (f"{output.name}_valid_nucleus.jsonl",) if settings.mode in OWN_DATA else ()


def _quiet_libraries() -> None:
    """Leave warnings to those that a user can act on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


# ---- training ----------------------------------------------------------------------------------------------------


def is_finished(settings: Settings, output: Path) -> bool:
    """True where `output` holds a run that was trained to its end, as far as the settings say."""
    results = record.read_results(output)
    wanted = {name: getattr(settings, name) for name in schedule.LENGTH}
    ran = {**wanted, **results.get("run", {})}  # earlier versions did not record all of them
    return "training" in results and all(ran[name] == value for name, value in wanted.items())


def left_to_decode(settings: Settings, output: Path) -> list[str]:
    """What --decode asks for and the run in `output`, trained to its end, has not decoded: it was stopped before."""
    known = record.read_results(output).get("decoding", {})
    return [split for split in decoded_after_training(settings) if split not in known]


def train(settings: Settings) -> TrainResult:
    """Train, and leave in settings.output_dir the last and the best checkpoint, results.json and the curves.

    With settings.resume a run goes on from its newest resumable checkpoint; one that was trained to its end is loaded,
    and what it had not decoded yet is decoded.
    Raises UserError for settings, files or a base model that do not go together, and where the loss is NaN or infinite.

    >>> settings = Settings(mode="xsum", data_dir="data", output_dir="runs/xsum")
    >>> train(settings).model.generate(["The document to summarise."])  # doctest: +SKIP
    """
    settings.check()
    if not settings.do_train:
        raise UserError("train() with do_train=False: load(CHECKPOINT).generate(...) decodes a checkpoint")
    output = _output_dir(settings)
    _quiet_libraries()
    settings.check_processes(processes.world_size())
    record.check_machine(settings.fp16, settings.bf16)
    record.set_up_reporting(settings.report_to)
    files.check_name(output, "--output_dir", *_named_after(output, settings))
    processes.connect()
    with files.lock(output):
        if settings.resume and is_finished(settings, output):
            return _finished(settings, output)
        record.set_aside_damaged(output)
        return _train(settings, output)


def _train(settings: Settings, output: Path) -> TrainResult:
    resumption = find_resume(settings, output)
    started = time.perf_counter()
    to_decode = decoded_after_training(settings)
    examples = read_examples(settings, with_test=bool(settings.test_file) or "test" in to_decode)
    record.seed_everything(settings.seed)
    model = new_model(settings, examples, resuming=resumption is not None)
    if find_task(settings.mode).is_table:
        model.task["categories"] = categories_of(examples["train"])
    if "test" in to_decode:  # now, not when the training is done
        check_sources(settings, model, "test", examples_of(settings, "test", settings.columns))
    if resumption and resumption.earlier:
        model.task[schedule.EARLIER] = resumption.earlier
    data = data_of_run(settings, resumption, output)
    model.task |= data
    config = model.base.config
    loaders = build_loaders(settings, examples["train"], examples["valid"], model.tokenizer, config, model.wording)
    steps = -(-len(loaders[0]) // settings.gradient_accumulation_steps) * settings.epoch
    steps = min(steps, settings.max_steps) if settings.max_steps > 0 else steps
    if resumption:
        check_what_is_left(resumption, data, steps, len(loaders[0]))
    rule = model.rule(settings.search())
    module = SummarizationModule(model.lm, settings, steps, model.tokenizer, rule)
    module.data = data
    log = LogLines(settings.logging_steps)

    def save(directory: Path, result: Mapping[str, float]) -> None:
        best.save(model, directory, int(result["step"]), result)

    keep = Checkpoints(output, settings.save_steps, settings.best_in, settings.early_stopping_patience, save)
    parameters = model.count_parameters()
    sizes = {"size": model.base.num_parameters(), "steps": steps, "output": output}
    sizes["batch"] = settings.bsz * settings.gradient_accumulation_steps
    record.write_settings(output, settings)
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
        schedules = {schedule.EARLIER: module.earlier} if module.earlier else {}
        write_results(settings, model, output, trained, schedules | data)
    model.lm.eval()
    if trainer.world_size == 1:  # Lightning leaves it on the CPU
        on_device(model.lm)
    sharding.gather(model.base)  # the first process decodes alone
    decoded = {}
    if trainer.is_global_zero:
        best.restore(model, output, trained)
    for split in to_decode if trainer.is_global_zero else ():
        found = examples_of(settings, split, settings.columns)
        decoded[split] = decode_split(settings, model, split, found, output, settings.search())
    return TrainResult(model, scores_of(keep.best), log.curves, output, decoded)


def scores_of(best_result: Mapping[str, float]) -> dict[str, float]:
    """The figures of a validation without its step."""
    return {name: value for name, value in best_result.items() if name != "step"}


def data_of_run(settings: Settings, resumption: Resumption | None, output: Path) -> dict[str, Any]:
    """What the checkpoints say of the run's data. Raises UserError where a resumed run has others than before."""
    paths = {split: settings.file(split) for split in ("train", "valid")}
    if resumption is None:
        return data_digests.of_run(paths)
    step = resumption.state["global_step"]
    return data_digests.of_resumed(paths, resumption.state, step, output / RESUME, settings.allow_other_data)


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


def decoded_after_training(settings: Settings) -> tuple[str, ...]:
    """The splits that are decoded. Raises UserError where a test file is asked for and there is none."""
    own_training_file = settings.train_file and not settings.test_file  # the standard test set does not belong to it
    has_test = not own_training_file and is_there(settings.mode, settings.file("test"))
    return settings.splits_to_decode(has_test, usual=())


def new_model(settings: Settings, examples: Mapping[str, Sequence[Example]], resuming: bool) -> Model:
    """The model to train on these examples. Raises UserError where its tokenizer or chat template cannot take them."""
    chat = isinstance(examples["train"][0].source, Chat)
    if chat:
        settings.check_conversations()
    first = [examples["train"][n] for n in range(min(20, len(examples["train"])))]
    texts = [text for example in first for text in (example.source, *example.references)]
    model = new(settings, resuming=resuming, texts=texts)
    if chat:
        model.task["chat"] = True
    if settings.mode in OWN_DATA:
        every = (text for _, row in texts_of(examples["train"]) for text in row)
        warn_of_lost_characters(model.tokenizer, every)
    for split, rows in examples.items():
        check_rows(model.tokenizer, settings.file(split), texts_of(rows))
    return model


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
        for split in left_to_decode(settings, output):
            logger.info("the run in %s was trained to its end; decoding its %s file", output, split)
            decode_split(
                settings, model, split, examples_of(settings, split, settings.columns), output, settings.search()
            )
    decoded = {split: row["scores"] for split, row in record.read_results(output).get("decoding", {}).items()}
    return TrainResult(model, scores_of(result), history, output, decoded)


def write_results(
    settings: Settings, model: Model, output: Path, trained: dict[str, Any], history: Mapping[str, Any]
) -> None:
    """Draw the curves, and put the run and its training into results.json, which says that the run has finished."""
    run = {
        "command": shlex.join(sys.argv),
        **{name: value for name, value in settings.as_flags().items() if name != "output_dir"},
        "val_metric": settings.best_in,
        "base_model": model.base_record["name"],
        "device": record.device_name(),
        **record.versions(),
        **history,
    }
    title = f"{settings.mode}, {settings.tuning_mode}"
    record.plot_curves(output / "loss.png", trained["curves"], xlabel="step", ylabel="loss per token", title=title)
    record.update_results(output, {"run": run, "training": trained, "decoding": None})  # not of these weights
    record.log_end(trained, output, settings.decode_command(FAMILY, best.chosen(output, trained)))


# ---- decoding ----------------------------------------------------------------------------------------------------


def decode(settings: Settings, given: Collection[str] = ()) -> dict[str, Any]:
    """Decode the test file, or what --decode says, with a checkpoint; returns the scores of each file.

    given: the names of the settings that must agree with the checkpoint's, as they were set on purpose.
    """
    output = _output_dir(settings)
    _quiet_libraries()
    record.check_machine(settings.fp16, settings.bf16)
    files.check_name(output, "--output_dir", *_named_after(output, settings))
    processes.forget_others()
    with files.lock(output):
        return _decode(settings, output, given)


def _decode(settings: Settings, output: Path, given: Collection[str]) -> dict[str, Any]:
    columns = None
    if settings.mode in OWN_DATA:
        columns = Columns.of(
            saved_settings(settings.checkpoint), settings.source_column, settings.target_column, settings.quotes
        )
    has_test = settings.mode not in OWN_DATA or is_there(settings.mode, settings.file("test"))
    splits = settings.splits_to_decode(has_test, usual=("test",))
    examples = {split: examples_of(settings, split, columns) for split in splits}
    model = load_for(settings, given)
    record.set_aside_damaged(output)
    search = settings.search(settings.seed) if "seed" in given else settings.search()
    return {split: decode_split(settings, model, split, examples[split], output, search) for split in splits}


def decode_split(
    settings: Settings, model: Model, split: str, examples: Sequence[Example], output: Path, search: Search
) -> dict[str, Any]:
    """Decode the examples of a split: write SPLIT_beam_LENGTHPENALTY and results.json; returns the scores.

    Another strategy gives SPLIT_STRATEGY. For the user's own pairs, NAME_SPLIT_STRATEGY.jsonl is written too.
    """
    check_sources(settings, model, split, examples)
    strategy, rule = model.strategy(search), model.rule(search)
    limit = settings.max_source_length or model.task.get("max_source_length")
    lengths = dataclasses.replace(settings, max_source_length=limit).lengths(max_positions(model.base.config))
    inputs, cut = model.encode_texts([example.source for example in examples], lengths["max_source_length"])
    started = time.perf_counter()
    found = model.decode(inputs, search, progress=not settings.disable_tqdm)
    seconds = time.perf_counter() - started
    texts = [[model.to_text(settings.stop)(hypotheses[0].tokens)] for hypotheses in found]
    outputs = Outputs(settings.mode, examples, texts, [[hypotheses[0].score] for hypotheses in found], seconds)
    target = output / f"{split}_{strategy}{f'_{rule.length_penalty}' if strategy == 'beam' else ''}"
    outputs.write(target, output / f"{output.name}_{split}_{strategy}.jsonl")
    scores = outputs.scores(seen_categories(model.task, examples, settings.mode, settings.data_dir))
    if scores and not (find_task(settings.mode).is_table or find_task(settings.mode).verbatim):
        scores |= summary_scores(settings, outputs, model.tokenizer, lengths["test_max_target_length"])
    step = model.task.get("step")
    how = {"rule": {**dataclasses.asdict(dataclasses.replace(rule, stop=None)), "stop": list(settings.stop)}}
    entry = outputs.entry(settings.file(split), scores, cut=cut, strategy=strategy, step=step, **how)
    record.record_split(output, split, entry)
    outputs.log(target, step)
    for name, value in scores.items():
        logger.info("%s: %s", name, shown(value))
    return scores


def check_sources(settings: Settings, model: Model, split: str, examples: Sequence[Example]) -> None:
    """Look for special tokens in what is decoded. Raises UserError for the token that ends a text."""
    check_rows(model.tokenizer, settings.file(split), texts_of(examples, references=False))


def load_for(settings: Settings, given: Collection[str]) -> Model:
    """The checkpoint to decode. Raises UserError where it contradicts a setting that is given."""
    directory = settings.checkpoint
    if settings.finetune_model_path:
        folder = checkpoint.model_folder(directory)
        if folder is None:
            raise UserError(f"--finetune_model_path {directory}: no model folder there (it needs a config.json)")
        directory = folder
    elif not original.is_prefix(directory):
        load_prefix(directory)  # raises UserError that says what the folder holds instead
    values = {name: value for name, value in settings.as_flags().items() if name in given}
    # decoding may read more or less of a source than training did, other columns, and draw with a seed of its own
    free = {"max_source_length", "source_column", "target_column"}
    for name in free | ({"seed"} if settings.strategy_now() == "nucleus" else set()):
        values.pop(name, None)
    checkpoint.check_agrees(values, saved_settings(directory), directory)
    dtype = torch.float16 if settings.fp16 else torch.bfloat16 if settings.bf16 else torch.float32
    return load(
        directory,
        mode=settings.mode,
        model_name_or_path=settings.model_name_or_path,
        model_revision=settings.model_revision,
        cache_dir=settings.cache_dir,
        dtype=dtype,
        allow_other_base=settings.allow_other_base,
        quantization=settings.quantization,
    )


def summary_scores(settings: Settings, outputs: Outputs, tokenizer: Any, target_length: int) -> dict[str, Any]:
    """ROUGE-Lsum and the original's average, named as such."""
    pairs = with_references(outputs.flat(), outputs.inputs)
    texts, references = [text for text, _ in pairs], [example.references for _, example in pairs]
    first = [its[0] for its in references]
    ids = tokenizer(text_target=first, max_length=target_length, truncation=True)["input_ids"]
    cut = [to_text(tokenizer, tokens) for tokens in ids]
    batch = 8 if settings.prefix_model_path else 10  # the original's batch sizes, which its average depends on
    return {
        "ROUGE-Lsum": rouge.rouge_lsum(texts, references),
        "original's average": rouge.original_way(texts, cut, batch),
    }


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
