"""The settings of decoding: one frozen `Search`, its flags and bounds, and the table of strategies.

Standard library only. prefixlib/decoding/ runs the search.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

from prefixlib.data.tasks import OWN_DATA
from prefixlib.settings.flags import DECODING, SEARCH_BOUNDS, Flags, flag, refuse_together
from prefixlib.system.errors import UserError


@dataclass(frozen=True)
class Strategy:
    """A way to choose tokens."""

    settings: tuple[str, ...]  # the fields of Search that no other strategy reads
    most_outputs: Callable[[int], int | None]  # beams -> outputs that a source can have; None: any number
    repeats: bool = False  # several outputs are decoded one by one, each with its own seed


STRATEGIES = {
    "beam": Strategy(("num_beams", "length_penalty", "length_normalization", "early_stopping"), lambda beams: beams),
    "greedy": Strategy((), lambda beams: 1),
    "nucleus": Strategy(("top_p", "top_k", "temperature"), lambda beams: None, repeats=True),
}
OWNERS = {name: strategy for strategy, row in STRATEGIES.items() for name in row.settings}
STREAMED = tuple(name for name in STRATEGIES if name != "beam")  # a beam's tokens are certain only at its end


@dataclass(frozen=True)
class SearchFlags(Flags):
    """The flags of a search with the same name in both trees. None: the task's value."""

    strategy: str | None = flag(
        None,
        "how tokens are chosen (default: the task's; mode text: nucleus where --top_p, --top_k or --temperature is "
        "given, else beam)",
        DECODING,
        choices=tuple(STRATEGIES),
    )
    num_beams: int | None = flag(
        None,
        "beams (strategy beam; default: the task's)",
        DECODING,
        **SEARCH_BOUNDS["num_beams"],
        names=("--eval_beams",),
    )
    stop: tuple[str, ...] = flag(
        (), r"an output ends before this text (\n: a line break); may be given several times", DECODING
    )
    top_p: float = flag(0.8, "probability mass kept, at most 1 (strategy nucleus)", DECODING, **SEARCH_BOUNDS["top_p"])
    top_k: int = flag(0, "only the N likeliest tokens (strategy nucleus; 0: all)", DECODING, low=0)
    temperature: float = flag(
        1.0, "softens (above 1) or sharpens (below 1) nucleus sampling; 0 is greedy", DECODING, low=0, below=1001
    )


@dataclass(frozen=True)
class Search(SearchFlags):
    """All settings that decide which outputs are chosen. None: the task's value."""

    max_new_tokens: int | None = flag(None, "most tokens to generate", DECODING, above=0)
    min_length: int | None = flag(None, "fewest tokens, the start token included", DECODING, low=0)
    length_penalty: float | None = flag(
        None, "above 1 favours long outputs", DECODING, **SEARCH_BOUNDS["length_penalty"]
    )
    length_normalization: str = flag(
        "prompt+output",
        "what a beam's score is divided by: the original's rule, or that of transformers today",
        DECODING,
        choices=("prompt+output", "output"),
    )
    no_repeat_ngram_size: int | None = flag(None, "no n-gram of this size occurs twice (0: no rule)", DECODING, low=0)
    early_stopping: bool | None = flag(None, "stop a search at its first full set of outputs", DECODING)
    force_bos: bool = flag(False, "make <s> the first token by force", DECODING)
    seed: int = flag(42, "seed of nucleus sampling", DECODING, low=0)
    batch_size: int = flag(32, "texts decoded together; changes the speed only", DECODING, above=0)

    @classmethod
    def of(cls, settings: Flags, **more: Any) -> Self:
        """The search of a command's settings; `more` holds the values that have other names there."""
        known = {field.name: getattr(settings, field.name) for field in fields(cls) if hasattr(settings, field.name)}
        return cls(**known | more)

    def chosen_strategy(self, mode: str, usual: str) -> str:
        """The strategy in the settings, else the task's `usual` one; temperature 0 is greedy.

        User data are decoded by sampling if a setting of sampling differs from its default. Raises UserError for values
        out of range, and for a setting that the strategy does not read.
        """
        self.check_values()
        least = SEARCH_BOUNDS["temperature"]["low"]
        if 0 < self.temperature < least:
            raise UserError(f"--temperature {self.temperature}: 0, which is greedy, or at least {least}")
        if self.top_p > 1:
            raise UserError(f"--top_p {self.top_p}: must be at most 1")
        given = [name for name in OWNERS if getattr(self, name) != self.default(name)]
        strategy = self.strategy
        if strategy is None:
            sampled = any(OWNERS[name] == "nucleus" for name in given)
            strategy = "nucleus" if self.temperature == 0 or (sampled and mode in OWN_DATA) else usual
        if strategy in ("nucleus", "greedy") and self.temperature == 0:
            strategy, given = "greedy", [name for name in given if OWNERS[name] != "nucleus"]
        for name in given:
            if OWNERS[name] != strategy:
                refuse_together(f"--strategy {strategy}", f"--{name}", f"it belongs to --strategy {OWNERS[name]}")
        return strategy


def check_count(count: int, strategy: str, num_beams: int) -> None:
    """Raise UserError unless a search gives `count` outputs per source: at most its beams, one greedy, any sampled."""
    most = STRATEGIES[strategy].most_outputs(num_beams) or max(count, 1)
    if not 1 <= count <= most:
        raise UserError(f"num_return_sequences {count}: must be 1 to {most} ({strategy})")


def as_stop(stop: str | Sequence[str]) -> tuple[str, ...]:
    """One text or several, as a tuple."""
    return (stop,) if isinstance(stop, str) else tuple(stop)
