"""Data of this tree: reading, batching in an order that can be resumed, tokenising.

Legend: B batch, S source tokens, T target tokens.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from prefixlib import readers
from prefixlib.errors import UserError
from seq2seq.flags import LENGTHS, MODES

SPLITS = {"train": "train", "eval": "val", "test": "test"}  # ours -> file names of summaries
TABLE_SPLITS = {"train": "train", "eval": "valid", "test": "test"}  # ours -> the readers'


@dataclass(frozen=True)
class Example:
    """One input with its references; training has one."""

    source: str
    references: tuple[str, ...]
    category: str = ""  # WebNLG's
    filler: bool = False  # keeps a process busy that has no row in a short last batch; counts for nothing


class Lines:
    """A text file's lines by number without holding them all: byte offsets, and one read per access.

    Raises UserError for a file that is absent or empty, an empty line, text that is not UTF-8.
    """

    def __init__(self, path: Path):
        self.path = path
        self.offsets = [0]
        if not path.is_file():
            prepare = "run `python scripts/prepare_data.py`, or pass --data_dir or --train_file/--eval_file/--test_file"
            raise UserError(f"{path}: no such file; {prepare}")
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    raise UserError(f"{path}:{number}: expected one document a line, found an empty line")
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    raise UserError(f"{path}:{number}: not UTF-8 text ({error.reason}); convert it") from None
                self.offsets.append(self.offsets[-1] + len(line))
        if not len(self):
            raise UserError(f"{path}: the file is empty")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> list[int]:
        """Bytes of each line, without reading them."""
        return [end - start for start, end in itertools.pairwise(self.offsets)]

    def __getitem__(self, index: int) -> str:
        with open(self.path, "rb") as file:  # opened anew: worker processes must not share a position
            file.seek(self.offsets[index])
            return file.read(self.offsets[index + 1] - self.offsets[index]).decode().strip()


class Summaries(Dataset):
    """`X.source` and `X.target`, line n of one belonging to line n of the other; items are `Example`.

    Raises UserError as Lines, and for files of unequal length.
    """

    def __init__(self, source: Path, first: int = -1):
        if not source.name.endswith("source"):
            raise UserError(f"{source}: expected a file ending in 'source', with its 'target' file beside it")
        self.sources = Lines(source)
        self.targets = Lines(source.with_name(source.name.removesuffix("source") + "target"))
        counts = len(self.sources), len(self.targets)
        if counts[0] != counts[1]:
            raise UserError(f"{source} has {counts[0]} lines and {self.targets.path.name} has {counts[1]}: one is cut")
        self.size = counts[0] if first < 0 else min(first, counts[0])

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        return Example(self.sources[index], (self.targets[index],))


def find_file(mode: str, split: str, file: str | None, data_dir: str | None) -> Path:
    """The file of split train, eval or test: `file` if given, else the mode's own under `data_dir`."""
    if file is not None:
        return Path(file).expanduser()
    row = MODES[mode]
    folder = Path(data_dir).expanduser() if data_dir is not None else None
    if row.is_table:
        return readers.data_file(row.data, TABLE_SPLITS[split], folder)
    return (folder or readers.DATA_DIR / row.data) / f"{SPLITS[split]}.source"


def load_examples(mode: str, split: str, path: Path, first: int = -1) -> Sequence[Example]:
    """The first `first` examples of a file; tables: pairs to train on, or every distinct input with its references.

    Raises UserError for a bad file, naming file and line.
    """
    row = MODES[mode]
    if not row.is_table:
        return Summaries(path, first)
    if split == "train":
        records = [record for record in readers.iter_records(row.data, path) if record.trainable]
        examples = [Example(r.source.strip(), (r.target.strip(),)) for r in records if r.target.strip()]
        if not examples:
            raise UserError(f"{path}: no text to train on")
    else:
        examples = [Example(g.source.strip(), g.references, g.category) for g in readers.read_groups(row.data, path)]
    return examples if first < 0 else examples[:first]


def source_lengths(examples: Sequence[Example]) -> list[int]:
    """How long each source is, in bytes or characters: good enough to tell which have about as many tokens."""
    if isinstance(examples, Summaries):
        return examples.sources.lengths()[: len(examples)]
    return [len(example.source) for example in examples]


def find_lengths(args: argparse.Namespace, config) -> dict[str, int]:
    """Tokens kept per kind of text: the flag's, else the mode's. Raises UserError if the model has fewer positions."""
    lengths = {}
    for flag, default in zip(LENGTHS, MODES[args.mode].lengths, strict=True):
        given = getattr(args, flag)
        if (given or 0) > config.max_position_embeddings:
            raise UserError(f"--{flag} {given}: the model has {config.max_position_embeddings} positions")
        lengths[flag.replace("max_", "").replace("_length", "")] = min(given or default, config.max_position_embeddings)
    return lengths


POOL = 50  # batches that are sorted by length together: enough to leave little padding, few enough to stay random


class EpochBatches(Sampler):
    """Lists of indices: every epoch all examples once, in an order that depends on seed and epoch alone.

    Each of `world` processes gets its part of the same global batches of `batch` examples, so the split changes
    nothing. A process without a row in a short last batch gets one filler: the index's complement, a negative number.
    With `lengths`, one per example, a batch holds examples of similar length; the batches come in random order.
    """

    def __init__(
        self,
        size: int,
        batch: int,
        seed: int | None,
        rank: int = 0,
        world: int = 1,
        lengths: Sequence[int] | None = None,
    ):
        self.size, self.batch, self.seed, self.rank, self.world = size, batch, seed, rank, world
        self.lengths = lengths
        self.epoch = self.skip = 0  # the epoch that the next iteration yields, and how many of its batches are done

    def __len__(self) -> int:
        return -(-self.size // self.batch)

    def __iter__(self) -> Iterator[list[int]]:
        # A generator: it reads its place when it is first asked, for a DataLoader with workers makes two and asks one.
        epoch, skip, self.skip = self.epoch, self.skip, 0
        order = list(range(self.size))
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(self.size, generator=generator).tolist()
            if self.lengths is not None:
                order = self._by_length(order, generator)
        for number in range(skip, len(self)):
            together = order[number * self.batch : (number + 1) * self.batch]
            yield together[self.rank :: self.world] or [~together[0]]

    def _by_length(self, order: list[int], generator: torch.Generator) -> list[int]:
        """The order with every pool sorted by length and then cut into batches, shuffled; a short one stays last."""
        pool = POOL * self.batch
        pools = [
            sorted(order[start : start + pool], key=self.lengths.__getitem__) for start in range(0, len(order), pool)
        ]
        order = list(itertools.chain.from_iterable(pools))
        full = len(order) // self.batch
        shuffled = torch.randperm(full, generator=generator).tolist()
        batches = [order[number * self.batch : (number + 1) * self.batch] for number in shuffled]
        return [*itertools.chain.from_iterable(batches), *order[full * self.batch :]]


class ResumableLoader(DataLoader):
    """A DataLoader over EpochBatches whose position can be saved. The trainer's module says where training stands."""

    def __init__(self, examples: Sequence[Example], batches: EpochBatches, collate, workers: int):
        super().__init__(
            _WithFillers(examples),
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
        self.position = (0, 0)  # epoch and batches of it that training has taken

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.position[0], "batches": self.position[1]}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batch_sampler.epoch, self.batch_sampler.skip = state["epoch"], state["batches"]


class _WithFillers(Dataset):
    """Examples, with negative indices standing for fillers."""

    def __init__(self, examples: Sequence[Example]):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return replace(self.examples[~index], filler=True) if index < 0 else self.examples[index]


@dataclass(frozen=True)
class Collator:
    """Examples -> padded tensors: input_ids and attention_mask (B, S), decoder_input_ids and labels (B, T).

    Texts get the tokenizer's special tokens and no space in front (the original's way). `labels` is `<s> w1 … </s>`,
    `decoder_input_ids` the same moved right behind the model's start token, so that `<s>` is predicted too.
    """

    tokenizer: Any
    padding: int
    start: int
    max_source_length: int
    max_target_length: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        sources = self.tokenizer(
            [example.source for example in examples],
            max_length=self.max_source_length,
            truncation=True,
            padding="longest",
            return_tensors="pt",
        )
        labels = self.tokenizer(
            text_target=[example.references[0] if example.references else "" for example in examples],
            max_length=self.max_target_length,
            truncation=True,
            padding="longest",
            return_tensors="pt",
        )["input_ids"]
        decoder_input_ids = torch.cat([torch.full((len(examples), 1), self.start), labels[:, :-1]], dim=1)
        for row, example in enumerate(examples):
            if example.filler or not example.references:
                labels[row] = self.padding
        return {
            "input_ids": sources["input_ids"],
            "attention_mask": sources["attention_mask"],
            "decoder_input_ids": decoder_input_ids,
            "labels": labels,
            "cut": count_cut(sources),
            "references": [None if example.filler else list(example.references) for example in examples],
        }


def count_cut(encoded) -> int:
    """How many of the tokenizer's outputs lost tokens to truncation."""
    return sum(bool(encoding.overflowing) for encoding in encoded.encodings or ())
