"""Decode a data file with a trained checkpoint, write outputs, references and sources, and score them.

python gpt2/run_generation.py --mode webnlg --split valid --checkpoint gpt2/webnlg_models/NAME
"""

import argparse
import logging
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gpt2 import decoding
from gpt2.dataset import Encoded, encode, encode_inputs, truncate
from gpt2.generator import Generator, load_generator
from gpt2.reference_loss import reference_loss
from gpt2.tasks import DECODING, label_groups, read_openings
from prefixlib import checkpoint, files, metrics, record
from prefixlib.beam_search import DecodingRule
from prefixlib.errors import UserError, one_line_errors
from prefixlib.launch import Parser, add_yes_no, refuse_together
from prefixlib.metrics.distinct import distinct
from prefixlib.readers import MODES, Group, data_file, prompt_text, read_groups

logger = logging.getLogger("gpt2.run_generation")


def add_flags(parser: Parser) -> None:
    """The decoding flags that gen.py passes on."""
    group = parser.add_argument_group("decoding")
    group.add_argument("--data_file", help="the file to decode (default: the mode's SPLIT file under --data_dir)")
    group.add_argument(
        "--decode_limit",
        type=int,
        help="only the first N inputs of the file; with seen and unseen categories (WebNLG), the first N/2 of each",
    )
    add_yes_no(
        group, "--reference_loss", "no", "also the mean loss per token of each decoded input's first reference, `loss`"
    )
    group.add_argument("--data_dir", help="folder with e2e_data/, webnlg_challenge_2017/, dart/ (default: data/)")
    group.add_argument("--output_dir", help="where the outputs go (default: into the checkpoint's folder)")
    group.add_argument("--model_name_or_path", help="base model, where the checkpoint's own is not to be found")
    group.add_argument("--cache_dir", help="where hub files are kept")
    group.add_argument(
        "--strategy",
        choices=decoding.STRATEGIES,
        help="how tokens are chosen (default: classify-* greedy; sentiment, topic, writingPrompts nucleus; else beam)",
    )
    group.add_argument(
        "--samples", type=int, help="outputs per prompt, drawn one by one (default: sentiment, topic 3; else 1)"
    )
    group.add_argument(
        "--openings", help="sentiment, topic: file of what texts begin with, one a line (default: PPLM's)"
    )
    group.add_argument("--num_beams", type=int, default=5, help="beams (strategy beam)")
    group.add_argument("--length", type=int, default=100, help="most tokens to generate")
    group.add_argument("--length_penalty", type=float, default=1.0, help="above 1 favours long outputs")
    group.add_argument(
        "--length_normalization",
        default="prompt+output",
        choices=("prompt+output", "output"),
        help="what a beam's score is divided by: the original's rule, or that of transformers today",
    )
    group.add_argument("--top_p", type=float, default=0.8, help="probability mass kept (strategy nucleus)")
    group.add_argument("--temperature", type=float, default=1.0, help="softens (above 1) or sharpens nucleus sampling")
    group.add_argument("--seed", type=int, default=42, help="seed of nucleus sampling")
    group.add_argument("--batch_size", type=int, default=32, help="sentences decoded together; changes speed only")
    add_yes_no(group, "--bf16", "no", "the frozen model in bfloat16")
    add_yes_no(group, "--disable_tqdm", "no", "no progress bar")


def decoding_rule(args: argparse.Namespace, tokenizer) -> DecodingRule:
    """The rule that the decoding flags ask for."""
    try:
        return DecodingRule(
            eos_token_id=tokenizer.eos_token_id,
            max_new_tokens=args.length,
            num_beams=args.num_beams,
            length_penalty=args.length_penalty,
            length_normalization=args.length_normalization,
            banned_token_ids=decoding.newline_token_ids(tokenizer),
            top_p=args.top_p,
            temperature=args.temperature,
        )
    except ValueError as error:
        raise UserError(f"decoding flags: {error}") from error


@dataclass(frozen=True)
class Prompts:
    """What is decoded: one prompt per group."""

    groups: list[Group]
    texts: list[str]
    inputs: list[Encoded]
    openings: list[list[int]]  # the prompt's last ids where they are the output's first words, else empty
    cut: int  # prompts that had to give way


def make_prompts(generator: Generator, mode: str, path: Path, args: argparse.Namespace) -> Prompts:
    """The prompts for a data file: its inputs, or (sentiment, topic) its labels times the openings.

    An opening stands a space behind the separator. Raises UserError where prompt and output cannot both fit.
    """
    tokenizer = generator.tokenizer
    room = generator.prompt_room - args.length
    if room < 2:
        raise UserError(
            f"--length {args.length}: the model has only {generator.prompt_room} positions for prompt and output"
        )
    openings = read_openings(Path(args.openings)) if args.openings else DECODING[mode].openings
    groups = label_groups(mode, path, openings) if openings else read_groups(mode, path)
    groups = first_groups(groups, args.decode_limit, generator.seen_categories)
    texts = [prompt_text(mode, generator.form.source_text(group.source), tokenizer.eos_token) for group in groups]
    whole = encode_inputs(mode, groups, tokenizer, generator.form, generator.source_limit)
    if openings:
        beginnings = [f" {opening}" for opening in openings] * (len(groups) // len(openings))
        begun = encode(tokenizer, beginnings)
        texts = [text + beginning for text, beginning in zip(texts, beginnings, strict=True)]
        whole = [replace(both[0], prompt=both[0].prompt + both[1]) for both in zip(whole, begun, strict=True)]
        longest = max(range(len(whole)), key=lambda n: len(whole[n]))
        if len(whole[longest]) > room:
            raise UserError(f"the prompt {texts[longest]!r} has {len(whole[longest])} tokens; there is room for {room}")
        return Prompts(groups, texts, whole, begun, cut=0)
    inputs = [truncate(example, room) for example in whole]
    cut = sum(len(a) != len(b) for a, b in zip(whole, inputs, strict=True))
    if cut:
        logger.warning("%d of %d sources cut to %d tokens to leave room for the output", cut, len(inputs), room)
    return Prompts(groups, texts, inputs, [[]] * len(inputs), cut)


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


def decode_file(generator: Generator, mode: str, path: Path, stem: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Decode every prompt of `path`; write STEM_{STRATEGY,gold,src}; return scores and counts.

    `stem` is OUTPUT_DIR/NAME_SPLIT. The files are in the data file's order: see `write_outputs`.
    """
    strategy, samples = choose_strategy(mode, args)
    tokenizer, prompts = generator.tokenizer, make_prompts(generator, mode, path, args)
    inputs = [example for example in prompts.inputs for _ in range(samples)]
    started = time.perf_counter()
    hypotheses = decoding.decode(
        generator.model,
        [example.prompt for example in inputs],
        decoding_rule(args, tokenizer),
        layers=generator.layers,
        past=(lambda members: generator.past([inputs[n] for n in members])) if generator.prefix else None,
        strategy=strategy,
        batch_size=args.batch_size,
        seed=args.seed,
        progress=args.disable_tqdm == "no",
    )
    seconds = time.perf_counter() - started
    openings = [ids for ids in prompts.openings for _ in range(samples)]
    outputs = [
        decoding.to_text(tokenizer, opening + hypothesis.tokens)
        for opening, hypothesis in zip(openings, hypotheses, strict=True)
    ]
    write_outputs(stem, strategy, outputs, prompts, one_reference=not MODES[mode].grouped)
    logger.info(
        "%d sentences in %.1f s (%.1f/s) -> %s_%s", len(outputs), seconds, len(outputs) / seconds, stem, strategy
    )
    if DECODING[mode].open_ended:
        scores = distinct(outputs)
    else:
        scores = score_groups(mode, outputs[::samples], prompts.groups, generator.seen_categories)
        if args.reference_loss == "yes":
            scores["loss"] = reference_loss(generator, mode, prompts.groups, args.batch_size)
    return {
        "data_file": str(path),
        "strategy": strategy,
        "samples": samples,
        "sentences": len(outputs),
        "sources_cut": prompts.cut,
        "seconds": round(seconds, 2),
        "scores": scores,
    }


def choose_strategy(mode: str, args: argparse.Namespace) -> tuple[str, int]:
    """The strategy and the samples per prompt that the flags, else the task's row, ask for.

    Raises UserError for flags that the strategy would not heed.
    """
    strategy = args.strategy or DECODING[mode].strategy
    samples = args.samples or (DECODING[mode].samples if strategy == "nucleus" else 1)
    if args.samples is not None and args.samples < 1:
        raise UserError(f"--samples {args.samples}: at least 1")
    if samples > 1 and strategy != "nucleus":
        refuse_together(f"--strategy {strategy}", f"--samples {samples}", "every sample would be the same")
    if args.openings and not DECODING[mode].openings:
        refuse_together(f"--mode {mode}", "--openings", "its texts are not begun for it")
    blank = make_parser()
    for name, heeds in (
        *((name, "nucleus") for name in ("top_p", "temperature")),
        *((name, "beam") for name in ("num_beams", "length_penalty", "length_normalization")),
    ):
        if strategy != heeds and getattr(args, name) != blank.get_default(name):
            refuse_together(f"--strategy {strategy}", f"--{name}", f"it belongs to --strategy {heeds}")
    return strategy, samples


def write_outputs(stem: Path, strategy: str, outputs: Sequence[str], prompts: Prompts, one_reference: bool) -> None:
    """The output files, named as the original named them; line breaks inside a text become spaces.

    STEM_STRATEGY: one output per line, the samples of a prompt below each other. STEM_gold: one reference per line, a
    blank line after each source; labels: one per line and nothing else; none where texts have no references to have
    (sentiment, topic). STEM_src: one prompt per line.
    """
    after = "" if one_reference else "\n"
    gold = "".join("".join(f"{_line(text)}\n" for text in group.references) + after for group in prompts.groups)
    kinds = {
        strategy: "".join(f"{output}\n" for output in outputs),
        "gold": gold,
        "src": "".join(f"{_line(text)}\n" for text in prompts.texts),
    }
    if any(prompts.openings):
        del kinds["gold"]
    for kind, text in kinds.items():
        files.write_text(stem.with_name(f"{stem.name}_{kind}"), text)


def _line(text: str) -> str:
    return text.replace("\n", " ")


def score_groups(
    mode: str, outputs: Sequence[str], groups: Sequence[Group], seen: Collection[str]
) -> dict[str, float | None]:
    """The paper's metrics over the sources that have references; {} where there are none (a blind test set)."""
    pairs = [(output, group) for output, group in zip(outputs, groups, strict=True) if group.references]
    if not pairs:
        return {}
    categories = [group.category for _, group in pairs] if any(group.category for _, group in pairs) else None
    return metrics.score_task(
        mode,
        [output for output, _ in pairs],
        [list(group.references) for _, group in pairs],
        categories=categories,
        seen_categories=seen or None,
    )


def make_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--mode", required=True, choices=tuple(MODES), help="the task the checkpoint was trained for")
    parser.add_argument("--split", required=True, choices=("valid", "test"), help="which file of the data set")
    parser.add_argument("--checkpoint", required=True, help="prefix checkpoint or fine-tuned model folder")
    add_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if args.decode_limit is not None and args.decode_limit < 1:
        raise UserError(f"--decode_limit {args.decode_limit}: at least 1")
    choose_strategy(args.mode, args)  # raises what it has against the flags before a model is loaded
    record.set_up_logging()
    directory = Path(args.checkpoint).expanduser().resolve()  # resolved: a trailing slash changes no name
    if not args.output_dir and checkpoint.is_plain_model(directory):
        raise UserError(f"{directory} is a model, not the folder of a run: say with --output_dir where the outputs go")
    out = Path(args.output_dir).expanduser().resolve() if args.output_dir else directory
    path = Path(args.data_file) if args.data_file else data_file(args.mode, args.split, args.data_dir)
    if not path.is_file():
        read_groups(args.mode, path)  # raises the reader's own message before a model is loaded
    dtype = torch.bfloat16 if args.bf16 == "yes" else torch.float32
    generator = load_generator(directory, args.mode, args.model_name_or_path, args.cache_dir, dtype)
    result = decode_file(generator, args.mode, path, out / f"{directory.name}_{args.split}", args)
    known = record.read_results(out).get("decoding", {})
    record.update_results(out, {"decoding": {**known, args.split: result}})
    print_scores(args.split, result["scores"])
    return 0


def print_scores(split: str, scores: dict[str, float | None]) -> None:
    """One line of scores on stdout."""
    shown = "  ".join(f"{name} {'n/a' if value is None else f'{value:.4g}'}" for name, value in scores.items())
    print(f"{split}: {shown or 'no references, not scored'}", flush=True)


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
