"""Penn Treebank tokenisation as the COCO caption scorer does it: lower-cased, punctuation dropped.

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
_SHORTENED = (
    "jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|mr|mrs|ms|dr|drs|prof|rev|gen|sen|rep|gov|lt|sgt|col|capt|messrs"
    "|st|ste|mt|ft|jr|sr|bros|co|corp|inc|ltd|vs|etc|fig|no|ave|blvd|rd|adv|univ|al"
)
_TOKEN = re.compile(  # the first alternative that fits is taken, so the longer ones come first
    rf"""
      (?:https?://|www\.)[^\s"<>|]*[^\s"<>|.,;:!?()']
    | [\w.+-]+@[\w-]+(?:\.[\w-]+)+
    | (?:{_LETTER}\.)+{_LETTER}(?!\w)\.? | {_LETTER}\.(?=\s*\S)     # U.S., an initial inside a sentence
    | (?:{_SHORTENED})\.(?=\s) | {_WORD}\.(?=,)                     # a shortened word keeps its full stop
    | can(?=not\b) | gon(?=na\b) | wan(?=na\b) | got(?=ta\b) | gim(?=me\b) | lem(?=me\b)
    | {_WORD}(?=n{_APOSTROPHE}t\b) | n{_APOSTROPHE}t\b              # do n't
    | {_APOSTROPHE}(?:s|d|m|ll|re|ve|n|em)\b
    | {_LETTER}+(?:\.{_LETTER}+)+                                   # example.com, and a missing space after a full stop
    | [+-]?\d+(?:/\d+){{2}} | (?:[+-]?\d+)?(?:[.,:]\d+)+(?:-{_WORD})*
    | {_WORD}/{_WORD}
    | [odl]{_APOSTROPHE}{_LETTER}{{3,}}                             # O'Neil
    | (?:-(?=\d))?{_WORD}(?:-{_WORD})*
    | \.{{2,}} | -{{2,}} | `` | ''
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
