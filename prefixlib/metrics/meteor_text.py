"""The words that METEOR 1.5 compares: its English normaliser, and its tables of stems, synonyms and paraphrases.

It follows METEOR's own normaliser and matchers; the tables are those in the official jar (WordNet 3.0's synsets and
exceptions, function words, Moses's nonbreaking prefixes) and the paraphrase table beside it.
"""

import re
import zipfile
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from prefixlib.metrics.meteor_paraphrases import open_paraphrases

# Letters as the normaliser knows them: Western European and Cyrillic
_ALPHA = "A-Za-zŠŽšžŸÀ-ÖØ-öø-žЀ-ӿԀ-ԧꙀ-ꙮ꙾-ꚗᴀ-ᵿ"
_DOT = "\ue000"  # replaces the dots of "..." while single dots are processed
_STEPS = [
    (re.compile(rf"([^0-9{_ALPHA}\s.'`,\-‘’])", re.ASCII), r" \1 "),
    (re.compile(r"\.{2,}"), lambda dots: f" {_DOT * len(dots[0])} "),
    (re.compile(r"([^0-9]),([^0-9])"), r"\1 , \2"),
    (re.compile(r"([0-9]),([^0-9])"), r"\1 , \2"),
    (re.compile(r"([^0-9]),([0-9])"), r"\1 , \2"),
    (re.compile(r"[`‘’]"), "'"),
    (re.compile(r"[“”]|''"), ' " '),
    (re.compile(r"–|--"), "-"),
    (re.compile(rf"([0-9{_ALPHA}.])-([0-9{_ALPHA}])"), r"\1 \2"),  # parts of a compound may match on their own
    (re.compile(rf"([^{_ALPHA}])'([^{_ALPHA}])"), r"\1 ' \2"),
    (re.compile(rf"([^{_ALPHA}0-9])'([{_ALPHA}])"), r"\1 ' \2"),
    (re.compile(rf"([{_ALPHA}])'([^{_ALPHA}])"), r"\1 ' \2"),
    (re.compile(rf"([{_ALPHA}])'([{_ALPHA}])"), r"\1 '\2"),
    (re.compile(r"([0-9])'(s)"), r"\1 '\2"),
]
_HAS_LETTER = re.compile(f"[{_ALPHA}]")

# WordNet's morphology, in its order: (ending, the base form's ending)
_ENDINGS = (
    ("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"), ("ies", "y"),
    ("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", ""),
    ("er", ""), ("est", ""), ("er", "e"), ("est", "e"),
)  # fmt: skip
LONGEST_PHRASE = 7  # words, of the paraphrase table


class Tables:
    """The jar's word lists, and those phrases of the paraphrase table that occur in the texts."""

    def __init__(self, jar: Path):
        self._index = open_paraphrases(jar.parent / "data" / "paraphrase-en.gz")
        with zipfile.ZipFile(jar) as files:

            def lines(name):
                return files.read(name).decode("utf-8").split("\n")

            self.function_words = set(lines("function/english.words")) - {""}
            prefixes = [line.split() for line in lines("nonbreaking/english.prefixes")]
            synsets, exceptions = lines("synonym/english.synsets"), lines("synonym/english.exceptions")
        # abbreviation -> whether it keeps its dot before numbers only
        self.prefixes = {line[0]: line[1:] == ["#NUMERIC_ONLY#"] for line in prefixes if line and line[0][0] != "#"}
        self.synsets = {word: frozenset(ids.split()) for word, ids in zip(synsets[::2], synsets[1::2], strict=False)}
        self.bases = {}
        for base, forms in zip(exceptions[::2], exceptions[1::2], strict=False):
            for form in forms.split():
                self.bases.setdefault(form, []).append(base)
        self._synonyms, self._stems = {}, {}
        self.paraphrases, self.longest_phrase = {}, 0

    def normalise(self, text: str) -> list[str]:
        """Lower-cased words: punctuation is separated, dots of abbreviations are kept or dropped as in METEOR."""
        text = f" {text} "
        for pattern, replacement in _STEPS:
            text = pattern.sub(replacement, text)
        words, found = text.split(), []
        for i, word in enumerate(words):
            following = words[i + 1] if i + 1 < len(words) else ""
            stem = word[:-1]
            if len(word) == 1 or not word.endswith("."):
                found.append(word)
            elif "." in stem and _HAS_LETTER.search(stem):
                found.append(word.replace(".", ""))
            elif (
                self.prefixes.get(stem) is False
                or "a" <= following[:1] <= "z"
                or (self.prefixes.get(stem) and following[:1].isdigit())
            ):
                found.append(word)
            else:
                found += [stem, "."]
        return [word.replace(_DOT, ".").lower() for word in found]

    def synonyms(self, word: str) -> frozenset[str]:
        """Ids of the synsets of the word and of its base forms."""
        if word not in self._synonyms:
            bases = self.bases.get(word) or [self._base(word)]
            sets = [self.synsets.get(each, frozenset()) for each in [word, *bases]]
            self._synonyms[word] = frozenset().union(*sets)
        return self._synonyms[word]

    def _base(self, word: str) -> str:
        if word.endswith("ss") or len(word) <= 2:
            return word
        for ending, base in _ENDINGS:
            if word.endswith(ending) and word[: len(word) - len(ending)] + base in self.synsets:
                return word[: len(word) - len(ending)] + base + ("ful" if word.endswith("ful") else "")
        return ""

    def stem(self, word: str) -> str:
        """Snowball's English stem."""
        if word not in self._stems:
            self._stems[word] = _stemmer().stem(word)
        return self._stems[word]

    def load_paraphrases(self, texts: Iterable[list[str]]) -> None:
        """Look up the pairs of which both sides occur in these texts (lists of words)."""
        lengths = range(1, LONGEST_PHRASE + 1)
        self.paraphrases = self._index.among(
            {tuple(words[i : i + n]) for words in texts for n in lengths for i in range(len(words) - n + 1)}
        )
        self.longest_phrase = max(map(len, self.paraphrases), default=0)


@lru_cache(maxsize=1)
def _stemmer():
    from nltk.stem.snowball import SnowballStemmer

    return SnowballStemmer("english")


@lru_cache(maxsize=1)
def load_tables(jar: Path) -> Tables:
    """The tables of this jar, read once per process."""
    return Tables(jar)
