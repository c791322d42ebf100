"""E2E challenge csv -> the tokenised `source||target` lines of the original's src1_*.txt (standard library only).

The original's files were made by splitting each text into sentences and tokenising each sentence alone, by the Moses
English rules with hyphens split (`family - friendly`). The rules below reproduce its src1_valid.txt line for line
(4,672 of 4,672), its quirks included: a quote or a comma after a digit stays attached at a sentence's edge
(`'Strada ' is`, `more than £ 30,`), so does a full stop between a bare number and a small letter (`5. it is`).
"""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from prefixlib.system.errors import UserError

KEYS = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}  # other keys do not change
HUB = {"meaning_representation": "mr", "human_reference": "ref"}  # the columns' names on the hub
FIELD = re.compile(r"\s*([^\[\],]+)\[([^\[\]]*)\]\s*(?:,|$)")

LETTER = r"[^\W\d_]"
MOSES_RULES = [
    (re.compile(r"([^\w\s.',-])"), r" \1 "),  # every sign but . ' , - is a token
    (re.compile(r"(?<=[^\W_])-(?=[^\W_])"), " - "),  # family-friendly, 20-25; not "high- priced", not "--"
    (re.compile(r"(\.{2,})"), r" \1 "),
    (re.compile(r"(?<=\D),|,(?=\D)"), " , "),  # not 1,000; not after a digit that ends the sentence
    (re.compile(rf"(?<={LETTER})'(?={LETTER})"), " \0"),  # isn't -> isn 't; \0 keeps the next rule off
    (re.compile(r"(?<=.)'(?=.)"), " ' "),  # not at either edge of the sentence
    (re.compile("\0"), "'"),
]
SENTENCE_END = re.compile(r"[.!?]['\"]?$")
NUMBER_STOP = re.compile(r"-?[.,]?\d[\d,.-]*\.")
ABBREVIATIONS = {"Dr", "Mr", "Mrs", "Ms", "St", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"}


def _sentences(text: str) -> Iterator[str]:
    words = text.split()
    sentence: list[str] = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        sentence.append(word)
        unfinished = word[:-1] in ABBREVIATIONS or (NUMBER_STOP.fullmatch(word) and following[:1].islower())
        if SENTENCE_END.search(word) and not unfinished:
            yield " ".join(sentence)
            sentence = []
    if sentence:
        yield " ".join(sentence)


def _tokens(sentence: str) -> Iterator[str]:
    for pattern, replacement in MOSES_RULES:
        sentence = pattern.sub(replacement, sentence)
    words = sentence.split()
    for word, following in zip(words, [*words[1:], ""], strict=True):
        stem = word.removesuffix(".")
        attached = stem in ABBREVIATIONS or following[:1].islower() or ("." in stem and re.search(LETTER, stem))
        if stem == word or not stem.strip(".") or attached:
            yield word
        else:
            yield from (stem, ".")


def tokenise(text: str) -> str:
    """Tokens joined by single spaces: "It isn't family-friendly." -> "It isn 't family - friendly ."."""
    return " ".join(token for sentence in _sentences(text) for token in _tokens(sentence))


def linearise_meaning(meaning: str) -> str:
    """`name[The Mill], eatType[pub]` -> `name : The Mill | Type : pub`; ValueError for any other shape."""
    fields, position = [], 0
    while position < len(meaning.rstrip()):
        field = FIELD.match(meaning, position)
        if not field:
            raise ValueError(f"expected key[value], key[value], …, found {meaning!r}")
        key = field[1].strip()
        fields.append(f"{KEYS.get(key, key)} : {tokenise(field[2])}")
        position = field.end()
    return " | ".join(fields)


def csv_lines(path: str | Path) -> Iterator[str]:
    """Yield one `source||target ` line (the trailing space is the original's) per row of an E2E csv, in file order.

    The columns are mr and ref, in either case, or the hub's names for them. Raises UserError naming file and line.
    """
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        try:
            names = {name.strip().lower(): name for name in rows.fieldnames or [] if name}
            columns = {HUB.get(lower, lower): name for lower, name in names.items()}
            if not {"mr", "ref"} <= columns.keys():
                raise UserError(f"{path}:1: expected the columns mr and ref, found {rows.fieldnames}")
            for row in rows:
                meaning, text = row[columns["mr"]], row[columns["ref"]]
                if not (meaning or "").strip() or not (text or "").strip():
                    raise UserError(
                        f"{path}:{rows.line_num}: expected a meaning and a text, found {meaning!r}, {text!r}"
                    )
                yield f"{linearise_meaning(meaning)}||{tokenise(text)} "
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error.reason}); convert it to UTF-8") from None
        except (csv.Error, ValueError) as error:
            raise UserError(f"{path}:{rows.line_num}: {error}") from None
