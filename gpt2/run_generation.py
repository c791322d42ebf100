"""Decode a data file with a trained checkpoint, write outputs, references and sources, and score them.

python gpt2/run_generation.py --mode webnlg --split valid --checkpoint gpt2/webnlg_models/NAME
"""

if __name__ == "__main__":
    from prefixlib.system import startup

    startup.begin()

import logging
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gpt2 import model
from gpt2.dataset import Encoded, encode
from gpt2.flags import Decoding
from prefixlib import metrics
from prefixlib.checkpoints import checkpoint, original
from prefixlib.data.readers import Group
from prefixlib.data.special_tokens import check_rows, texts_of
from prefixlib.data.tasks import (
    GPT2_MODES,
    OWN_DATA,
    data_file,
    find_task,
    given_file,
    read_groups,
    read_label_groups,
    read_openings,
)
from prefixlib.decoding.outputs import Outputs, as_lines, seen_categories
from prefixlib.runs import record
from prefixlib.settings.flags import USAGE, Parser
from prefixlib.system import files, processes
from prefixlib.system.errors import UserError, one_line_errors

logger = logging.getLogger("gpt2.run_generation")


@dataclass(frozen=True)
class Prompts:
    """One prompt per group."""

    groups: list[Group]
    texts: list[str]
    inputs: list[Encoded]
    openings: list[list[int]]  # the prompt's last ids where they are the output's first words, else empty
    cut: int  # prompts that lost tokens


def read_sources(
    mode: str, path: Path, settings: Decoding, task: Mapping[str, Any]
) -> tuple[list[Group], Sequence[str]]:
    """The inputs of a data file, or (sentiment, topic) its labels, and the openings that these are combined with.

    task: what the checkpoint says of its training, for the columns of user data.
    Raises UserError for a bad file, naming it and the line.
    """
    openings = read_openings(Path(settings.openings)) if settings.openings else find_task(mode).gpt2.openings
    if openings:
        return read_label_groups(mode, path, openings), openings
    return read_groups(mode, path, blind=True, columns=settings.columns(task)), openings


def make_prompts(trained: model.Model, path: Path, settings: Decoding) -> Prompts:
    """The prompts for a data file: its inputs, or (sentiment, topic) its labels times the openings.

    An opening stands a space behind the separator. Raises UserError where prompt and output cannot both fit.
    """
    mode, tokenizer = trained.task["mode"], trained.tokenizer
    groups, openings = read_sources(mode, path, settings, trained.task)
    groups = first_groups(groups, settings.decode_limit, trained.task.get("categories", ()))
    texts = [trained.format.prompt(mode, group.source, tokenizer) for group in groups]
    check_rows(tokenizer, path, texts_of(groups))
    whole = trained.encode_groups(groups, settings.search())
    if not openings:
        inputs = trained.fit(whole, settings.search())
        cut = sum(a.cut > 0 or len(a) != len(b) for a, b in zip(whole, inputs, strict=True))
        return Prompts(groups, texts, inputs, [[]] * len(inputs), cut)
    beginnings = [f" {openings[n % len(openings)]}" for n in range(len(groups))]
    begun = encode(tokenizer, beginnings)
    texts = [text + beginning for text, beginning in zip(texts, beginnings, strict=True)]
    inputs = [replace(example, prompt=example.prompt + ids) for example, ids in zip(whole, begun, strict=True)]
    longest, limit = max(range(len(inputs)), key=lambda n: len(inputs[n])), trained.text_positions - settings.length
    if len(inputs[longest]) > limit:
        raise UserError(f"the prompt {texts[longest]!r} has {len(inputs[longest])} tokens; at most {limit} fit")
    return Prompts(groups, texts, inputs, begun, cut=0)


def first_groups(groups: list[Group], limit: int | None, seen: Collection[str]) -> list[Group]:
    """The first `limit` groups, in file order; where some categories were seen in training and some not, half of each.

    WebNLG's test file has all its seen categories first.
    """
    if limit is None or limit >= len(groups):
        return groups
    unseen = [n for n, group in enumerate(groups) if group.category and seen and group.category not in seen]
    if not unseen:
        return groups[:limit]
    known = sorted(set(range(len(groups))) - set(unseen))
    half = limit // 2
    return [groups[n] for n in sorted(known[: limit - half] + unseen[:half])]


def decode_file(trained: model.Model, path: Path, stem: Path, settings: Decoding) -> dict[str, Any]:
    """Decode every prompt of `path`; write STEM_{STRATEGY,gold,src}, for user data also STEM_STRATEGY.jsonl.

    Returns scores and counts.

    `stem` is OUTPUT_DIR/NAME_SPLIT. The files are in the data file's order: see `Outputs.write`, `write_inputs`.
    """
    mode = trained.task["mode"]
    strategy, samples = settings.strategy_for(mode)
    prompts = make_prompts(trained, path, settings)
    started = time.perf_counter()
    found = trained.decode(prompts.inputs, settings.search(), samples, progress=not settings.disable_tqdm)
    seconds = time.perf_counter() - started
    to_text, begun = trained.to_text(settings.stop), zip(prompts.openings, found, strict=True)
    texts = [[to_text(opening + hypothesis.tokens) for hypothesis in hypotheses] for opening, hypotheses in begun]
    values = [[hypothesis.score for hypothesis in hypotheses] for hypotheses in found]
    outputs = Outputs(mode, prompts.groups, texts, values, seconds)
    target, step = stem.with_name(f"{stem.name}_{strategy}"), trained.task.get("step")
    outputs.write(target, target.with_name(f"{target.name}.jsonl"))
    write_inputs(stem, prompts, one_reference=not find_task(mode).grouped)
    outputs.log(target, step)
    scores = outputs.scores(seen_categories(trained.task, prompts.groups, mode, settings.data_dir))
    if settings.reference_loss and find_task(mode).metrics:
        scores["loss"] = trained.reference_loss(prompts.groups, settings.batch_size)
    return outputs.entry(path, scores, cut=prompts.cut, strategy=strategy, step=step, samples=samples)


def decode_splits(
    trained: model.Model,
    output: Path,
    paths: Mapping[str, Path | None],
    settings: Decoding,
    known: Mapping[str, Mapping[str, Any]],
    directory: Path,
) -> dict[str, dict[str, float | None]]:
    """Decode and score the files of `paths`, split -> path; scores go to results.json and the card in `directory`.

    The original does so with valid and test after training. What an earlier start of the same run has decoded of the
    same files, `known`, is not decoded again.
    """
    decoded: dict[str, dict[str, Any]] = {}
    for split, path in paths.items():
        if path is None:
            logger.info("no test file: %s is not decoded", split)
            continue
        decoded[split] = known.get(split, {})
        if decoded[split].get("data_file") != str(path):
            decoded[split] = decode_file(trained, path, output / f"{output.name}_{split}", settings)
            record.record_split(output, split, decoded[split])
        print_scores(split, decoded[split]["scores"])
    scores = {split: result["scores"] for split, result in decoded.items()}
    if checkpoint.is_checkpoint(directory):
        named = {f"{split} {name}": value for split, row in scores.items() for name, value in row.items()}
        checkpoint.refresh_card(directory, named)
    return scores


def write_inputs(stem: Path, prompts: Prompts, one_reference: bool) -> None:
    """Write what belongs to the outputs beside them, named as the original named it.

    STEM_gold: one reference per line, a blank line after each source; labels: one per line and nothing else; none where
    texts have no references to have (sentiment, topic). STEM_src: one prompt per line.
    """
    files.write_text(stem.with_name(f"{stem.name}_src"), as_lines(prompts.texts))
    if not any(prompts.openings):
        end = "" if one_reference else "\n"
        gold = "".join(as_lines(group.references) + end for group in prompts.groups)
        files.write_text(stem.with_name(f"{stem.name}_gold"), gold)


def make_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0], usage=f"{USAGE} --mode MODE --split SPLIT --checkpoint DIR")
    parser.add_argument("--mode", required=True, choices=GPT2_MODES, help="the task the checkpoint was trained for")
    parser.add_argument("--split", required=True, choices=("valid", "test"), help="which file of the data set")
    parser.add_argument("--checkpoint", required=True, help="prefix checkpoint or fine-tuned model folder")
    Decoding.add_to(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    settings, mode, split = Decoding.from_args(args), args.mode, args.split
    settings.strategy_for(mode)  # raises UserError before a model is loaded
    record.set_up_logging()
    record.check_machine(bf16=settings.bf16)
    directory = Path(args.checkpoint).expanduser().resolve()  # resolved: a trailing slash changes no name
    if not settings.output_dir and is_plain_model(directory):
        raise UserError(f"{directory} is a model, not the folder of a run: say with --output_dir where the outputs go")
    out = Path(settings.output_dir).expanduser().resolve() if settings.output_dir else directory
    path = (
        given_file(mode, settings.data_file, split) if settings.data_file else data_file(mode, split, settings.data_dir)
    )
    # raises the reader's own message before a model is loaded
    read_sources(mode, path, settings, checkpoint.saved_task(directory) if mode in OWN_DATA else {})
    if not directory.is_dir():
        raise UserError(f"checkpoint {args.checkpoint}: no such folder")
    files.check_name(out, "--output_dir", f"{directory.name}_{split}_nucleus.jsonl")
    processes.forget_others()
    with files.lock(out):
        scores = decode_split(directory, out, mode, split, path, settings)
    print_scores(split, scores)
    return 0


def decode_split(
    directory: Path, out: Path, mode: str, split: str, path: Path, settings: Decoding
) -> dict[str, float | None]:
    """Decode `path` with the checkpoint in `directory`, record it in `out`, and return its scores."""
    record.set_aside_damaged(out)
    trained = model.load(
        directory,
        mode=mode,
        model_name_or_path=settings.model_name_or_path,
        cache_dir=settings.cache_dir,
        dtype=torch.bfloat16 if settings.bf16 else torch.float32,
        allow_other_base=settings.allow_other_base,
        quantization=settings.quantization,
        attn_implementation=settings.attn_implementation,
    )
    result = decode_file(trained, path, out / f"{directory.name}_{split}", settings)
    record.record_split(out, split, result)
    if checkpoint.is_checkpoint(directory) and directory.is_relative_to(out):  # not where outputs go elsewhere
        scored = path.name if settings.data_file else split
        checkpoint.refresh_card(directory, {f"{scored} {name}": value for name, value in result["scores"].items()})
    return result["scores"]


def is_plain_model(directory: Path) -> bool:
    """True for a model folder that no run here or of the original code wrote."""
    holds_model = (directory / "config.json").is_file()
    return holds_model and not original.is_prefix(directory) and not checkpoint.load_task(directory)


def print_scores(split: str, scores: dict[str, float | None]) -> None:
    """One line of scores on stdout."""
    print(f"{split}: {metrics.shown(scores) or 'no references, not scored'}", flush=True)


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
