"""Special tokens in data, and characters that a tokenizer loses (standard library only).

    check_rows(tokenizer, path, (([record.place], [record.source, record.target]) for record in records))

Texts are searched for the tokens' spellings instead of being tokenised: this costs little, and special tokens that a
chat template adds are not mistaken for the user's.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prefixlib.data.conversations import Chat
from prefixlib.data.readers import Group, Record, short
from prefixlib.data.tasks import without
from prefixlib.system.errors import UserError

logger = logging.getLogger(__name__)


def check_rows(tokenizer: Any, path: Path, rows: Iterable[tuple[Sequence[str], Iterable[str]]]) -> None:
    """Search every row, (its places, its texts), for the tokenizer's special tokens.

    Raises UserError with file and row for the token that ends a text. A warning counts the others and names the first.
    """
    tokens = _special(tokenizer)
    if not tokens:
        return
    search = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))).search
    end, first, count, total = tokenizer.eos_token, None, 0, 0
    for places, texts in rows:
        place, hit = next(iter(places), ""), None
        total += 1
        for text in texts:
            for part in [message["content"] for message in text.messages] if isinstance(text, Chat) else [text]:
                found = search(part)
                if found and end and end in part:
                    try:
                        without(end, part)
                    except UserError as error:
                        raise UserError(f"{path}: {place}: {error}; take it out of the text") from None
                hit = hit or found
        if hit:
            first, count = first or (place, hit[0]), count + 1
    if first:
        logger.warning(
            "%s: %d of %d rows hold special tokens, which the model does not read as text; the first one is %s in %s",
            *(path, count, total, first[1], first[0]),
        )


def texts_of(rows: Iterable[Record | Group]) -> Iterator[tuple[Sequence[str], Sequence[str]]]:
    """Places and texts of rows, as `check_rows` takes them; groups, which are decoded, give the source alone."""
    for row in rows:
        yield (row.places, [row.source]) if isinstance(row, Group) else ([row.place], [row.source, row.target])


def warn_of_lost_characters(tokenizer: Any, texts: Iterable[str]) -> None:
    """Warn if a tokenizer does not reproduce a text: T5's, for example, has no line break.

    Only texts with a character that no earlier text has are checked, so that many texts take little time.
    """
    known: set[str] = set()
    special = _special(tokenizer)
    for text in texts:
        if known.issuperset(text):
            continue
        known.update(text)
        if any(token in text for token in special):
            continue  # `check_rows` reports these
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if found != text:
            logger.warning(
                "the tokenizer does not keep every character: it turns %s into %s", short(text), short(found)
            )
            return


def _special(tokenizer: Any) -> set[str]:
    """The spellings of the special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return {str(token) for token in added if token.special} | set(getattr(tokenizer, "all_special_tokens", ()))
