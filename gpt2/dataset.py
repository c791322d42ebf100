"""From records to batches: formats, tokenising, truncating so that the separator survives, masking, right padding.

Legend: B batch, T tokens of the longest example in the batch, S of the longest source that a prefix depends on.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from prefixlib.data.readers import Group, Record
from prefixlib.data.tasks import prompt_text, training_text, without
from prefixlib.data.wording import PLAIN, Wording, cut_end
from prefixlib.system.errors import UserError

logger = logging.getLogger(__name__)

IGNORED = -100  # label of a position that the loss does not count


@dataclass(frozen=True)
class Format:
    """Which parts of an example stand in the text, and what the prefix is made of; in training and decoding alike."""

    name: str = "cat"  # --format_mode
    optim_prefix: bool = True  # False: the prefix is made of words of the source
    word: str = ""  # put before every source (the original's low-data fine-tuning)
    wording: Wording = PLAIN  # user data: a template around the source, or a conversation

    def source_text(self, source: str) -> str:
        return f"{self.word} {source}" if self.word else source

    def prompt(self, mode: str, source: str, tokenizer) -> str:
        """The whole prompt. That of a conversation ends as the model's own chat template has it, without a separator.

        Raises UserError for a source that holds the separator.
        """
        if self.wording.chat:
            prompt_text(mode, source, tokenizer.eos_token)  # refuses
            return self.wording.text(source, tokenizer)
        return prompt_text(mode, self.source_text(self.wording.text(source, tokenizer)), tokenizer.eos_token)


@dataclass(frozen=True)
class Encoded:
    """One example: ids of source and separator, then ids of target and final eos, of which alone the loss is taken.

    `source` holds the ids that the example's own prefix depends on, if it has one. The last `closing` ids of the prompt
    are never cut: the separator, or what a chat template puts behind the last message. `cut` counts the tokens of the
    turns that a conversation has lost already.
    """

    prompt: list[int]
    continuation: list[int]
    source: list[int] | None = None
    closing: int = 1
    cut: int = field(default=0, compare=False)

    def __len__(self) -> int:
        """Positions taken: those of the text, and of the source where the prefix stands at its words."""
        return len(self.prompt) + len(self.continuation) + len(self.source or ())


class TableToTextDataset(Dataset):
    """All training pairs of a data set, tokenised once; items are `Encoded`."""

    def __init__(
        self,
        mode: str,
        records: Sequence[Record],
        tokenizer,
        max_length: int,
        form: Format | None = None,
        source_limit: int | None = None,
        target_limit: int | None = None,
    ):
        """Keep what training uses (WebNLG: lexicalisations marked good) and cut examples longer than `max_length`.

        `max_length` is what the model leaves beside the prefix; before that, sources and targets are cut to their own
        limits where the mode has them (summaries). Raises UserError if nothing is left to train on.
        """
        form = form or Format()
        used = [record for record in records if record.trainable and record.target.strip()]
        if not used:
            raise UserError(f"no text to train on among {len(records)} records of mode {mode}")
        texts = [training_text(mode, record.source, record.target, tokenizer.eos_token)[1] for record in used]
        continuations = encode(tokenizer, texts, target_limit)
        rooms = [room_for_prompt(len(ids), max_length) for ids in continuations]
        inputs = encode_inputs(mode, used, tokenizer, form, source_limit, rooms)
        whole = [replace(example, continuation=ids) for example, ids in zip(inputs, continuations, strict=True)]
        self.examples, lost = truncate_all(whole, max_length)
        self.tokens_cut = sum(lost)
        if self.tokens_cut:
            cut = sum(map(bool, lost))
            logger.warning(
                "%d of %d examples cut to %d tokens (%d tokens lost)", cut, len(whole), max_length, self.tokens_cut
            )

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Encoded:
        return self.examples[index]


def encode_inputs(
    mode: str,
    rows: Sequence[Record | Group],
    tokenizer,
    form: Format,
    source_limit: int | None = None,
    rooms: Sequence[int] | None = None,
) -> list[Encoded]:
    """The input of every row: its prompt and, where the prefix depends on it, its source.

    A source's tokens are those of its prompt without the separator, whether the text shows them or the prefix reads
    them; at most `source_limit`. rooms: most tokens of each prompt, for which conversations lose their earliest turns;
    other prompts are cut by `truncate`. Raises UserError for a row without the words that its prefix would be made of.
    """
    if form.wording.chat:
        sources = [without(tokenizer.eos_token, row.source) for row in rows]
        rooms = [sys.maxsize] * len(rows) if rooms is None else rooms
        chats = form.wording.encode(sources, tokenizer, rooms, source_limit, add_special_tokens=False)
        prompts, closing, lost = ([getattr(chat, name) for chat in chats] for name in ("ids", "closing", "cut"))
    else:
        prompts = encode(tokenizer, [form.prompt(mode, row.source, tokenizer) for row in rows], source_limit)
        closing, lost = [1] * len(rows), [0] * len(rows)
    sources = [prompt[:-n] for prompt, n in zip(prompts, closing, strict=True)]
    if form.name in ("nopeek", "infix"):
        prompts = [prompt[-n:] for prompt, n in zip(prompts, closing, strict=True)]
    if form.optim_prefix and form.name != "infix":
        return [Encoded(ids, [], None, n, cut) for ids, n, cut in zip(prompts, closing, lost, strict=True)]
    if form.name == "cat":  # the category words, each with its leading space, as the original's batch had them
        sources = [_joined(encode(tokenizer, [f" {word}" for word in row.fields if word])) for row in rows]
    if not all(sources):
        row = rows[[bool(source) for source in sources].index(False)]
        raise UserError(
            f"--optim_prefix no with --format_mode {form.name}: there are no words to make a prefix of in "
            f"{row.source[:60]!r} (mode {mode}); --format_mode peek takes the words of the source itself"
        )
    return [Encoded(*parts) for parts in zip(prompts, [[] for _ in rows], sources, closing, lost, strict=True)]


def _joined(rows: Sequence[list[int]]) -> list[int]:
    return [token for row in rows for token in row]


def encode(tokenizer, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
    """Token ids per text. Nothing is added: spaces and separators are in the text.

    With `limit` at most that many ids stand before the closing separator.
    """
    rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    return rows if limit is None else [cut_end(row, limit + 1) for row in rows]


def room_for_prompt(target: int, max_length: int) -> int:
    """Most tokens of a prompt beside a target of that many tokens, which keeps a quarter of the positions at least."""
    return max_length - min(target, max(max_length // 4, 1))


def truncate_all(examples: Sequence[Encoded], max_length: int) -> tuple[list[Encoded], list[int]]:
    """The examples in at most `max_length` tokens, and how many tokens each of them lost."""
    fitted = [truncate(example, max_length) for example in examples]
    return fitted, [whole.cut + len(whole) - len(part) for whole, part in zip(examples, fitted, strict=True)]


def truncate(example: Encoded, max_length: int) -> Encoded:
    """Cut to `max_length` tokens: the end of the target first, then the end of the source, never the separator.

    The source is cut only where it would leave the target less than a quarter of the positions. Words that stand in the
    prefix and in the text too are cut in the prefix, down to a quarter of the positions.
    """
    if len(example) <= max_length:
        return example
    if example.source is None:
        room = room_for_prompt(len(example.continuation), max_length)
        prompt = cut_end(example.prompt, room, example.closing)
        return replace(example, prompt=prompt, continuation=example.continuation[: max_length - len(prompt)])
    if len(example.prompt) == example.closing:  # the separator alone: the source stands in the prefix only
        cut = truncate(replace(example, prompt=example.source + example.prompt, source=None), max_length)
        end = len(cut.prompt) - example.closing
        return replace(cut, prompt=cut.prompt[end:], source=cut.prompt[:end])
    text = replace(example, source=None)
    source = example.source[: max(max_length - len(text), max_length // 4)]
    return replace(truncate(text, max_length - len(source)), source=source)


def collate(examples: Sequence[Encoded], pad_token_id: int) -> dict[str, Tensor]:
    """Right-padded `input_ids` (B, T), `labels` (B, T) with source and padding ignored, `attention_mask` (B, T).

    Where the prefix depends on the source, also what `pad_sources` gives.
    """
    texts = [example.prompt + example.continuation for example in examples]
    width = max(len(text) for text in texts)
    input_ids = torch.full((len(examples), width), pad_token_id)
    labels = torch.full((len(examples), width), IGNORED)
    attention_mask = torch.zeros((len(examples), width), dtype=torch.long)
    for row, (example, text) in enumerate(zip(examples, texts, strict=True)):
        input_ids[row, : len(text)] = torch.tensor(text)
        labels[row, len(example.prompt) : len(text)] = torch.tensor(example.continuation)
        attention_mask[row, : len(text)] = 1
    batch = {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
    return batch if examples[0].source is None else batch | pad_sources(examples, pad_token_id)


def pad_sources(examples: Sequence[Encoded], pad_token_id: int = 0) -> dict[str, Tensor]:
    """Right-padded `source` (B, S) and `source_mask` (B, S), 0 at padding, as PrefixLM takes them."""
    source = torch.full((len(examples), max(len(example.source) for example in examples)), pad_token_id)
    source_mask = torch.zeros_like(source)
    for row, example in enumerate(examples):
        source[row, : len(example.source)] = torch.tensor(example.source)
        source_mask[row, : len(example.source)] = 1
    return {"source": source, "source_mask": source_mask}
