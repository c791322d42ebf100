"""From records to batches: tokenising, truncating so that the separator survives, masking the source, right padding.

Legend: B batch, T tokens of the longest example in the batch.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from prefixlib.errors import UserError
from prefixlib.readers import Record, training_text

logger = logging.getLogger(__name__)

IGNORED = -100  # label of a position that the loss does not count


@dataclass(frozen=True)
class Encoded:
    """One example: ids of source and separator, then ids of target and final eos, of which alone the loss is taken."""

    prompt: list[int]
    continuation: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.continuation)


class TableToTextDataset(Dataset):
    """All training pairs of a data set, tokenised once; items are `Encoded`."""

    def __init__(
        self,
        mode: str,
        records: Sequence[Record],
        tokenizer,
        max_length: int,
        source_limit: int | None = None,
        target_limit: int | None = None,
    ):
        """Keep what training uses (WebNLG: lexicalisations marked good) and cut examples longer than `max_length`.

        `max_length` is what the model leaves beside the prefix; before that, sources and targets are cut to their own
        limits where the mode has them (summaries). Raises UserError if nothing is left to train on.
        """
        pairs = [
            training_text(mode, record.source, record.target, tokenizer.eos_token)
            for record in records
            if record.trainable and record.target.strip()
        ]
        if not pairs:
            raise UserError(f"no text to train on among {len(records)} records of mode {mode}")
        prompts = encode(tokenizer, [prompt for prompt, _ in pairs], source_limit)
        continuations = encode(tokenizer, [continuation for _, continuation in pairs], target_limit)
        whole = [Encoded(*both) for both in zip(prompts, continuations, strict=True)]
        self.examples = [truncate(example, max_length) for example in whole]
        self.tokens_cut = sum(len(example) for example in whole) - sum(len(example) for example in self.examples)
        if self.tokens_cut:
            cut = sum(len(a) != len(b) for a, b in zip(whole, self.examples, strict=True))
            logger.warning(
                "%d of %d examples cut to %d tokens (%d tokens lost)", cut, len(whole), max_length, self.tokens_cut
            )

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Encoded:
        return self.examples[index]


def encode(tokenizer, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
    """Token ids per text. Nothing is added: spaces and separators are in the text.

    With `limit` at most that many ids stand before the closing separator.
    """
    rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return rows if limit is None else [truncate_prompt(row, limit + 1) for row in rows]


def truncate(example: Encoded, max_length: int) -> Encoded:
    """Cut to `max_length` tokens: the end of the target first, then the end of the source, never the separator.

    The source gives way only where it would leave the target less than a quarter of the room.
    """
    if len(example) <= max_length:
        return example
    target_room = min(len(example.continuation), max(max_length // 4, 1))
    prompt = truncate_prompt(example.prompt, max_length - target_room)
    return Encoded(prompt, example.continuation[: max_length - len(prompt)])


def truncate_prompt(prompt: list[int], max_length: int) -> list[int]:
    """Cut the source's end so that the prompt has `max_length` tokens and still ends in its separator."""
    return prompt if len(prompt) <= max_length else prompt[: max_length - 1] + prompt[-1:]


def collate(examples: Sequence[Encoded], pad_token_id: int) -> dict[str, Tensor]:
    """Right-padded `input_ids` (B, T), `labels` (B, T) with source and padding ignored, `attention_mask` (B, T)."""
    width = max(len(example) for example in examples)
    input_ids = torch.full((len(examples), width), pad_token_id)
    labels = torch.full((len(examples), width), IGNORED)
    attention_mask = torch.zeros((len(examples), width), dtype=torch.long)
    for row, example in enumerate(examples):
        input_ids[row, : len(example)] = torch.tensor(example.prompt + example.continuation)
        labels[row, len(example.prompt) : len(example)] = torch.tensor(example.continuation)
        attention_mask[row, : len(example)] = 1
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
