"""Negative log-likelihood behind a frozen output layer, without keeping the logits.

Legend: S scored tokens, E hidden size, V vocabulary.
"""

import torch
from torch import Tensor, nn

CHUNK = 128  # tokens whose logits exist at the same time


def token_nll(hidden: Tensor, targets: Tensor, head: nn.Linear, bias: Tensor | None = None) -> Tensor:
    """-log p(target) in float32, (S,), for last hidden states (S, E), target ids (S,) and logits = head(hidden) + bias.

    Behind a frozen head the gradient with respect to the hidden states is made together with the loss, a chunk of
    tokens at a time, so that of S*V logits and as many gradients no more than a chunk is ever held (the idea of Wijmans
    et al. 2024, "Cut Your Losses", in plain torch). A head that is trained itself gets the usual cross-entropy.
    """
    trained = any(parameter.requires_grad for parameter in head.parameters())
    if trained or not (torch.is_grad_enabled() and hidden.requires_grad):
        parts = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
        losses = [nn.functional.cross_entropy(_logits(head(h), bias), t, reduction="none") for h, t in parts]
        return torch.cat(losses)
    return _FrozenHeadNLL.apply(hidden, targets, head, bias)


def _logits(logits: Tensor, bias: Tensor | None) -> Tensor:
    return logits.float() if bias is None else logits.float() + bias


class _FrozenHeadNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, targets, head, bias):
        losses, gradient = [], torch.empty_like(hidden)
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
        weight = head.weight.to(dtype)  # once: autocast would convert it anew for every chunk
        own_bias = None if head.bias is None else head.bias.to(dtype)
        for h, t, g in zip(hidden.split(CHUNK), targets.split(CHUNK), gradient.split(CHUNK), strict=True):
            logits = _logits(nn.functional.linear(h.to(dtype), weight, own_bias), bias)
            log_probabilities = logits.log_softmax(dim=1)  # (chunk, V)
            rows = torch.arange(len(t), device=t.device)
            losses.append(-log_probabilities[rows, t])
            slope = log_probabilities.exp_()  # d nll / d logits = softmax - onehot
            slope[rows, t] -= 1
            g.copy_(slope.to(dtype) @ weight)
        ctx.save_for_backward(gradient)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return (upstream.unsqueeze(1) * gradient).to(gradient.dtype), None, None, None
