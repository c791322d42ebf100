"""Decoded tokens as the original's text: cleaned as transformers 3.2 did, on one line."""

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
