"""Decoding inputs in batches: one loop for both families, all strategies, shared and mixed prefixes."""

from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm

from prefixlib.decoding.search import DecodingRule, Hypothesis, StepwiseModel, beam_search, sample
from prefixlib.settings.search import STRATEGIES

# Indices of inputs -> the stepwise model over these inputs, and for each the tokens that its output follows.
Start = Callable[[Sequence[int]], tuple[StepwiseModel, Sequence[Sequence[int]]]]


@torch.no_grad()
def decode(
    start: Start,
    lengths: Sequence[int],
    rule: DecodingRule,
    *,
    strategy: str = "beam",
    count: int = 1,
    batch_size: int = 32,
    seed: int = 42,
    progress: bool = False,
) -> list[list[Hypothesis]]:
    """Decode every input; returns its `count` best hypotheses or `count` samples, in the order of the inputs.

    start: makes the stepwise model of a batch. lengths: tokens of each input; a batch holds inputs of similar length,
    and results do not depend on `batch_size`. The seed of sample k of input n is `seed + n * count + k`.
    """
    repeats = count if STRATEGIES[strategy].repeats else 1
    jobs = [(n, repeat) for n in range(len(lengths)) for repeat in range(repeats)]
    jobs.sort(key=lambda job: -lengths[job[0]])  # longest first: a lack of memory shows at once
    results: list[list[Hypothesis]] = [[] for _ in lengths]
    with tqdm(total=len(jobs), desc="decoding", unit=" texts", disable=not progress, leave=False) as bar:
        for first in range(0, len(jobs), batch_size):
            batch = jobs[first : first + batch_size]
            seeds = [seed + n * count + repeat for n, repeat in batch]
            steps, prompts = start([n for n, _ in batch])
            found = decode_batch(steps, prompts, rule, strategy, seeds)
            for (n, _), hypotheses in zip(batch, found, strict=True):
                results[n] += hypotheses[:count]
            bar.update(len(batch))
    return results


def decode_batch(
    steps: StepwiseModel, prompts: Sequence[Sequence[int]], rule: DecodingRule, strategy: str, seeds: Sequence[int]
) -> list[list[Hypothesis]]:
    """The hypotheses of every prompt, best first: K from beam search, else one. seeds: one per prompt."""
    if strategy == "beam":
        return beam_search(steps, prompts, rule)
    return [[one] for one in sample(steps, prompts, rule, seeds if STRATEGIES[strategy].repeats else None)]
