"""Decoded tokens as the original's text: cleaned as transformers 3.2 did, on one line; a text that a flag gives."""

from pathlib import Path

from prefixlib.errors import UserError

# today's tokenizers leave these as they are; the published scores were taken after the cleaning
CLEAN_UP = (
    *((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'")),
    *((" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")),
)


def clean_up(text: str) -> str:
    """Spaces before punctuation and contractions removed, newlines turned into spaces, ends stripped."""
    for before, after in CLEAN_UP:
        text = text.replace(before, after)
    return " ".join(text.split("\n")).strip()


def text_or_file(flag: str, value: str) -> str:
    """The text that a flag gives, or for @FILE what the file holds without its last newline.

    Raises UserError if the file can't be read.
    """
    if not value.startswith("@"):
        return value
    path = Path(value[1:]).expanduser()
    try:
        return path.read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{flag} {value}: {path} cannot be read ({reason})") from error
