"""Text normalised as in the WebNLG 2017, DART and E2E evaluations.

WebNLG and DART: tokenised and lower-cased; WebNLG's also in ASCII.

Every character that is neither letter, digit nor underscore becomes a separate token. WebNLG's official script makes
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
    """The text in ASCII, with Unidecode's spelling of Latin script, punctuation and currency signs.

    Unidecode spells letters of other scripts if that package is installed; otherwise they are kept:
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
    """A system's output in the form that WebNLG's scorers compare."""
    return _split(to_ascii(to_ascii(text.strip()).lower()))


def webnlg_reference(text: str) -> str:
    """A reference in the form that WebNLG's scorers compare; they lower-case it again (-lc, -norm)."""
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
    """The unchanged texts without empty references, as in the E2E scorer."""
    return hypotheses, [[text for text in texts if text.strip()] for texts in references]
