"""Real token lengths for scripts/benchmark.py: from data files with a tokenizer, or from histograms in data/lengths/.

A histogram is a JSON object whose `bins` are [source, target, count]: tokens of source and target, counted together.
GPT-2: source with its separator, target with its final eos. BART: both with their special tokens, cut as in training.

Legend: one text is one (source, target) pair of lengths.
"""

import argparse
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from prefixlib.data.tasks import data_file, find_task, prompt_text, read_groups, read_records, training_text
from prefixlib.system.errors import UserError
from prefixlib.system.places import REPOSITORY

RECORDED = REPOSITORY / "data" / "lengths"
MOST_BINS = 1500  # keeps a file under 30 KB
Pair = tuple[int, int]

# name -> tree, mode, split; test and dev: one text per distinct input, with its first reference
SETS = {
    "webnlg_train": ("gpt2", "webnlg", "train"),
    "webnlg_dev": ("gpt2", "webnlg", "valid"),
    "e2e_train": ("gpt2", "data2text", "train"),
    "e2e_dev": ("gpt2", "data2text", "valid"),
    "xsum_train": ("bart", "xsum", "train"),
    "xsum_test": ("bart", "xsum", "test"),
}


def read_lengths(name: str, path: Path, tokenizer_dir: Path) -> list[Pair]:
    """The token lengths of every text in a data file. Raises UserError for a bad file."""
    from prefixlib.base_model.load import load_tokenizer  # here: a recorded histogram needs no tokenizer

    tree, mode, split = SETS[name]
    tokenizer = load_tokenizer(str(tokenizer_dir.expanduser().resolve()))
    if split == "train":
        pairs = [(record.source, record.target) for record in read_records(mode, path) if record.trainable]
    else:
        pairs = [(group.source, group.references[0]) for group in read_groups(mode, path) if group.references]
    pairs = [(source, target) for source, target in pairs if target.strip()]
    if tree == "gpt2":
        from gpt2.dataset import encode

        eos = tokenizer.eos_token
        sources = encode(tokenizer, [prompt_text(mode, source, eos) for source, _ in pairs])
        targets = encode(tokenizer, [training_text(mode, source, target, eos)[1] for source, target in pairs])
    else:
        lengths = find_task(mode).seq2seq.lengths
        limit = lengths["max_target_length" if split == "train" else "test_max_target_length"]
        sources = tokenizer([s for s, _ in pairs], max_length=lengths["max_source_length"], truncation=True)[
            "input_ids"
        ]
        targets = tokenizer([t for _, t in pairs], max_length=limit, truncation=True)["input_ids"]
    return [(len(source), len(target)) for source, target in zip(sources, targets, strict=True)]


def to_bins(pairs: Sequence[Pair], most: int = MOST_BINS) -> list[list[int]]:
    """[source, target, count], sorted; if there are too many, pairs of similar lengths share a bin at their mean."""
    width = 1
    while True:
        groups: dict[Pair, list[Pair]] = {}
        for source, target in pairs:
            groups.setdefault((source // width, target // width), []).append((source, target))
        if len(groups) <= most:
            break
        width += 1
    means = Counter()
    for members in groups.values():
        means[tuple(round(sum(side) / len(members)) for side in zip(*members, strict=True))] += len(members)
    return [[source, target, count] for (source, target), count in sorted(means.items())]


def record_lengths(name: str, path: Path, tokenizer_dir: Path) -> dict:
    """The histogram of a data file, with its origin."""
    tree, mode, split = SETS[name]
    pairs = read_lengths(name, path, tokenizer_dir)
    kept = "every training pair" if split == "train" else "every distinct input with its first reference"
    counted = {
        "gpt2": "source with its separator, target with its eos",
        "bart": "source and target with their special tokens, cut as the mode cuts them",
    }
    bins = to_bins(pairs)
    return {
        "name": name,
        "data": f"{mode}, {split}: {path.name}, {len(pairs)} texts, {kept}",
        "tokenizer": f"{tree}'s byte-pair encoding ({tokenizer_dir.name})",
        "tokens": counted[tree],
        "made_by": f"python scripts/benchmark.py record-lengths --lengths {name} --lengths_from FILE --tokenizer DIR",
        "texts": len(pairs),
        "mean": [round(sum(side) / len(pairs), 2) for side in zip(*pairs, strict=True)],
        "range": [[min(side), max(side)] for side in zip(*pairs, strict=True)],
        "bins": bins,
    }


def write_histogram(path: Path, histogram: dict) -> None:
    """The JSON text, with the bins on few lines."""
    from prefixlib.system import files

    bins = histogram["bins"]
    rows = [json.dumps(bins[start : start + 10])[1:-1].replace(" ", "") for start in range(0, len(bins), 10)]
    head = json.dumps({**histogram, "bins": []}, indent=2, ensure_ascii=False)
    text = head.replace('"bins": []', '"bins": [\n    ' + ",\n    ".join(rows) + "\n  ]")
    files.write_text(path, text + "\n")


def load_lengths(args: argparse.Namespace, name: str) -> list[list[int]]:
    """Bins from --lengths_from with --tokenizer, else those recorded under `name`."""
    if args.lengths_from:
        if not args.tokenizer:
            raise UserError("--lengths_from needs --tokenizer DIR, the folder of the real vocabulary")
        return to_bins(read_lengths(name, args.lengths_from.expanduser(), args.tokenizer))
    path = RECORDED / f"{name}.json"
    if not path.is_file():
        raise UserError(f"{path}: no such histogram; there are {', '.join(sorted(p.stem for p in RECORDED.glob('*')))}")
    return json.loads(path.read_text(encoding="utf-8"))["bins"]


def draw(bins: Sequence[Sequence[int]], count: int, seed: int) -> list[Pair]:
    """`count` texts' lengths, sampled with the histogram's frequencies."""
    chosen = random.Random(seed).choices(bins, weights=[number for *_, number in bins], k=count)
    return [(source, target) for source, target, _ in chosen]


def default_file(name: str) -> Path:
    """The path of a set's file under data/."""
    _, mode, split = SETS[name]
    return data_file(mode, split)
