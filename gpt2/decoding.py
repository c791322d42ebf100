"""Decoding prompts in batches with a decoder-only model, with or without a prefix; from tokens back to text.

Legend: N sentences of a batch, T tokens of the longest prompt, P prefix length, H heads, D head size, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache

from gpt2.frozen_lm import count_positions
from gpt2.train_control import Past
from prefixlib.beam_search import DecodingRule, Hypothesis, beam_search, sample
from prefixlib.text import clean_up

STRATEGIES = ("beam", "greedy", "nucleus")


class CausalSteps:
    """A decoder-only model over a batch of prompts: the stepwise model that prefixlib.beam_search asks for.

    Prompts are padded on the left; the padding is masked and takes no position, so a row's numbers do not depend on
    its neighbours. The prefix (layers of keys and values, (1, H, P, D), or (N, H, P, D) where every prompt has its own)
    seeds the cache; text starts at position P. `visible`, bool (N, P), is False where a prompt's prefix is padded.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        layers: Sequence[tuple[Tensor, Tensor]] | None,
        visible: Tensor | None = None,
    ):
        self.body, self.head = model.base_model, model.get_output_embeddings()
        device = model.get_input_embeddings().weight.device
        width = max(len(prompt) for prompt in prompts)
        prefix_length = layers[0][0].shape[2] if layers else 0
        self.input_ids = torch.zeros(len(prompts), width, dtype=torch.long)
        self.mask = torch.zeros(len(prompts), prefix_length + width, dtype=torch.long)
        self.mask[:, :prefix_length] = 1 if visible is None else visible
        for row, prompt in enumerate(prompts):
            self.input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
            self.mask[row, prefix_length + width - len(prompt) :] = 1
        self.input_ids, self.mask = self.input_ids.to(device), self.mask.to(device)
        self.positions = count_positions(self.mask)[:, prefix_length:]  # (N, T); first real token: P
        rows = len(prompts)
        dtype = model.get_input_embeddings().weight.dtype
        self.cache = DynamicCache(
            [
                (k.to(device, dtype).expand(rows, -1, -1, -1), v.to(device, dtype).expand(rows, -1, -1, -1))
                for k, v in layers
            ]
            if layers
            else None
        )

    def prefill(self) -> Tensor:
        return self._forward(self.input_ids, self.positions)

    def advance(self, rows: Tensor, tokens: Tensor) -> Tensor:
        if len(rows) != len(self.mask) or not torch.equal(rows, torch.arange(len(rows), device=rows.device)):
            self.cache.reorder_cache(rows)
            self.mask = self.mask[rows]
            self.positions = self.positions[rows]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(rows), 1)], dim=1)
        return self._forward(tokens.unsqueeze(1), self.positions[:, -1:] + 1)

    def _forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Run (R, T) tokens behind the cache; next-token logits (R, V)."""
        self.positions = positions
        hidden = self.body(
            input_ids=input_ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        return self.head(hidden[:, -1])


@torch.no_grad()
def decode(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    rule: DecodingRule,
    *,
    layers: Sequence[tuple[Tensor, Tensor]] | None = None,
    past: Callable[[Sequence[int]], Past] | None = None,
    strategy: str = "beam",
    batch_size: int = 32,
    seed: int = 42,
    progress: bool = True,
) -> list[Hypothesis]:
    """The best hypothesis for every prompt, in the order given.

    `layers` is a prefix that all prompts share; `past` gives the prefixes of the prompts with the numbers it is asked
    for, where each has its own. Batches are made of prompts of similar length; results do not depend on `batch_size`.
    """
    order = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))  # longest first: memory trouble shows at once
    results: list[Hypothesis | None] = [None] * len(prompts)
    with tqdm(total=len(prompts), desc="decoding", unit=" sentences", disable=not progress, leave=False) as bar:
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            batch = [prompts[n] for n in members]
            own = past(members) if past else None
            steps = CausalSteps(model, batch, own.layers, own.visible) if own else CausalSteps(model, batch, layers)
            if strategy == "beam":
                best = [hypotheses[0] for hypotheses in beam_search(steps, batch, rule)]
            else:
                seeds = [seed + n for n in members] if strategy == "nucleus" else None
                best = sample(steps, batch, rule, seeds)
            for n, hypothesis in zip(members, best, strict=True):
                results[n] = hypothesis
            bar.update(len(members))
    return results


def to_text(tokenizer, tokens: Sequence[int]) -> str:
    """Generated tokens as one line of text, cleaned as the original's decoding did; `Error` where nothing is left."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    text = text.split(tokenizer.eos_token)[0]
    return clean_up(text) or "Error"


def newline_token_ids(tokenizer) -> tuple[int, ...]:
    """Tokens made of newlines alone, which decoding bans (198 and 628 in GPT-2's vocabulary, <0x0A> in Llama's)."""
    vocabulary = tokenizer.get_vocab()
    return tuple(
        sorted(n for token, n in vocabulary.items() if token == "<0x0A>" or (token and set(token) <= {"Ċ", "\n"}))
    )
