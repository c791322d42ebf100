"""From last hidden states to logits as the model computes them; negative log-likelihood without storing all logits.

Legend: S scored tokens, E hidden size, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions

from prefixlib.compute import onednn
from prefixlib.system.errors import UserError

CHUNK = 128  # tokens whose logits exist at the same time


class Head:
    """The part of a model that turns last hidden states into logits.

    In most models it is one linear layer (`plain`). Others scale its input (T5) or its output (Granite, Cohere), or
    cap its output (Gemma 2): for these the model's own forward runs with its layers left out. Raises UserError for a
    model that allows neither.
    """

    def __init__(self, base: nn.Module):
        self.base = base
        self.plain = _is_plain(base)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., E)."""
        return self._linear(hidden) if self.plain else own_logits(self.base, hidden)

    def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """-log p(target) in float32, (S,), for last hidden states (S, E); see `token_nll`."""
        if self.plain:
            return token_nll(hidden, targets, self.base.get_output_embeddings(), self._bias)

        def losses(h: Tensor, t: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self(h).float(), t, reduction="none")

        parts = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
        return torch.cat([checkpoint(losses, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])

    @property
    def _bias(self) -> Tensor | None:
        return getattr(self.base, "final_logits_bias", None)  # BART and its relatives have one

    def _linear(self, hidden: Tensor) -> Tensor:
        logits = self.base.get_output_embeddings()(hidden)
        return logits if self._bias is None else logits + self._bias


def own_logits(base: nn.Module, hidden: Tensor) -> Tensor:
    """Logits (..., V) of hidden states (..., E) through the model's own forward, its layers left out.

    Raises LookupError for a model whose forward does not call its layers as one module.
    """
    flat = hidden.reshape(1, -1, hidden.shape[-1])  # (1, S, E): one row of S tokens
    token = torch.zeros(1, 1, dtype=torch.long, device=hidden.device)
    if base.config.is_encoder_decoder:
        body = base.get_decoder()
        inputs = {"encoder_outputs": BaseModelOutput(last_hidden_state=flat[:, :1]), "decoder_input_ids": token}
    else:
        body, inputs = base.base_model, {"input_ids": token}
    found = ((parent, name) for parent in base.modules() for name, child in parent.named_children() if child is body)
    parent, name = next(found, (None, ""))
    if parent is None:
        raise LookupError("its layers are not a module of their own")
    answer = _FixedOutput(flat, body.config)
    setattr(parent, name, answer)
    try:
        logits = base(**inputs, use_cache=False).logits
    finally:
        setattr(parent, name, body)
    if not answer.asked:
        raise LookupError("its forward does not call its layers as one module")
    return logits.view(*hidden.shape[:-1], -1)


class _Output(BaseModelOutputWithPastAndCrossAttentions):
    """Last hidden states, and None for every other field of the model's output class."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _FixedOutput(nn.Module):
    """A stand-in for the layers that returns `hidden` for any arguments."""

    def __init__(self, hidden: Tensor, config: PreTrainedConfig):
        super().__init__()
        self.hidden, self.config, self.asked = hidden, config, False

    def forward(self, *_args, **_kwargs) -> _Output:
        self.asked = True
        return _Output(last_hidden_state=self.hidden)


@torch.no_grad()
def _is_plain(base: nn.Module) -> bool:
    """Whether the linear layer alone gives the logits. Raises UserError if not, and the model's own cannot be computed.

    The test's hidden states are large, since a cap changes large logits only, and not random, to keep the RNG state.
    """
    linear, bias = base.get_output_embeddings(), getattr(base, "final_logits_bias", None)
    size, like = linear.weight.shape[1], base.get_input_embeddings().weight
    hidden, alone = (100 * torch.arange(2 * size).sin()).view(1, 2, size).to(like), True
    try:
        expected = own_logits(base, hidden)
    except (LookupError, AttributeError, TypeError):
        token, alone = torch.zeros(1, 1, dtype=torch.long, device=like.device), False
        was_training = base.training
        base.eval()
        hidden = base.base_model(input_ids=token, use_cache=False).last_hidden_state
        expected = base(input_ids=token, use_cache=False).logits
        base.train(was_training)
    logits = linear(hidden) if bias is None else linear(hidden) + bias
    plain = bool((logits - expected).abs().max() <= 1e-3 * expected.abs().max().clamp(min=1.0))
    if not plain and not alone:
        raise UserError(
            f"a {base.config.model_type} model is not supported: it changes its head's output, in a forward that "
            "cannot be run without its layers"
        )
    return plain


def token_nll(hidden: Tensor, targets: Tensor, head: nn.Linear, bias: Tensor | None = None) -> Tensor:
    """-log p(target) in float32, (S,), for last hidden states (S, E), target ids (S,) and logits = head(hidden) + bias.

    With a frozen head the gradient with respect to the hidden states is computed together with the loss, a chunk of
    tokens at a time: memory holds the logits and gradients of one chunk, not of all S*V (the idea of Wijmans et al.
    2024, "Cut Your Losses", in plain torch). A trained head gets the usual cross-entropy.
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
            logits = _logits(onednn.linear(h.to(dtype), weight, own_bias), bias)
            log_probabilities = logits.log_softmax(dim=1)  # (chunk, V)
            rows = torch.arange(len(t), device=t.device)
            losses.append(-log_probabilities[rows, t])
            slope = log_probabilities.exp_()  # d nll / d logits = softmax - onehot
            slope[rows, t] -= 1
            g.copy_(onednn.linear(slope.to(dtype), weight.t()))
        ctx.save_for_backward(gradient)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return (upstream.unsqueeze(1) * gradient).to(gradient.dtype), None, None, None
