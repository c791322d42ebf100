"""Beam search as an executable specification: one text, no cache, every beam computed anew. Tests compare with it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prefixlib.decoding.search import DecodingRule, Hypothesis, allowed_tokens


@torch.no_grad()
def naive_beam_search(
    next_logits: Callable[[list[int]], Tensor], prompt: Sequence[int], rule: DecodingRule
) -> list[Hypothesis]:
    """The hypotheses that `search.beam_search` finds, best first; `next_logits` maps all tokens so far to (V,)."""
    width, beams, ended = rule.num_beams, [([], 0.0)], []

    def divisor(length: int) -> float:
        return (
            max(length + (len(prompt) if rule.length_normalization == "prompt+output" else 0), 1) ** rule.length_penalty
        )

    for generated in range(rule.max_new_tokens):
        candidates = []  # (log-probability, tokens, whether the last one ends the text)
        for tokens, total in beams:
            gains = allowed_tokens(next_logits([*prompt, *tokens])[None], [(prompt, tokens)], rule, generated)[0]
            for token, gain in enumerate(gains.tolist()):
                ends = token == rule.eos_token_id or bool(rule.stop and rule.stop([*tokens, token]))
                candidates.append((total + gain, tokens + [token] * (token != rule.eos_token_id), ends))
        candidates = sorted(candidates, key=lambda candidate: -candidate[0])[: 2 * width]
        ended += [Hypothesis(total / divisor(len(t)), t, True) for total, t, ends in candidates[:width] if ends]
        ended = sorted((h for h in ended if h.score > float("-inf")), key=lambda h: -h.score)[:width]
        beams = [(tokens, total) for total, tokens, ends in candidates if not ends][:width]
        enough = rule.early_stopping or (ended and ended[-1].score >= candidates[0][0] / divisor(generated))
        if not beams or (len(ended) == width and enough):
            return ended
    unfinished = [Hypothesis(total / divisor(len(tokens)), tokens, False) for tokens, total in beams]
    return sorted([*ended, *unfinished], key=lambda h: -h.score)[:width]
