"""Export a prefix to other tools, or import one from PEFT.

python scripts/export.py CHECKPOINT --to peft      a folder for peft.PeftModel.from_pretrained (decoder-only models)
python scripts/export.py CHECKPOINT --to kv        plain keys and values per layer
python scripts/export.py CHECKPOINT --to cache     states for transformers.DynamicCache (decoder-only models)
python scripts/export.py ADAPTER --from peft --mode webnlg --output_dir OUT     a checkpoint that gpt2/gen.py decodes
"""

if __name__ == "__main__":
    from prefixlib.system import startup

    startup.begin()

import argparse
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM

from formats import example, kv
from gpt2 import model as gpt2_model
from gpt2 import train_control
from prefixlib.base_model.load import HUB_IDS, choose_base, load_config
from prefixlib.checkpoints import checkpoint, original, peft_format
from prefixlib.data.tasks import GPT2_MODES
from prefixlib.settings.flags import Parser, refuse_together
from prefixlib.system import files
from prefixlib.system.errors import UserError, one_line_errors
from seq2seq import model as seq2seq_model
from seq2seq import prefixTuning as seq2seq_prefix
from seq2seq.frozen_lm import shares_rows

log = logging.getLogger("export")

WRITTEN = {
    "peft": {peft_format.CONFIG, peft_format.WEIGHTS, peft_format.CARD, example.NAME},
    "kv": {kv.ARRAYS, kv.SHAPES, kv.CARD, example.NAME},
    "cache": {kv.CACHE, kv.CARD, example.NAME},
}
KV_SITES = {"self": kv.DECODER, "cross": kv.CROSS, "encoder": kv.ENCODER}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command line -> flags; combinations that make no sense are refused by name."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "source", help="with --to: a prefix checkpoint, ours or the original's; with --from: an adapter"
    )
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument(
        "--to", choices=tuple(WRITTEN), help="peft: a PEFT adapter; kv: keys and values; cache: a DynamicCache"
    )
    way.add_argument("--from", dest="from_", choices=("peft",), help="read a PEFT adapter, write a checkpoint")
    parser.add_argument("--output_dir", help="a new folder (default with --to: its name, inside the checkpoint)")
    parser.add_argument(
        "--model_name_or_path", help="base model, if the source names none or it has moved (default: the source's)"
    )
    parser.add_argument("--mode", choices=GPT2_MODES, help="with --from: the task the adapter was trained for")
    args = parser.parse_args(argv)
    if args.from_ and not (args.output_dir and args.mode):
        raise UserError("--from peft needs --output_dir, the new checkpoint's folder, and --mode, its task")
    if args.to and args.mode:
        refuse_together(f"--to {args.to}", f"--mode {args.mode}", "the checkpoint knows its task")
    return args


def export_prefix(args: argparse.Namespace) -> Path:
    """Write a checkpoint in the format --to; returns the new folder. Raises UserError if the format cannot hold it."""
    directory = Path(args.source).expanduser()
    is_seq2seq = family_of(directory) == seq2seq_prefix.FAMILY
    if args.to == "peft" and is_seq2seq:
        raise UserError(
            f"--to peft cannot hold {directory}: PEFT prefixes only the decoder's self-attention of an encoder-decoder "
            "and shifts its positions; use --to kv"
        )
    if args.to == "cache" and is_seq2seq:
        raise UserError(f"--to cache cannot hold {directory}: an encoder-decoder has several caches; use --to kv")
    tree = seq2seq_model if is_seq2seq else gpt2_model
    loaded = tree.load_prefix(directory)
    if not is_seq2seq:
        check_same_for_all(loaded.config, directory, args.to)
        check_one_shape(loaded.config, directory, args.to)
    base = base_of(loaded.base, args.model_name_or_path, directory)
    if args.model_name_or_path:
        shape = tree.shape_by_name(base["name"], revision=base["revision"])
        tree.Model.check_fits(loaded.config, shape, directory, base["name"])
    prompt = example.Prompt(loaded.task, not is_seq2seq, is_seq2seq or loaded.config.format_mode != "nopeek")
    if args.to == "peft":
        adapter = peft_format.Adapter(loaded.flat, loaded.config.n_layer, loaded.config.n_head, base)
        code = example.with_peft(prompt, base)
        return write_folder(args, directory, lambda folder: peft_format.write(folder, adapter), prompt, code)
    keys_values = kv.KeysValues(
        sites=cut_seq2seq(loaded) if is_seq2seq else cut_gpt2(loaded),
        family=seq2seq_prefix.FAMILY if is_seq2seq else train_control.FAMILY,
        text_starts_at=0 if is_seq2seq else loaded.flat.shape[0],
        base=base,
        task=loaded.task,
        settable_positions=not is_seq2seq or has_settable_positions(base),
    )
    code = example_of(args.to, prompt, keys_values) if keys_values.settable_positions else ""
    write = kv.write_cache if args.to == "cache" else kv.write
    return write_folder(args, directory, lambda folder: write(folder, keys_values), prompt, code)


def example_of(to: str, prompt: example.Prompt, prefix: kv.KeysValues) -> str:
    """The code of example.py for --to kv or cache."""
    numbers = {name: len(prefix.sites.get(site, ())) for name, site in KV_SITES.items()}
    length = prefix.sites[kv.DECODER][0][0].shape[1] if numbers["self"] else 0
    if prefix.family == seq2seq_prefix.FAMILY:
        return example.encoder_decoder(prompt, prefix.base, kv.ARRAYS, length, numbers)
    lines = CACHE_LINES if to == "cache" else KV_LINES.format(layers=numbers["self"])
    return example.decoder_only(prompt, prefix.base, lines, "from safetensors.torch import load_file", length)


KV_LINES = f"""prefix, name = load_file(HERE / "{kv.ARRAYS}"), "{kv.DECODER}.layer_{{{{}}}}.{{{{}}}}"
layers = range({{layers}})
past = DynamicCache([[prefix[name.format(n, kind)][None] for kind in ("key", "value")] for n in layers])"""
CACHE_LINES = f"""states = load_file(HERE / "{kv.CACHE}")
past = DynamicCache(list(zip(states["keys"], states["values"])))"""


def has_settable_positions(base: Mapping[str, Any]) -> bool:
    """Whether positions can be passed to an encoder-decoder, as to BART; assumed for a model that is not available."""
    try:
        config = load_config(base["name"], revision=base.get("revision"))
    except (UserError, TypeError):
        return True
    with torch.device("meta"):
        return shares_rows(AutoModelForSeq2SeqLM.from_config(config))


def family_of(directory: Path) -> str:
    """The family of a checkpoint, ours or the original's; anything else fails to load."""
    if checkpoint.is_checkpoint(directory):
        return checkpoint.read_config(directory)["family"]
    return seq2seq_prefix.FAMILY if original.is_bart(directory) else train_control.FAMILY


def check_same_for_all(config: train_control.PrefixConfig, directory: Path, to: str) -> None:
    """Raise UserError for a prefix that is not one set of keys and values for all texts."""
    if config.format_mode == "infix" or not config.optim_prefix:
        raise UserError(
            f"--to {to} cannot hold {directory}: its keys and values depend on the source; decode it with gpt2/gen.py"
        )
    if config.prefix_mode == "embedding" and not checkpoint.is_checkpoint(directory):
        raise UserError(
            f"--to {to} cannot hold {directory}: trained embeddings, which are keys and values only once the model has "
            "read them; decode it with gpt2/gen.py"
        )


def check_one_shape(config: train_control.PrefixConfig, directory: Path, to: str) -> None:
    """Raise UserError for a format that stacks the layers' arrays if these differ in shape."""
    keys, values = ({tuple(shape) for shape in config.shapes[n::2]} for n in (0, 1))
    if to != "kv" and (len(keys) > 1 or len(values) > 1):
        raise UserError(f"--to {to} cannot hold {directory}: its layers differ in their heads; use --to kv")
    if to == "peft" and keys != values:
        raise UserError(f"--to peft cannot hold {directory}: its values have other heads than its keys; use --to kv")


def base_of(saved: dict[str, Any], given: str | None, directory: Path) -> dict[str, str | None]:
    """{"name", "revision"} of the base model for the export: --model_name_or_path, or the checkpoint's."""
    if given is None:
        return example.path_of(saved, directory)
    name, revision = choose_base(saved, given, directory)
    return {"name": name, "revision": revision}


def cut_gpt2(loaded: gpt2_model.SavedPrefix) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The only site of a decoder-only model: per layer keys and values (H, P, D)."""
    layers = train_control.split_layers(loaded.flat, loaded.config, batch_size=1)
    return {kv.DECODER: [(keys[0], values[0]) for keys, values in layers]}


def cut_seq2seq(loaded: seq2seq_model.SavedPrefix) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The sites of an encoder-decoder that have a prefix: per layer keys and values (H, P, D)."""
    sites = loaded.for_decoding()(1)
    return {KV_SITES[site]: [(keys[0], values[0]) for keys, values in layers] for site, layers in sites.items()}


def import_adapter(args: argparse.Namespace) -> Path:
    """Turn a PEFT adapter into a checkpoint without an MLP; returns its folder. Raises UserError if it is none."""
    directory = Path(args.source).expanduser()
    if not (directory / peft_format.CONFIG).is_file():
        raise UserError(f"{directory} is not an adapter of PEFT: {peft_format.CONFIG} is missing")
    adapter = gpt2_model.load_prefix(directory)
    saved = {**adapter.base, "name": HUB_IDS.get(adapter.base["name"], adapter.base["name"])}
    name, revision = choose_base(saved, args.model_name_or_path, directory)
    shape = gpt2_model.shape_by_name(name, revision=revision)
    gpt2_model.Model.check_fits(adapter.config, shape, directory, name)
    prefix = adapter.for_decoding()
    prefix.config = replace(prefix.config, n_embd=shape["n_embd"])
    task = {**adapter.task, "mode": args.mode}
    return write_folder(
        args,
        directory,
        lambda folder: gpt2_model.save_prefix(folder, prefix, {"name": name, "revision": revision}, task),
    )


def write_folder(
    args: argparse.Namespace,
    source: Path,
    write: Callable[[Path], None],
    prompt: example.Prompt | None = None,
    code: str = "",
) -> Path:
    """Fill --output_dir whole or not at all; returns it. Raises UserError rather than remove other files there.

    An export also gets `code` as its example.py, and its README describes the prompt.
    """
    target = Path(args.output_dir).expanduser() if args.output_dir else source / args.to
    target = target.resolve()
    there = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if target.exists() and (not target.is_dir() or there - WRITTEN.get(args.to, set())):
        raise UserError(f"--output_dir {target} contains other files: pass a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)

    def fill(folder: Path) -> None:
        folder.mkdir()
        write(folder)
        if prompt is not None and code:
            files.write_text(folder / example.NAME, code)
            card = folder / kv.CARD
            files.write_text(card, card.read_text(encoding="utf-8") + example.readme(prompt))

    files.replace_directory(target, fill)
    return target


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    log.info("%s", import_adapter(args) if args.from_ else export_prefix(args))
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
