"""From generated tokens to text: strings that end an output, texts of hypotheses, a text piece by piece."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from prefixlib.decoding.search import Hypothesis


def as_texts(
    found: Iterable[Sequence[Hypothesis]], to_text: Callable[[list[int]], str], *, several: bool, scores: bool
) -> list[Any]:
    """Each prompt's first text, or with `several` a list of all; with `scores` pairs (text, score)."""
    results = []
    for hypotheses in found:
        texts: list[Any] = [to_text(hypothesis.tokens) for hypothesis in hypotheses]
        if scores:
            texts = [(text, hypothesis.score) for text, hypothesis in zip(texts, hypotheses, strict=True)]
        results.append(texts if several else texts[0])
    return results


def stop_rule(stop: Sequence[str], to_text: Callable[[Sequence[int]], str]) -> Callable[[Sequence[int]], bool] | None:
    """A function that tells whether generated tokens end with one of the strings `stop`; None without strings."""
    if not stop:
        return None
    longest = max(len(text.encode()) for text in stop) + 8  # a token is at least a byte; some decode only with others
    return lambda tokens: any(text in to_text(tokens[-longest:]) for text in stop)


def cut_at(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the strings `stop`."""
    return min((text.split(end, 1)[0] for end in stop), key=len, default=text)


def text_pieces(
    tokens: Iterable[int], to_text: Callable[[list[int]], str], stop: Sequence[str] = (), verbatim: bool = False
) -> Iterator[str]:
    """The text of a stream of tokens, a piece at a time; the pieces joined are `to_text` of all tokens.

    The last word is held back until the next one begins, as cleaning may still change it ("do n't" -> "don't"). In
    `verbatim` texts only half a character is held back. In both, so is a possible beginning of a string in `stop`.
    """
    seen: list[int] = []
    given = text = ""
    for token in tokens:
        seen.append(token)
        text = to_text(seen)
        whole = text.rstrip("\ufffd") if verbatim else text[: text.rfind(" ") + 1].rstrip()
        begun = [n for end in stop for n in range(1, len(end)) if whole.endswith(end[:n])]
        whole = whole[: len(whole) - max(begun, default=0)]
        if len(whole) > len(given) and whole.startswith(given):
            yield whole[len(given) :]
            given = whole
    text = to_text(seen)
    if len(text) > len(given):
        yield text[len(given) :]
