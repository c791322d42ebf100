"""Penn Treebank tokenisation as in the COCO caption scorer: lower-cased, punctuation dropped.

The E2E scorer measures ROUGE-L, CIDEr and METEOR on text that Stanford's PTBTokenizer (3.4.1, options -preserveLines
-lowerCase) has tokenised and COCO's wrapper has cleared of punctuation. This file gives the same tokens for English
restaurant and encyclopaedia text without Java; it was written from the tokenizer's observed output.
"""

import re
from functools import lru_cache

# What COCO's wrapper drops. The brackets of its list are upper-case and so never match the lower-cased -lrb- and -rrb-.
DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
# PTB spellings of single characters (currency becomes # or $ as in the 1990s corpus)
SPELLED = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "£": "#", "€": "$", "¢": "cents", "…": "...", "–": "--", "—": "--", "½": "1\\/2", "¼": "1\\/4", "¾": "3\\/4",
    "’": "'", "‘": "`", "“": "``", "”": "''", '"': "''",
}  # fmt: skip

_LETTER = r"[^\W\d_]"
_WORD = r"[\w\u00ad\u0300-\u036f]+"
_APOSTROPHE = r"['’]"
# Abbreviations keep their full stop, and so does a single letter, unless the next word begins a sentence
_SHORTENED = (
    "jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|mon|tue|tues|wed|thu|thurs|fri|mr|mrs|ms|dr|drs|profs?|rev|gen"
    "|sens?|reps?|gov|lt|sgt|col|capt|cmdr|adm|maj|cpl|pvt|hon|pres|insp|supt|messrs|st|ste|mt|ft|jr|sr|bros|esq|ph"
    "|cos?|corp|inc|ltd|plc|assn|assoc|dept|est|intl|vs|etc|natl|tel|ext|ave|blvd|rd|sq|adv|univ|al|cf|seq"
    "|ala|ariz|calif|colo|conn|dak|fla|ga|ind|kan|ky|md|mich|minn|mo|mont|neb|nev|okla|penn|tenn|va|vt|wis|wyo|ct"
)
_BEFORE_NUMBERS = "figs?|nos?|pp"
_BEGINS_SENTENCE = (
    "A|About|According|Additionally|After|An|As|At|But|Earlier|He|Her|Here|However|If|In|It|IT|Last|Many|More|Now|Once"
    "|One|Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These|They|This|We|What|When|While|Yet|You"
)
_TOKEN = re.compile(  # the first alternative that fits is taken, so the longer ones come first
    rf"""
      (?:https?://|www\.)[^\s"<>|]*[^\s"<>|.,;:!?()']
    | [\w.+-]+@[\w-]+(?:\.[\w-]+)+
    | </?[a-z][^\s<>]*>                                             # <unk>
    | (?:{_LETTER}\.)+{_LETTER}(?!\w)\.?                            # U.S.
    | {_LETTER}+(?:\.{_LETTER}+)+                                   # example.com, and a missing space after a full stop
    | {_LETTER}\.(?=\s+(?!(?-i:{_BEGINS_SENTENCE})\b)\S|[^\s\w])
    | (?:{_SHORTENED})\.(?!\w) | (?:{_BEFORE_NUMBERS})\.(?=\s*\d) | {_WORD}\.(?=,)
    | can(?=not\b) | gon(?=na\b) | wan(?=na\b) | got(?=ta\b) | gim(?=me\b) | lem(?=me\b)
    | {_WORD}(?=n{_APOSTROPHE}t\b) | n{_APOSTROPHE}t\b              # do n't
    | {_APOSTROPHE}n{_APOSTROPHE} | {_APOSTROPHE}\d\ds?\b           # fish 'n' chips, the '90s
    | {_APOSTROPHE}(?:s|d|m|ll|re|ve|n|em)\b
    | [+-]?\d+(?:/\d+){{2}} | (?:[+-]?\d+)?(?:[.,:]\d+)+(?:-{_WORD})*
    | {_WORD}/{_WORD} | {_LETTER}+&{_LETTER}+(?![&\w])
    | [odl]{_APOSTROPHE}{_LETTER}{{3,}}                             # O'Neil
    | (?:-(?=\d))?{_WORD}(?:-{_WORD})*
    | \.{{2,}} | -{{2,}} | `` | '' | [!?]{{2,}} | \*+
    | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)


@lru_cache(maxsize=1 << 16)
def tokens(text: str) -> tuple[str, ...]:
    """Lower-case tokens of a text, without punctuation."""
    found = []
    for token in _TOKEN.findall(text.replace("\n", " ")):
        token = "..." if token.startswith("..") else SPELLED.get(token, token.lower())
        if token not in DROPPED:
            found.append(token)
    return tuple(found)
