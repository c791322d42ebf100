"""Starting a prefix from a text (paper section 7.4): its keys and values, or its word embeddings.

Where the text goes, by kind of prefix (P becomes its number of tokens):
activation, no MLP (--init_shallow yes)     copied: the prefix starts as if the text stood in front, exactly
activation, MLP                             the MLP is trained onto the text's keys and values for 500 steps
embedding, --parametrize_emb Emb            copied: the trained embeddings start as the text's words
embedding, MLP                              the MLP is trained onto the words' embeddings for 500 steps
infix                                       the infix starts as if the text stood there, exactly (the network adds 0)

On a frozen model the start decides a good part of the result wherever data are few: a text that describes the task
("summarize", "table-to-text:", or a sentence of instructions) starts at what the model already makes of it.
"""

import argparse
import logging
import time

import torch
from torch import Tensor, nn

from gpt2.dataset import encode
from gpt2.frozen_lm import evaluating, key_values
from gpt2.train_control import join_layers
from prefixlib.errors import UserError
from prefixlib.text import text_or_file

logger = logging.getLogger(__name__)

QUIET = 3  # seconds without a word
STEPS, LEARNING_RATE = 500, 1e-4  # the original's regression onto the activations of real words


def given_text(args: argparse.Namespace) -> str | None:
    """The text that the flags name to start from; None for a random start. Raises UserError for an unreadable file.

    --init_text TEXT or @FILE; the original's spellings --init_shallow_word (`no`: random) and --lowdata_token too.
    """
    if args.optim_prefix == "no" or args.prefix_model_path:
        return None
    if args.init_text is not None:
        return text_or_file("--init_text", args.init_text)
    if args.init_shallow == "yes":
        return None if args.init_shallow_word == "no" else args.init_shallow_word
    return args.lowdata_token if args.use_lowdata_token == "yes" else None


def text_ids(tokenizer, text: str, limit: int) -> list[int]:
    """The text's tokens, its first word with a leading space as inside a sentence. UserError unless 1 to `limit`."""
    ids = encode(tokenizer, [text if text[:1].isspace() else f" {text}"])[0] if text.strip() else []
    if not 1 <= len(ids) <= limit:
        raise UserError(f"the initial text {text[:40]!r} has {len(ids)} tokens; it needs 1 to {limit}")
    return ids


def start_from_text(prefix: nn.Module, base: nn.Module, ids: list[int]) -> list[float]:
    """Start the prefix at a text of P tokens, see above; returns a regression's losses, [] where none is needed."""
    text = torch.tensor([ids], device=base.get_input_embeddings().weight.device)
    with torch.no_grad(), evaluating(base):
        words = base.get_input_embeddings()(text)[0].float()  # (P, E)
        states = join_layers(key_values(base, input_ids=text)).float()  # (P, 2*L*H*D), at positions 0..P-1
    config = prefix.config
    if config.prefix_mode == "embedding":
        if config.parametrize_emb == "Emb":
            return _copy(prefix.wte.weight, words)
        return _regress(prefix, prefix.embeddings, words)
    if config.format_mode == "infix":
        for added in [prefix.control_trans] if config.init_shallow else prefix.control_trans[-1].parameters():
            _copy(added, torch.zeros_like(added))
        return _copy(prefix.wte2.weight, words)
    return _copy(prefix.control_trans, states) if config.init_shallow else _regress(prefix, prefix.flat, states)


def start_uniform(prefix: nn.Module) -> None:
    """Draw what a random prefix is made of, its P vectors (without an MLP its keys and values), from [0, 1)."""
    drawn = [module.weight for module in prefix.modules() if isinstance(module, nn.Embedding)]
    for parameter in [*drawn, prefix.control_trans] if prefix.config.init_shallow else drawn:
        nn.init.uniform_(parameter)


def _copy(parameter: Tensor, values: Tensor) -> list[float]:
    with torch.no_grad():
        parameter.copy_(values)
    return []


def _regress(prefix: nn.Module, output, target: Tensor) -> list[float]:
    """The original's regression: Adam on the network, not on its P input vectors; mean squared error, dropout on."""
    optimizer = torch.optim.Adam(prefix.control_trans.parameters(), lr=LEARNING_RATE)
    target = target.to(prefix.wte.weight.device)
    losses, said = [], time.perf_counter()
    for step in range(STEPS):
        if time.perf_counter() - said > QUIET:
            said = time.perf_counter()
            logger.info("training the prefix onto the initial text: step %d of %d", step, STEPS)
        loss = nn.functional.mse_loss(prefix.dropout(output()), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    prefix.zero_grad()
    logger.info(
        "prefix trained onto the initial text's %d tokens: loss %.4f -> %.4f", len(target), losses[0], losses[-1]
    )
    return losses
