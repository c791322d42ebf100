"""Decode the test file, or other files, with a trained checkpoint, write the outputs, and score them.

finetune.py --do_train no comes here, and every training that is followed by decoding.
"""

import dataclasses
import logging
import os
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from prefixlib.checkpoints import checkpoint, original
from prefixlib.data.special_tokens import check_rows
from prefixlib.data.tables import Columns
from prefixlib.data.tasks import OWN_DATA, find_task, is_there
from prefixlib.decoding.outputs import Outputs, seen_categories, with_references
from prefixlib.metrics import rouge, shown
from prefixlib.runs import record
from prefixlib.settings.search import Search
from prefixlib.system import files, processes
from prefixlib.system.errors import UserError
from seq2seq.decoding import to_text
from seq2seq.flags import Settings
from seq2seq.frozen_lm import max_positions
from seq2seq.model import Model, load, load_prefix, saved_settings
from seq2seq.utils import Example, load_examples, texts_of

logger = logging.getLogger(__name__)


def decode(settings: Settings, given: Collection[str] = ()) -> dict[str, Any]:
    """Decode the test file, or the files of --decode, with a checkpoint; returns the scores of each file.

    given: the names of the settings that must agree with the checkpoint's, as they were set on purpose.
    """
    output, mode = settings.output_folder(), settings.mode
    quiet_libraries()
    record.check_machine(settings.fp16, settings.bf16)
    check_output_name(output, mode)
    processes.forget_others()
    with files.lock(output):
        columns = None
        if mode in OWN_DATA:
            chosen = (settings.source_column, settings.target_column, settings.quotes)
            columns = Columns.of(saved_settings(settings.checkpoint), *chosen)
        has_test = mode not in OWN_DATA or is_there(mode, settings.file("test"))
        splits = settings.splits_to_decode(has_test, usual=("test",))
        examples = read_splits(settings.files_to_decode(splits), mode, columns)
        directory = find_checkpoint(settings.checkpoint, tuned=bool(settings.finetune_model_path))
        values = {name: value for name, value in settings.as_flags().items() if name in given}
        check_given(values, directory, sampled=settings.strategy_now() == "nucleus")
        model = load(
            directory,
            mode=mode,
            model_name_or_path=settings.model_name_or_path,
            model_revision=settings.model_revision,
            cache_dir=settings.cache_dir,
            dtype=getattr(torch, settings.dtype),
            allow_other_base=settings.allow_other_base,
            quantization=settings.quantization,
        )
        record.set_aside_damaged(output)
        search = settings.search(settings.seed) if "seed" in given else settings.search()
        return decode_splits(settings, model, examples, output, search)


def read_splits(paths: Mapping[str, tuple[Path, int]], mode: str, columns: Columns | None) -> dict[str, list[Example]]:
    """The examples to decode: the first N of each file, -1 for all."""
    found = {split: load_examples(mode, split, path, first, columns) for split, (path, first) in paths.items()}
    return {split: [rows[n] for n in range(len(rows))] for split, rows in found.items()}


def decode_splits(
    settings: Settings, model: Model, examples: Mapping[str, Sequence[Example]], output: Path, search: Search
) -> dict[str, dict[str, Any]]:
    """Decode the examples of every split; returns their scores."""
    limit = settings.max_source_length or model.task.get("max_source_length")
    lengths = dataclasses.replace(settings, max_source_length=limit).lengths(max_positions(model.base.config))
    # the original's batch sizes, which its average ROUGE depends on
    how = {"lengths": lengths, "data_dir": settings.data_dir, "batch": 8 if settings.prefix_model_path else 10}
    how["progress"] = not settings.disable_tqdm
    return {
        split: decode_split(model, split, settings.file(split), rows, output, search, **how)
        for split, rows in examples.items()
    }


def decode_split(
    model: Model,
    split: str,
    path: Path,
    examples: Sequence[Example],
    output: Path,
    search: Search,
    *,
    lengths: Mapping[str, int],
    data_dir: str | None = None,
    batch: int = 10,
    progress: bool = True,
) -> dict[str, Any]:
    """Decode the examples of `path`: write SPLIT_beam_LENGTHPENALTY and results.json; returns the scores.

    Another strategy gives SPLIT_STRATEGY. For the user's own pairs, NAME_SPLIT_STRATEGY.jsonl is written too.
    lengths: most tokens of each kind of text. batch: see `summary_scores`.
    """
    check_sources(model, path, examples)
    mode, strategy, rule = model.task["mode"], model.strategy(search), model.rule(search)
    inputs, cut = model.encode_texts([example.source for example in examples], lengths["max_source_length"])
    started = time.perf_counter()
    found = model.decode(inputs, search, progress=progress)
    seconds = time.perf_counter() - started
    texts = [[model.to_text(search.stop)(hypotheses[0].tokens)] for hypotheses in found]
    outputs = Outputs(mode, examples, texts, [[hypotheses[0].score] for hypotheses in found], seconds)
    target = output / f"{split}_{strategy}{f'_{rule.length_penalty}' if strategy == 'beam' else ''}"
    outputs.write(target, output / f"{output.name}_{split}_{strategy}.jsonl")
    scores = outputs.scores(seen_categories(model.task, examples, mode, data_dir))
    if scores and not (find_task(mode).is_table or find_task(mode).verbatim):
        scores |= summary_scores(outputs, model.tokenizer, lengths["test_max_target_length"], batch)
    step = model.task.get("step")
    how = {"rule": {**dataclasses.asdict(dataclasses.replace(rule, stop=None)), "stop": list(search.stop)}}
    entry = outputs.entry(path, scores, cut=cut, strategy=strategy, step=step, **how)
    record.record_split(output, split, entry)
    outputs.log(target, step)
    for name, value in scores.items():
        logger.info("%s: %s", name, shown(value))
    return scores


def check_sources(model: Model, path: Path, examples: Sequence[Example]) -> None:
    """Look for special tokens in the sources to decode. Raises UserError for the token that ends a text."""
    check_rows(model.tokenizer, path, texts_of(examples, references=False))


def find_checkpoint(directory: Path, tuned: bool) -> Path:
    """The folder to load. Raises UserError where there is no prefix, or with `tuned` no model."""
    if tuned:
        folder = checkpoint.model_folder(directory)
        if folder is None:
            raise UserError(f"--finetune_model_path {directory}: no model folder there (it needs a config.json)")
        return folder
    if not original.is_prefix(directory):
        load_prefix(directory)  # raises UserError that says what the folder holds instead
    return directory


def check_given(values: Mapping[str, Any], directory: Path, sampled: bool) -> None:
    """Raise UserError where flags that are given contradict the checkpoint."""
    # decoding may read more or less of a source than training did, other columns, and sample with a seed of its own
    free = {"max_source_length", "source_column", "target_column"} | ({"seed"} if sampled else set())
    fixed = {name: value for name, value in values.items() if name not in free}
    checkpoint.check_agrees(fixed, saved_settings(directory), directory)


def summary_scores(outputs: Outputs, tokenizer: Any, target_length: int, batch: int) -> dict[str, Any]:
    """ROUGE-Lsum and the original's average, named as such; the latter depends on its `batch` size."""
    pairs = with_references(outputs.flat(), outputs.inputs)
    texts, references = [text for text, _ in pairs], [example.references for _, example in pairs]
    first = [its[0] for its in references]
    ids = tokenizer(text_target=first, max_length=target_length, truncation=True)["input_ids"]
    cut = [to_text(tokenizer, tokens) for tokens in ids]
    return {
        "ROUGE-Lsum": rouge.rouge_lsum(texts, references),
        "original's average": rouge.original_way(texts, cut, batch),
    }


def check_output_name(output: Path, mode: str) -> None:
    """Raise UserError where the folder's name, or that of a file named after it, is too long."""
    named_after = (f"{output.name}_valid_nucleus.jsonl",) if mode in OWN_DATA else ()
    files.check_name(output, "--output_dir", *named_after)


def quiet_libraries() -> None:
    """Show only the warnings that a user can act on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
