"""Decode a data file with a trained checkpoint, write outputs, references and sources, and score them.

python gpt2/run_generation.py --mode webnlg --split valid --checkpoint gpt2/webnlg_models/NAME
"""

import argparse
import logging
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpt2 import decoding
from gpt2.dataset import encode, truncate_prompt
from gpt2.prefix_io import load_prefix
from gpt2.train_control import FAMILY, max_positions, split_layers
from gpt2.tuning import load_tuned
from prefixlib import checkpoint, files, metrics, record
from prefixlib.base_model import choose_base, load_model, load_tokenizer
from prefixlib.beam_search import DecodingRule
from prefixlib.errors import UserError, one_line_errors
from prefixlib.launch import Parser, add_yes_no
from prefixlib.readers import Group, data_file, prompt_text, read_groups

logger = logging.getLogger("gpt2.run_generation")


@dataclass
class Generator:
    """A model ready to decode: the language model, its prefix if it has one, and what its training knew."""

    model: nn.Module
    tokenizer: Any
    layers: Sequence[tuple[Tensor, Tensor]] | None = None  # prefix keys and values, each (1, H, P, D)
    seen_categories: Collection[str] = field(default_factory=tuple)  # categories of the training set (WebNLG)

    @property
    def prompt_room(self) -> int:
        """Positions that the model leaves beside the prefix."""
        return max_positions(self.model.config) - (self.layers[0][0].shape[2] if self.layers else 0)


def add_flags(parser: Parser) -> None:
    """The decoding flags that gen.py passes on."""
    group = parser.add_argument_group("decoding")
    group.add_argument("--data_file", help="the file to decode (default: the mode's SPLIT file under --data_dir)")
    group.add_argument("--data_dir", help="folder with e2e_data/, webnlg_challenge_2017/, dart/ (default: data/)")
    group.add_argument("--output_dir", help="where the outputs go (default: into the checkpoint's folder)")
    group.add_argument("--model_name_or_path", help="base model, where the checkpoint's own is not to be found")
    group.add_argument("--cache_dir", help="where hub files are kept")
    group.add_argument("--strategy", default="beam", choices=decoding.STRATEGIES, help="how tokens are chosen")
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


def load_generator(
    directory: Path, mode: str, model_name: str | None, cache_dir: str | None, dtype: torch.dtype
) -> Generator:
    """A prefix checkpoint on its base model, or the folder of a tuned model. Raises UserError on any mismatch."""
    if not checkpoint.is_prefix(directory) and (directory / "config.json").is_file():
        return _load_finetuned(directory, mode, model_name, cache_dir, dtype)
    prefix = load_prefix(directory)
    checkpoint.check_agrees({"mode": mode}, {"mode": prefix.task.get("mode") or mode}, directory)
    name, revision = choose_base(prefix.base, model_name, directory)
    model = load_model(name, FAMILY, revision=revision, cache_dir=cache_dir, dtype=dtype)
    tokenizer = load_tokenizer(name, revision=revision, cache_dir=cache_dir)
    config = type(prefix.config).for_model(
        model.config,
        **{key: value for key, value in prefix.config.as_dict().items() if not key.startswith(("n_", "head"))},
    )
    if config != prefix.config:
        raise UserError(f"the prefix in {directory} was trained for a model of another shape than {name}")
    layers = split_layers(prefix.flat, prefix.config, batch_size=1)
    return Generator(_to_device(model), tokenizer, layers, prefix.task.get("categories", ()))


def _load_finetuned(
    directory: Path, mode: str, model_name: str | None, cache_dir: str | None, dtype: torch.dtype
) -> Generator:
    if model_name is not None:
        raise UserError(f"--model_name_or_path {model_name} contradicts {directory}, which is a whole model itself")
    model, task = load_tuned(directory, mode, cache_dir=cache_dir, dtype=dtype)
    tokenizer = load_tokenizer(str(directory), cache_dir=cache_dir)
    return Generator(_to_device(model), tokenizer, None, task.get("categories", ()))


def _to_device(model: nn.Module) -> nn.Module:
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


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


def decode_file(generator: Generator, mode: str, path: Path, stem: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Decode every distinct source of `path`; write STEM_{beam,gold,src}; return scores and counts.

    `stem` is OUTPUT_DIR/NAME_SPLIT. The three files are in the data file's order, one line per distinct source
    (references: one per line, a blank line after each source).
    """
    groups = read_groups(mode, path)
    tokenizer = generator.tokenizer
    texts = [prompt_text(mode, group.source, tokenizer.eos_token) for group in groups]
    room = generator.prompt_room - args.length
    if room < 2:
        raise UserError(
            f"--length {args.length}: the model has only {generator.prompt_room} positions for prompt and output"
        )
    whole = encode(tokenizer, texts)
    prompts = [truncate_prompt(prompt, room) for prompt in whole]
    cut = sum(len(a) != len(b) for a, b in zip(whole, prompts, strict=True))
    if cut:
        logger.warning("%d of %d sources cut to %d tokens to leave room for the output", cut, len(prompts), room)
    started = time.perf_counter()
    hypotheses = decoding.decode(
        generator.model,
        prompts,
        decoding_rule(args, tokenizer),
        layers=generator.layers,
        strategy=args.strategy,
        batch_size=args.batch_size,
        seed=args.seed,
        progress=args.disable_tqdm == "no",
    )
    seconds = time.perf_counter() - started
    outputs = [decoding.to_text(tokenizer, hypothesis.tokens) for hypothesis in hypotheses]
    write_outputs(stem, args.strategy, outputs, groups, texts)
    logger.info(
        "%d sentences in %.1f s (%.1f/s) -> %s_%s", len(outputs), seconds, len(outputs) / seconds, stem, args.strategy
    )
    return {
        "data_file": str(path),
        "sentences": len(outputs),
        "sources_cut": cut,
        "seconds": round(seconds, 2),
        "scores": score_groups(mode, outputs, groups, generator.seen_categories),
    }


def write_outputs(
    stem: Path, strategy: str, outputs: Sequence[str], groups: Sequence[Group], prompts: Sequence[str]
) -> None:
    """The three output files, named as the original named them."""
    gold = "".join("".join(f"{reference}\n" for reference in group.references) + "\n" for group in groups)
    for kind, text in (
        (strategy, "".join(f"{output}\n" for output in outputs)),
        ("gold", gold),
        ("src", "".join(f"{prompt}\n" for prompt in prompts)),
    ):
        files.write_text(stem.with_name(f"{stem.name}_{kind}"), text)


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
    parser.add_argument("--mode", required=True, help="the task the checkpoint was trained for")
    parser.add_argument("--split", required=True, choices=("valid", "test"), help="which file of the data set")
    parser.add_argument("--checkpoint", required=True, help="prefix checkpoint or fine-tuned model folder")
    add_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    record.set_up_logging()
    directory = Path(args.checkpoint).expanduser().resolve()  # resolved: a trailing slash changes no name
    path = Path(args.data_file) if args.data_file else data_file(args.mode, args.split, args.data_dir)
    if not path.is_file():
        read_groups(args.mode, path)  # raises the reader's own message before a model is loaded
    dtype = torch.bfloat16 if args.bf16 == "yes" else torch.float32
    generator = load_generator(directory, args.mode, args.model_name_or_path, args.cache_dir, dtype)
    out = Path(args.output_dir).expanduser().resolve() if args.output_dir else directory
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
