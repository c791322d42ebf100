"""The stepwise model that prefixlib.decoding.search drives, decoding prompts in batches, and from tokens back to text.

Legend: N sentences of a batch, K beams, T tokens of the longest prompt, P prefix length, W cached positions, H heads,
D head size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from gpt2.frozen_lm import count_positions, position_mask
from gpt2.train_control import Past
from prefixlib.compute import onednn
from prefixlib.compute.head import Head
from prefixlib.data.tasks import InGPT2, clean_up
from prefixlib.decoding import loop
from prefixlib.decoding.search import DecodingRule, Hypothesis, rule_of
from prefixlib.decoding.text import cut_at, stop_rule
from prefixlib.decoding.tree import BeamTree, growing_cache
from prefixlib.settings.search import Search
from prefixlib.system.errors import UserError

SIMILAR = 0.75  # of the longest prompt's length, read together with it


class CausalSteps:
    """A decoder-only model over a batch of prompts: a `StepwiseModel` of prefixlib.decoding.search.

    Prompts are padded on the left; the padding is masked and takes no position, so a row's numbers do not depend on
    its neighbours. The prefix (layers of keys and values, (1, H, P, D), or (N, H, P, D) where every prompt has its own)
    seeds the cache; text starts at position P. `visible`, bool (N, P), is False where a prompt's prefix is padded. The
    beams of a prompt share its row of the cache (prefixlib.decoding.tree).
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        layers: Sequence[tuple[Tensor, Tensor]] | None,
        visible: Tensor | None = None,
        head: Head | None = None,
    ):
        onednn.prepare_to_decode(model)
        self.body, self.head, self.config = model.base_model, head or Head(model), model.config
        embeddings = model.get_input_embeddings().weight
        self.lengths = [len(prompt) for prompt in prompts]
        self.groups = of_similar_length(self.lengths)
        rows, width = len(prompts), max(self.lengths)
        length = layers[0][0].shape[2] if layers else 0
        self.input_ids = torch.zeros(rows, width, dtype=torch.long)
        mask = torch.zeros(rows, length + width, dtype=torch.bool)
        mask[:, :length] = True if visible is None else visible
        for row, prompt in enumerate(prompts):
            self.input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, length + width - len(prompt) :] = True
        self.input_ids, mask = self.input_ids.to(embeddings.device), mask.to(embeddings.device)
        self.positions = count_positions(mask)  # (N, W) of what is cached; first real token: P
        self.tree = BeamTree(mask)
        self.cache = growing_cache()
        for index, layer in enumerate(layers or ()):
            self.cache.update(*(states.to(embeddings).expand(rows, -1, -1, -1) for states in layer), index)

    def prefill(self) -> Tensor:
        """Prompts of similar length are read together, so that little of what is read is padding."""
        count, width = self.input_ids.shape
        if len(self.groups) == 1:
            return self.head(self._read(torch.arange(count), width, self.cache))
        last, caches = [], []
        for group in self.groups:
            rows, cache = torch.tensor(group), growing_cache()
            for index, layer in enumerate(self.cache.layers):  # the prefix
                cache.update(layer.keys[rows], layer.values[rows], index)
            last.append(self._read(rows, self.lengths[group[0]], cache))
            caches.append(cache)
        order = torch.tensor([row for group in self.groups for row in group]).argsort()
        length = self.positions.shape[1] - width
        for index, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
            read = ([layer.keys for layer in layers], [layer.values for layer in layers])
            whole = (torch.cat([_widened(states[:, :, length:], width) for states in kind])[order] for kind in read)
            self.cache.update(*whole, index)
        return self.head(torch.cat(last)[order])

    def _read(self, rows: Tensor, width: int, cache: Cache) -> Tensor:
        """Last hidden states (N', E) of the prompts `rows` (N'), appended to `cache`, which holds their prefix.

        width: tokens of the longest of them.
        """
        cached = self.positions.shape[1]
        length = cached - self.input_ids.shape[1]
        blank = self.input_ids.shape[1] - width  # columns that are padding in all of them
        column = torch.arange(cached, device=self.input_ids.device)
        column = torch.cat([column[:length], column[length + blank :]])
        token = column[length:].unsqueeze(1)  # the columns of the tokens themselves, (T', 1)
        # padding attends to itself: a query without any key would give NaN
        seen = (self.tree.visible[rows][:, :, column] & (column <= token)) | (column == token)  # (N', T', P+T')
        return self._forward(self.input_ids[rows, blank:], seen, self.positions[rows][:, column], cache)[:, -1]

    def advance(self, rows: Tensor, tokens: Tensor) -> Tensor:
        staying = self.tree.advance(rows)
        if staying is not None:
            self.positions = self.positions[staying]
            for layer in self.cache.layers:
                layer.keep(staying)
        sentences, beams, _ = self.tree.visible.shape
        self.positions = torch.cat([self.positions, self.positions[:, -1:].expand(-1, beams) + 1], dim=1)
        tokens = tokens.view(sentences, beams).to(self.positions.device)
        return self.head(self._forward(tokens, self.tree.visible, self.positions, self.cache).flatten(0, 1))

    def _forward(self, input_ids: Tensor, seen: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Last hidden states (N, T, E) of tokens (N, T) behind the cache, each of which sees `seen` (N, T, W).

        positions: (N, W), of all columns; the last T are the tokens'.
        """
        own = positions[:, -input_ids.shape[1] :]
        return self.body(
            input_ids=input_ids,
            attention_mask=position_mask(self.config, seen, own, positions),
            position_ids=own,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state


def of_similar_length(lengths: Sequence[int]) -> list[list[int]]:
    """The numbers of the prompts in groups, longest first, whose shortest has at least SIMILAR of its longest."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if not groups or lengths[row] < SIMILAR * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(row)
    return groups


def _widened(states: Tensor, width: int) -> Tensor:
    """Keys or values (N, H, T, D) behind columns of zeros: (N, H, width, D)."""
    return nn.functional.pad(states, (0, 0, width - states.shape[2], 0))


def decode(model: nn.Module, prompts: Sequence[Sequence[int]], rule: DecodingRule, **how: Any) -> list[Hypothesis]:
    """The best hypothesis for every prompt, in the order given: see `decode_several`."""
    return [hypotheses[0] for hypotheses in decode_several(model, prompts, rule, **how)]


def decode_several(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    rule: DecodingRule,
    *,
    layers: Sequence[tuple[Tensor, Tensor]] | None = None,
    past: Callable[[Sequence[int]], Past] | None = None,
    **how: Any,
) -> list[list[Hypothesis]]:
    """The hypotheses for every prompt of token ids; `how` as in `loop.decode`.

    layers: the prefix that all prompts share. past: gives the prefixes of the prompts of the given numbers, if each has
    its own. Raises ValueError for a prompt without tokens: there is nothing whose next token could be predicted.
    """
    if not all(map(len, prompts)):
        raise ValueError("a prompt needs at least one token")
    head = Head(model)

    def start(members: Sequence[int]) -> tuple[CausalSteps, list[Sequence[int]]]:
        batch, own = [prompts[n] for n in members], past(members) if past else Past(layers or [])
        return CausalSteps(model, batch, own.layers, own.visible, head), batch

    return loop.decode(start, [len(prompt) for prompt in prompts], rule, **how)


def decoding_rule(search: Search, tokenizer: Any, usual: InGPT2 | None = None, verbatim: bool = False) -> DecodingRule:
    """The rule of a search, with the values of the task's row `usual` where the search has none.

    Newlines are banned, as in the original, unless the task's texts are to stay as they are (`verbatim`). Raises
    UserError for values that no search can have, and for settings of encoder-decoders.
    """
    usual = usual or InGPT2(folder="")
    if search.min_length:
        raise UserError(f"min_length {search.min_length}: a decoder-only model has no such rule here; leave it out")
    if search.force_bos:
        raise UserError("force_bos: a decoder-only model has no start token to force; leave it out")
    return rule_of(
        search,
        usual,
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=search.max_new_tokens or usual.max_new_tokens,
        banned_token_ids=() if verbatim else newline_token_ids(tokenizer),
        stop=stop_rule(search.stop, lambda tokens: tokenizer.decode(list(tokens))),
    )


def to_text(tokenizer, tokens: Sequence[int], verbatim: bool = False, stop: Sequence[str] = ()) -> str:
    """Generated tokens as text up to the first of the strings `stop`.

    Unless `verbatim`, on one line, cleaned as the original's decoding did; `Error` where nothing is left.
    """
    text = tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    text = cut_at(text.split(tokenizer.eos_token)[0], stop)
    return text if verbatim else clean_up(text) or "Error"


def newline_token_ids(tokenizer) -> tuple[int, ...]:
    """Tokens made of newlines alone, which decoding bans (198 and 628 in GPT-2's vocabulary, <0x0A> in Llama's)."""
    vocabulary = tokenizer.get_vocab()
    return tuple(
        sorted(n for token, n in vocabulary.items() if token == "<0x0A>" or (token and set(token) <= {"Ċ", "\n"}))
    )
