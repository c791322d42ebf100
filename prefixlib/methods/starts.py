"""Starts of a prefix that both families share (paper section 7.4): random, another prefix's weights, a regression.

A start is a function of the prefix and its sources; each family has a table of starts by name.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

STEPS, LEARNING_RATE = 500, 1e-4  # the original's regression onto the activations of real words


@dataclass
class Given:
    """The sources of a start."""

    base: nn.Module
    ids: Sequence[int] = ()  # the tokens of a text
    network: Mapping[str, Tensor] | None = None  # another prefix's weights


def start_random(prefix: nn.Module, given: Given) -> None:
    """Keep torch's initialisation: N(0, 1) for the P vectors, or for keys and values without an MLP."""


def start_from_checkpoint(prefix: nn.Module, given: Given) -> None:
    """Copy the weights of another prefix."""
    prefix.load_state_dict(given.network)


def regress(
    prefix: nn.Module, networks: Iterable[nn.Parameter], loss_of: Callable[[], Tensor], tokens: int
) -> list[float]:
    """The original's regression: Adam on the networks, not on their P input vectors; returns the losses.

    loss_of: mean squared error between the prefix as it is now, with dropout, and its target.
    """
    optimizer = torch.optim.Adam(networks, lr=LEARNING_RATE)
    losses, last_line = [], time.perf_counter()
    for step in range(STEPS):
        if time.perf_counter() - last_line > 3:  # seconds
            last_line = time.perf_counter()
            logger.info("training the prefix onto the initial text: step %d of %d", step, STEPS)
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    prefix.zero_grad()
    logger.info("prefix trained onto the %d tokens of the text: loss %.4f -> %.4f", tokens, losses[0], losses[-1])
    return losses
