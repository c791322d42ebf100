"""Text as the WebNLG 2017, DART and E2E evaluations hand it to their scorers.

WebNLG and DART: tokenised, lower-cased, WebNLG's in ASCII too.

Every character that is neither letter, digit nor underscore becomes a token of its own. WebNLG's official script makes
hypotheses ASCII before it splits them, references after: a reference's "½" stays one token, "1/2".
"""

import re
import unicodedata

REFERENCES = 3  # the official scores use the first three references of each input

# Unidecode's spelling of what Unicode does not decompose; anything else loses its accents
_ASCII = {
    "¡": "!", "¢": "C/", "£": "PS", "¥": "Y=", "§": "SS", "©": "(c)", "«": "<<", "®": "(r)", "°": "deg", "±": "+-",
    "´": "'", "µ": "u", "¶": "P", "·": "*", "»": ">>", "¼": "1/4", "½": "1/2", "¾": "3/4", "¿": "?", "Æ": "AE",
    "Ð": "D", "×": "x", "Ø": "O", "Þ": "Th", "ß": "ss", "æ": "ae", "ð": "d", "÷": "/", "ø": "o", "þ": "th",
    "Đ": "D", "đ": "d", "Ħ": "H", "ħ": "h", "ı": "i", "Ł": "L", "ł": "l", "Ŋ": "NG", "ŋ": "ng", "Œ": "OE",
    "œ": "oe", "Ŧ": "T", "ŧ": "t", "ƒ": "f", "Ə": "@", "ə": "@", "Ǿ": "O", "ǿ": "o", "Ǽ": "AE", "ǽ": "ae",
    "\u00ad": "", "‐": "-", "‑": "-", "‒": "-", "–": "-", "—": "--", "―": "--", "‘": "'", "’": "'", "‚": ",",
    "‛": "'", "“": '"', "”": '"', "„": ",,", "†": "+", "‡": "++", "•": "*", "‰": "%0", "′": "'", "″": "''",
    "‹": "<", "›": ">", "⁄": "/", "€": "EUR", "₹": "Rs", "₺": "L", "₽": "R", "№": "No. ", "™": "(tm)", "−": "-",
    "√": "", "≤": "<=", "≥": ">=", "♀": "", "♂": "", "♭": "", "♯": "#", "\u200b": "", "\ufeff": "",
}  # fmt: skip


def to_ascii(text: str) -> str:
    """The text in ASCII, as Unidecode writes Latin script, punctuation and currency signs.

    A letter of another script goes through Unidecode where that package is installed and stays as it is elsewhere:
    hypotheses and references are treated alike, so equal words stay equal.
    """
    if text.isascii():
        return text
    return "".join(character if character.isascii() else _spell(character) for character in text)


def _spell(character: str) -> str:
    if character in _ASCII:
        return _ASCII[character]
    plain = "".join(c for c in unicodedata.normalize("NFKD", character) if not unicodedata.combining(c))
    if plain.isascii() and (plain or unicodedata.combining(character)):
        return plain
    try:
        from unidecode import unidecode
    except ImportError:
        return character
    return unidecode(character)


def _split(text: str) -> str:
    return " ".join(re.sub(r"(\W)", r" \1 ", text).split())


def webnlg_hypothesis(text: str) -> str:
    """A system's output as WebNLG's scorers see it."""
    return _split(to_ascii(to_ascii(text.strip()).lower()))


def webnlg_reference(text: str) -> str:
    """A reference as WebNLG's scorers see it; they lower-case it a second time themselves (-lc, -norm)."""
    return to_ascii(_split(text).lower())


def three(references: list[list[str]]) -> list[list[str]]:
    """Three references for each input; a missing one is the empty text, as in the official files."""
    return [[*texts[:REFERENCES], *[""] * (REFERENCES - len(texts))] for texts in references]


def webnlg(hypotheses: list[str], references: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Hypotheses and three references each, in ASCII."""
    scored = [[webnlg_reference(text) for text in texts] for texts in three(references)]
    return [webnlg_hypothesis(text) for text in hypotheses], scored


def dart(hypotheses: list[str], references: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Hypotheses and three references each; accents stay, as in DART's reference files."""
    return [_split(text).lower() for text in hypotheses], [
        [_split(text).lower() for text in texts] for texts in three(references)
    ]


def e2e(hypotheses: list[str], references: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """The texts as they are, without empty references: the E2E scorer's references are those that exist."""
    return hypotheses, [[text for text in texts if text.strip()] for texts in references]
