"""Starting a prefix at the keys and values of real words (section 7.4).

Legend: P prefix length, L layers, H heads, D head size.
"""

import logging

import torch
from torch import Tensor, nn

from prefixlib import attention
from seq2seq.frozen_lm import attention_sites
from seq2seq.prefixTuning import PrefixTuning

logger = logging.getLogger(__name__)

LOWDATA_STEPS, LOWDATA_LEARNING_RATE = 500, 1e-4  # the original's regression onto the activations of real words


@torch.no_grad()
def key_values_of_text(base: nn.Module, ids: list[int]) -> dict[str, Tensor]:
    """The keys and values that a text of P tokens gives at the three sites, each flat (P, 2*L*H*D).

    The encoder reads the text, the decoder too: its cross-attention sees the encoded text, its self-attention the text
    itself, all at positions 0..P-1 without special tokens, as the original does it for GPT-2.
    """
    text = torch.tensor([ids], device=base.get_input_embeddings().weight.device)
    was_training = base.training
    base.eval()
    sites = attention_sites(base)
    with attention.record_key_values([module for modules in sites.values() for module in modules]) as seen:
        base(input_ids=text, decoder_input_ids=text, use_cache=False)
    base.train(was_training)
    return {
        # L pairs of (1, H, P, D) -> (2L, H, P, D) -> (P, 2*L*H*D)
        site: torch.cat([state for module in modules for state in seen[module]]).permute(2, 0, 1, 3).flatten(1)
        for site, modules in sites.items()
    }


def start_from_text(prefix: PrefixTuning, base: nn.Module, ids: list[int]) -> list[float]:
    """Start the prefix at the keys and values of a text (section 7.4): copied without an MLP, regressed onto with one.

    The regression is the original's: Adam on the networks, not the embeddings, mean squared error; returns its losses.
    """
    target = key_values_of_text(base, ids)
    if prefix.config.init_shallow:
        with torch.no_grad():
            for branch in prefix.branches:
                getattr(prefix, branch.network).copy_(target[branch.site])
        return []
    networks = nn.ModuleList(getattr(prefix, branch.network) for branch in prefix.branches)
    optimizer = torch.optim.Adam(networks.parameters(), lr=LOWDATA_LEARNING_RATE)
    losses = []
    for _ in range(LOWDATA_STEPS):
        flat = prefix.flat()
        loss = sum(nn.functional.mse_loss(prefix.dropout(flat[site]), target[site]) for site in flat)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    prefix.zero_grad()
    logger.info("prefix regressed onto %d tokens: loss %.4f -> %.4f", len(ids), losses[0], losses[-1])
    return losses
