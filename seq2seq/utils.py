"""Data of this tree: reading, batching in an order that can be resumed, tokenising.

Legend: B batch, S source tokens, T target tokens.
"""

import itertools
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedConfig

from prefixlib.data.tables import Columns
from prefixlib.data.tasks import find_task, iter_records, read_groups, where_to_get
from prefixlib.data.wording import PLAIN, Wording
from prefixlib.system import processes
from prefixlib.system.errors import UserError
from seq2seq.frozen_lm import start_token


@dataclass(frozen=True)
class Example:
    """One input with its references; training has one."""

    source: str
    references: tuple[str, ...]
    category: str = ""  # WebNLG's
    filler: bool = False  # for a process without a row in a short last batch; counts for nothing
    places: tuple[str, ...] = field(default=(), compare=False)  # where the file has it: "line 3", "row 3"


class Lines:
    """A text file's lines by number without holding them all: byte offsets, and one read per access.

    Raises UserError for a file that is absent (`remedy` says what to do then) or empty, an empty line unless these
    are allowed (`empty`), text that is not UTF-8. A leading byte-order mark is no part of the text.
    """

    def __init__(self, path: Path, remedy: str, empty: bool = False):
        self.path = path
        self.offsets = [0]
        if not path.is_file():
            raise UserError(f"{path}: no such file; {remedy}")
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not empty and not line.removeprefix(BOM_UTF8).strip():
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
            line = file.read(self.offsets[index + 1] - self.offsets[index])
        return (line.removeprefix(BOM_UTF8) if index == 0 else line).decode().strip()

    def __iter__(self) -> Iterator[str]:
        """All lines in order, in one pass over the file."""
        with open(self.path, "rb") as file:
            for number, line in enumerate(file):
                yield (line.removeprefix(BOM_UTF8) if number == 0 else line).decode().strip()


class Summaries(Dataset):
    """`X.source` and `X.target`, line n of one belonging to line n of the other; items are `Example`.

    blind: the targets, or some of them, may be missing, and a file of another name holds documents alone. Raises
    UserError as Lines, and for files of unequal length.
    """

    def __init__(self, source: Path, remedy: str, first: int = -1, blind: bool = False):
        target = source.with_name(source.name.removesuffix("source") + "target")
        alone = blind and not (source.name.endswith("source") and target.is_file())
        if not source.name.endswith("source") and not blind:
            raise UserError(f"{source}: expected a file ending in 'source', with its 'target' file beside it")
        self.sources = Lines(source, remedy)
        self.targets = None if alone else Lines(target, remedy, empty=blind)
        count = len(self.sources)
        if self.targets and len(self.targets) != count:
            raise UserError(f"{source} has {count} lines and {target.name} has {len(self.targets)}: one is cut")
        self.size = count if first < 0 else min(first, count)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        target = self.targets[index] if self.targets else ""
        return Example(self.sources[index], (target,) if target else ())

    def __iter__(self) -> Iterator[Example]:
        """All examples in order, in one pass over the files."""
        targets = self.targets or itertools.repeat("")
        pairs = zip(self.sources, targets, strict=False)
        for number, (source, target) in enumerate(itertools.islice(pairs, self.size), start=1):
            yield Example(source, (target,) if target else (), places=(f"line {number}",))


def load_examples(
    mode: str, split: str, path: Path, first: int = -1, columns: Columns | None = None
) -> Sequence[Example]:
    """The first `first` examples (-1: all) of the file for split train, valid or test.

    Tables: in training every pair, else every distinct input with its references. columns: which are read of user data,
    whose texts stay as they are. Raises UserError for a bad file, naming file and line. In a test file the
    references, or some of them, may be missing.
    """
    task = find_task(mode)
    if not task.is_table and not task.verbatim:
        return Summaries(path, where_to_get(mode), first, blind=split == "test")
    kept = (lambda text: text) if task.verbatim else str.strip
    if split == "train":
        records = [row for row in iter_records(mode, path, columns=columns) if row.trainable and row.target.strip()]
        if not records:
            raise UserError(f"{path}: no text to train on")
        examples = [
            Example(kept(row.source), (kept(row.target),), row.category, places=(row.place,)) for row in records
        ]
    else:
        groups = read_groups(mode, path, blind=split == "test", columns=columns)
        examples = [
            Example(kept(group.source), group.references, group.category, places=group.places) for group in groups
        ]
    return examples if first < 0 else examples[:first]


def source_lengths(examples: Sequence[Example]) -> list[int]:
    """How long each source is, in bytes or characters: good enough to tell which have about as many tokens."""
    if isinstance(examples, Summaries):
        return examples.sources.lengths()[: len(examples)]
    return [len(example.source) for example in examples]


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
        # A generator, so that `epoch` and `skip` are read with the first batch: a DataLoader with workers makes two
        # iterators and takes batches from one.
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
    """A DataLoader over EpochBatches whose position can be saved; the training module keeps `position` up to date."""

    def __init__(self, examples: Sequence[Example], batches: EpochBatches, collate: Callable, workers: int):
        super().__init__(
            _WithFillers(examples),
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=processes.ignore_signals,
            pin_memory=torch.cuda.is_available(),
        )
        self.position = (0, 0)  # epoch and batches of it that training has taken

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.position[0], "batches": self.position[1]}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batch_sampler.epoch, self.batch_sampler.skip = state["epoch"], state["batches"]


def texts_of(examples: Iterable[Example], references: bool = True) -> Iterator[tuple[Sequence[str], Sequence[str]]]:
    """Places and texts of examples, as `special_tokens.check_rows` takes them."""
    for example in examples:
        yield example.places, (example.source, *(example.references if references else ()))


def build_loaders(
    train: Sequence[Example],
    valid: Sequence[Example],
    tokenizer: Any,
    config: PreTrainedConfig,
    lengths: Mapping[str, int],
    *,
    bsz: int,
    eval_bsz: int,
    seed: int,
    by_length: bool = False,
    workers: int = 0,
    wording: Wording = PLAIN,
) -> tuple[ResumableLoader, ResumableLoader]:
    """Training batches, shuffled by the seed, and dev batches in file order; each process has its own part.

    `config` is the base model's: the ids of padding and of the decoder's start token. lengths: most tokens of each kind
    of text. eval_bsz: dev texts of one process. by_length: batches hold sources of similar length. wording: what the
    model reads of a source.
    """
    rank, world, workers = processes.rank(), processes.world_size(), processes.workers_that_fit(workers)
    batches = EpochBatches(len(train), bsz, seed, rank, world, source_lengths(train) if by_length else None)
    valid_batches = EpochBatches(len(valid), eval_bsz * world, None, rank, world)

    def loader(examples: Sequence[Example], batches: EpochBatches, target_length: int) -> ResumableLoader:
        ids = config.pad_token_id, start_token(config)
        collate = Collator(tokenizer, *ids, lengths["max_source_length"], target_length, wording)
        return ResumableLoader(examples, batches, collate, workers)

    return (
        loader(train, batches, lengths["max_target_length"]),
        loader(valid, valid_batches, lengths["val_max_target_length"]),
    )


class _WithFillers(Dataset):
    """Examples, with negative indices standing for fillers."""

    def __init__(self, examples: Sequence[Example]):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return replace(self.examples[~index], filler=True) if index < 0 else self.examples[index]


INPUTS = ("input_ids", "attention_mask", "decoder_input_ids", "labels")  # of a batch, as PrefixLM.loss takes them


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
    wording: Wording = PLAIN

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        texts = [example.source for example in examples]
        sources, cut = encode_sources(self.tokenizer, self.wording, texts, self.max_source_length)
        input_ids = pad_sequence([torch.tensor(ids) for ids in sources], True, self.padding)
        lengths = torch.tensor([len(ids) for ids in sources])
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
            "input_ids": input_ids,
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
            "decoder_input_ids": decoder_input_ids,
            "labels": labels,
            "cut": cut,
            "references": [None if example.filler else list(example.references) for example in examples],
        }


def encode_sources(tokenizer: Any, wording: Wording, sources: Sequence[str], limit: int) -> tuple[list[list[int]], int]:
    """Token ids of sources, cut to `limit` tokens, special tokens included; and how many were cut.

    Of a conversation the earliest turns are left out.
    """
    if wording.chat:
        found = wording.encode(sources, tokenizer, [limit] * len(sources))
        return [encoded.ids for encoded in found], sum(encoded.cut > 0 for encoded in found)
    encoded = tokenizer([wording.text(source, tokenizer) for source in sources], max_length=limit, truncation=True)
    return encoded["input_ids"], sum(bool(encoding.overflowing) for encoding in encoded.encodings or ())
