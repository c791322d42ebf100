"""How likely a trained model finds the references: a loss that prefixes and tuned models share.

Their training losses cannot be compared: a prefix's is a sum per text, a tuned model's a mean over a batch's tokens.

Legend: B batch, T tokens, P prefix length, H heads, D head size.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import DynamicCache

from gpt2.dataset import IGNORED, Encoded, collate, encode, encode_inputs, truncate
from gpt2.frozen_lm import count_positions, position_mask
from gpt2.generator import Generator
from prefixlib.head import token_nll
from prefixlib.readers import Group, training_text


@torch.no_grad()
def reference_loss(generator: Generator, mode: str, groups: Sequence[Group], batch_size: int) -> float | None:
    """Mean negative log-likelihood per token, in nats, of every group's first reference and its end.

    None where no group has a reference.
    """
    tokenizer = generator.tokenizer
    groups = [group for group in groups if group.references]
    texts = [training_text(mode, group.source, group.references[0], tokenizer.eos_token)[1] for group in groups]
    inputs = encode_inputs(mode, groups, tokenizer, generator.form, generator.source_limit)
    whole = [replace(both[0], continuation=both[1]) for both in zip(inputs, encode(tokenizer, texts), strict=True)]
    examples = [truncate(example, generator.prompt_room) for example in whole]
    total, count = 0.0, 0
    for start in range(0, len(examples), batch_size):
        nll = _token_losses(generator, examples[start : start + batch_size])
        total, count = total + nll.sum().item(), count + len(nll)
    return total / count if count else None


def _token_losses(generator: Generator, examples: Sequence[Encoded]) -> torch.Tensor:
    """The negative log-likelihood (S,) of every scored token of the examples, behind their prefix if there is one."""
    model, rows = generator.model, len(examples)
    head, weight = model.get_output_embeddings(), model.get_input_embeddings().weight
    batch = {name: ids.to(weight.device) for name, ids in collate(examples, pad_token_id=0).items()}
    text = batch["attention_mask"].bool()  # (B, T)
    past = generator.past(examples) if generator.prefix else None
    layers = past.layers if past else generator.layers or ()
    layers = [tuple(states.to(weight).expand(rows, -1, -1, -1) for states in layer) for layer in layers]
    before = layers[0][0].shape[2] if layers else 0
    visible = past.visible if past and past.visible is not None else text.new_ones(rows, before)
    visible = torch.cat([visible, text], dim=1)  # (B, P+T)
    column = torch.arange(before + text.shape[1], device=weight.device)
    # a padded query sees itself, so that no row is left with nothing to look at
    seen = (visible.unsqueeze(1) & (column <= column[before:, None])) | (column == column[before:, None])  # (B, T, P+T)
    positions = count_positions(visible)
    hidden = model.base_model(
        input_ids=batch["input_ids"],
        attention_mask=position_mask(model.config, seen, positions[:, before:], positions),
        position_ids=positions[:, before:],
        past_key_values=DynamicCache(layers) if layers else DynamicCache(),
        use_cache=True,
    ).last_hidden_state
    labels = batch["labels"][:, 1:]
    scored = labels.ne(IGNORED)
    return token_nll(hidden[:, :-1][scored], labels[scored], head)
