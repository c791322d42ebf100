"""Generating texts with a trained model: generate, stream and decode, written once; a family adds its hooks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from prefixlib.base_model.load import evaluating
from prefixlib.data.readers import Group
from prefixlib.data.tasks import Task, as_group, find_task
from prefixlib.data.wording import Wording
from prefixlib.decoding import loop
from prefixlib.decoding.search import DecodingRule, Hypothesis, stream
from prefixlib.decoding.text import as_texts, text_pieces
from prefixlib.mixed import Prepared
from prefixlib.settings.search import STREAMED, Search, as_stop, check_count
from prefixlib.system.errors import UserError


class Generates(ABC):
    """The decoding part of a model object. `lm` is the family's PrefixLM, `task` the record of its training."""

    TREE: ClassVar[str]  # "gpt2" or "seq2seq": the family's part of a task's row

    lm: Any
    tokenizer: Any
    task: dict[str, Any]

    # ---- hooks of a family ---------------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, sources: Sequence[Any], search: Search) -> list[Any]:
        """Turn sources, as `generate` takes them, into model inputs; too long ones are cut, with a warning."""

    @abstractmethod
    def rule(self, search: Search) -> DecodingRule:
        """The search, completed with the task's values. Raises UserError for settings that the family does not have."""

    @abstractmethod
    def past(self, inputs: Sequence[Any]) -> Any:
        """The prefix of each input, or one row for all of them if it does not depend on the input."""

    @abstractmethod
    def start(self, inputs: Sequence[Any], past: Any) -> tuple[Any, list[list[int]]]:
        """The stepwise model over inputs with the prefixes `past`, and the tokens that each output follows."""

    @staticmethod
    @abstractmethod
    def join(pasts: Sequence[Any]) -> Any:
        """Join the prefixes of single inputs, which may differ in length, into those of one batch."""

    @abstractmethod
    def text_of(self, tokens: Sequence[int], stop: Sequence[str]) -> str:
        """Turn generated tokens into the task's text, up to the first of the strings `stop`."""

    @property
    def has_own_pasts(self) -> bool:
        """Whether every input has a prefix of its own."""
        return False

    # ---- parts ---------------------------------------------------------------------------------------------------

    @property
    def base(self) -> nn.Module:
        return self.lm.base

    @property
    def prefix(self) -> Any:
        return self.lm.prefix

    @property
    def wording(self) -> Wording:
        """The prompt template, which turns a source into the text that the model reads (mode text)."""
        return Wording.of(self.task)

    @property
    def task_row(self) -> Task:
        """The task's row. Raises UserError for a model that does not say what it was trained for."""
        mode = self.task.get("mode")
        if mode is None:
            raise UserError("the model does not say its task: load(..., mode=...) names it")
        return find_task(mode)

    @property
    def usual(self) -> Any:
        """The task's settings in this family."""
        return getattr(self.task_row, self.TREE)

    # ---- generating ----------------------------------------------------------------------------------------------

    def generate(
        self,
        sources: Sequence[Any],
        *,
        strategy: str | None = None,
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
        min_length: int | None = None,
        length_penalty: float | None = None,
        no_repeat_ngram_size: int | None = None,
        top_p: float = 0.8,
        top_k: int = 0,
        temperature: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int = 42,
        batch_size: int = 32,
        num_return_sequences: int = 1,
        return_scores: bool = False,
        progress: bool = False,
    ) -> list[Any]:
        """Texts for `sources`, in their order, decoded as the command line decodes the task's files.

        Args:
            sources: inputs as the task linearises them, or as data: for WebNLG and DART a list of (subject, relation,
                object) triples, for E2E a mapping of slots to values, for user data (mode text) the text alone, which
                is put into the prompt template of the training, or a conversation as a list of messages.
            strategy: "beam", "greedy" or "nucleus"; default: the task's.
            num_beams, length_penalty: settings of beam search; default: the task's.
            max_new_tokens: most tokens of an output; default: the task's.
            min_length: fewest tokens of an output, the decoder's start token included (seq2seq only).
            no_repeat_ngram_size: no n-gram of this size occurs twice (0: no rule); default: the task's.
            top_p, top_k, temperature, seed: settings of nucleus sampling; temperature 0 is greedy.
            stop: one text or several; an output ends before the first of them.
            batch_size: sources decoded together; changes the speed only.
            num_return_sequences: outputs per source, at most num_beams with beams.
            return_scores: return (text, score) pairs; the score is the length-normalised log-probability of a beam, or
                the log-probability of a greedy or sampled text.
            progress: show a progress bar.

        Returns a text for each source (or a pair), or a list of them if num_return_sequences is above 1. Raises
        UserError for sources of another shape than the task's, values out of range, and settings that have no effect
        under the strategy.

        >>> load("CHECKPOINT").generate([[("Aarhus_Airport", "cityServed", "Aarhus")]])  # doctest: +SKIP
        ['Aarhus Airport serves the city of Aarhus.']
        """
        search = Search(
            strategy=strategy,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            min_length=min_length,
            length_penalty=length_penalty,
            no_repeat_ngram_size=no_repeat_ngram_size,
            top_p=top_p,
            top_k=top_k,
            temperature=temperature,
            stop=as_stop(stop),
            seed=seed,
            batch_size=batch_size,
        )
        ready = self.prepare(sources, search, num_return_sequences)
        found = self.decode(ready.inputs, search, num_return_sequences, progress)
        return as_texts(found, ready.to_text, several=num_return_sequences > 1, scores=return_scores)

    def prepare(self, sources: Sequence[Any], search: Search, count: int = 1) -> Prepared:
        """Sources ready to be decoded, `count` outputs each. Raises UserError as `generate` does."""
        if isinstance(sources, str):
            raise UserError("generate() takes a list of sources, not one text")
        strategy, rule = self.strategy(search), self.rule(search)
        check_count(count, strategy, rule.num_beams)
        return Prepared(self.encode(sources, search), strategy, rule, self.to_text(search.stop))

    def strategy(self, search: Search) -> str:
        """The strategy of the search. Raises UserError for settings out of range, or that it does not read."""
        return search.chosen_strategy(self.task_row.name, self.usual.strategy)

    def to_text(self, stop: Sequence[str] = ()) -> Callable[[Sequence[int]], str]:
        """A function that turns generated tokens into the task's text, up to the first of the strings `stop`."""
        return lambda tokens: self.text_of(tokens, stop)

    def decode(
        self, inputs: Sequence[Any], search: Search, count: int = 1, progress: bool = False
    ) -> list[list[Hypothesis]]:
        """Decode the inputs of `encode`; returns the `count` best hypotheses or `count` samples of each.

        Raises UserError for a bad search. Results do not depend on which inputs are decoded together.
        """
        strategy, rule = self.strategy(search), self.rule(search)
        with torch.no_grad(), evaluating(self.lm):
            shared = None if self.has_own_pasts else self.past(inputs[:1])

            def start(members: Sequence[int]) -> tuple[Any, list[list[int]]]:
                chosen = [inputs[n] for n in members]
                return self.start(chosen, self.past(chosen) if shared is None else shared)

            return loop.decode(
                start,
                [len(given) for given in inputs],
                rule,
                strategy=strategy,
                count=count,
                batch_size=search.batch_size,
                seed=search.seed,
                progress=progress,
            )

    def stream(
        self,
        source: Any,
        *,
        strategy: str = "greedy",
        max_new_tokens: int | None = None,
        min_length: int | None = None,
        no_repeat_ngram_size: int | None = None,
        top_p: float = 0.8,
        top_k: int = 0,
        temperature: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int = 42,
    ) -> Iterator[str]:
        """Yield the text for one source piece by piece, each as soon as it is certain; "greedy" or "nucleus".

        The joined pieces equal the text of `generate` with the same settings. Raises UserError as `generate` does.

        >>> for text in load("CHECKPOINT").stream(" | Aarhus_Airport : cityServed : Aarhus"):  # doctest: +SKIP
        ...     print(text, end="", flush=True)
        """
        if strategy not in STREAMED:
            names = " or ".join(STREAMED)
            raise UserError(f"stream() is {names}, not {strategy!r}: beams are certain only at their end")
        search = Search(
            strategy=strategy,
            max_new_tokens=max_new_tokens,
            min_length=min_length,
            no_repeat_ngram_size=no_repeat_ngram_size,
            top_p=top_p,
            top_k=top_k,
            temperature=temperature,
            stop=as_stop(stop),
            seed=seed,
        )
        ready = self.prepare([source], search)
        self.lm.eval()
        steps, (prompt,) = self.start(ready.inputs, self.past(ready.inputs))
        tokens = stream(steps, prompt, ready.rule, seed if ready.strategy == "nucleus" else None)
        return text_pieces(tokens, ready.to_text, search.stop, self.task_row.verbatim)

    def groups(self, sources: Sequence[Any]) -> list[Group]:
        """Turn sources, as `generate` takes them, into groups like those of the task's reader."""
        return [as_group(self.task_row.name, self.wording.source(source)) for source in sources]
