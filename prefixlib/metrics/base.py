"""The parts of a metric: statistics per segment, and a rule that turns their sum into the score."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

SECONDS_BEFORE_BAR = 2.0


class Unavailable(Exception):
    """Raised if the metric cannot be computed on this machine; the message says what to install."""


@dataclass(frozen=True)
class Metric:
    """A metric whose corpus score depends only on the sum of its segments' statistics.

    Seen / unseen splits and bootstrap resampling then cost one sum each, and no text is scored twice.
    """

    name: str
    statistics: Callable[[list[str], list[list[str]]], Any]  # N hypotheses, their references -> (N, S) float array
    combine: Callable[[Any], Any]  # sums over segments (..., S) -> scores (...)
    scale: float = 1.0  # factor from the combined value to the papers' scale
    span: str = "0-1"  # the papers' scale, in words


def mean(sums):
    """Combine rule of a mean over segments: (..., 2) of (sum of scores, number of segments) -> (...)."""
    import numpy as np

    return sums[..., 0] / np.maximum(sums[..., 1], 1)


def progress(items: Sequence, label: str) -> Iterator:
    """The items, with a progress bar on stderr once they have taken more than two seconds."""
    from tqdm import tqdm

    return iter(tqdm(items, desc=label, delay=SECONDS_BEFORE_BAR, leave=False, dynamic_ncols=True))


def mteval_tokens(text: str) -> list[str]:
    """The words that mteval-v13a compares: its tokenisation, A-Z lower-cased ("É" stays: it knows ASCII only)."""
    return _tokenizer_13a()(ascii_lower(text)).split()


def apart(text: str) -> str:
    """The text with spaces around every letter of a script that is written without spaces."""
    return _WITHOUT_SPACES.sub(r" \g<0> ", text)


# Thai, Lao, Burmese, Khmer; kana; Chinese characters
_WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


def words_13a(text: str) -> list[str]:
    """The words that sacrebleu compares by default, with their case."""
    return _tokenizer_13a()(text.rstrip()).split()


def ascii_lower(text: str) -> str:
    """The text with A-Z changed to a-z, and nothing else."""
    return text.translate(_LOWER)


_LOWER = {code: code + 32 for code in range(ord("A"), ord("Z") + 1)}


@lru_cache(maxsize=1)
def _tokenizer_13a():
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()
