"""Context distillation: a short prefix learns to stand in for a long text in front of the prompt.

The teacher is the same model with the whole text in front; the prefix is trained until the model behind it gives the
teacher's distributions (Askell et al. 2021, section 2.2; for a trained cache of keys and values Eyuboglu et al. 2025,
"Cartridges"). The texts that both read are given, or sampled from the teacher.

Legend: C tokens of the text in front, P of the prefix, B batch, T tokens, V vocabulary.
"""

import logging
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from gpt2 import building, decoding
from gpt2.dataset import Encoded
from gpt2.frozen_lm import key_values, max_positions
from gpt2.model import Model
from gpt2.prefix_lm import PrefixLM, mean_loss
from gpt2.train_control import PrefixConfig, PrefixTuning, join_layers
from gpt2.trainer_prefix import Distillation, load_teacher
from prefixlib.base_model.load import evaluating
from prefixlib.decoding.search import DecodingRule

logger = logging.getLogger(__name__)

OPENING, LENGTH, TOP_P = 16, 64, 0.95  # of sampled texts: tokens of the text they go on from; most behind; sampling


class TextInFront(nn.Module):
    """`base` with a text in front of what it reads, as a teacher: input_ids (B, T) -> logits (B, T, V).

    The text's keys and values are computed once. The base model is shared with the student, not copied.
    """

    def __init__(self, base: nn.Module, ids: Sequence[int]):
        super().__init__()
        with torch.no_grad(), evaluating(base):
            self.layers = key_values(base, input_ids=torch.tensor([ids], device=base.device))  # (1, H, C, D) each
        self.ids = list(ids)
        shallow = {"preseqlen": len(ids), "mid_dim": 1, "prefix_dropout": 0.0, "init_shallow": True}
        config = PrefixConfig.for_model(base, **shallow, prefix_mode="activation", format_mode="cat")
        prefix = PrefixTuning(config).requires_grad_(False).to(base.device)
        prefix.control_trans.copy_(join_layers(self.layers))
        self.lm = PrefixLM(base, prefix).eval()

    @torch.no_grad()
    def forward(self, input_ids: Tensor, use_cache: bool = False) -> CausalLMOutput:
        with evaluating(self.lm.base):  # the student may have it in train mode
            return CausalLMOutput(logits=self.lm(input_ids))


def sample_sets(
    teacher: TextInFront, tokenizer: Any, count: int, seed: int, progress: bool = False
) -> dict[str, list[Encoded]]:
    """`count` texts to train on, and a fifth of that to evaluate on, that the model writes with the text in front.

    Each goes on from up to OPENING tokens at a random place of the text, which are its prompt, by nucleus sampling.
    """
    total = count + max(count // 5, 1)
    logger.info("%d texts are drawn from the model with the text of %d tokens in front", total, len(teacher.ids))
    draw = random.Random(seed)
    size = min(OPENING, len(teacher.ids))
    starts = [draw.randint(0, len(teacher.ids) - size) for _ in range(total)]
    openings = [teacher.ids[start : start + size] for start in starts]
    free = max_positions(teacher.lm.config) - len(teacher.ids) - size
    rule = DecodingRule(tokenizer.eos_token_id, max_new_tokens=min(LENGTH, free), top_p=TOP_P)
    with evaluating(teacher.lm.base):
        found = decoding.decode(
            teacher.lm.base, openings, rule, layers=teacher.layers, strategy="nucleus", seed=seed, progress=progress
        )
    # a text that ends at once is the end-of-text token alone
    texts = [
        Encoded(opening, text.tokens or [tokenizer.eos_token_id]) for opening, text in zip(openings, found, strict=True)
    ]
    return {"train": texts[:count], "valid": texts[count:]}


def what_is_kept(lm: PrefixLM, teacher: TextInFront, texts: Sequence[Encoded]) -> dict[str, dict[str, float]]:
    """Perplexity of the continuations of `texts` after nothing, after the prefix and after the whole text.

    Beside it, what each of these costs in every request: positions, and bytes of keys and values.
    """
    models = {"nothing": PrefixLM(lm.base, None), "prefix": lm, "whole text": teacher.lm}
    perplexity = {name: math.exp(mean_loss(model, texts)) for name, model in models.items()}
    positions = {"nothing": 0, "prefix": lm.prefix.config.preseqlen, "whole text": len(teacher.ids)}
    in_all = sum(tensor.nbytes for layer in teacher.layers for tensor in layer)
    kept = {name: in_all * count // len(teacher.ids) for name, count in positions.items()}
    for name, value in perplexity.items():
        cost = f"{positions[name]} positions, {kept[name]:,} bytes of keys and values"
        logger.info("perplexity of the dev texts behind %s (%s): %.2f", name, cost, value)
    return {"perplexity": perplexity, "positions": positions, "bytes": kept}


def make_distillation(
    trained: Model, preseqlen: int, text: Path | None, objective: str, positions: str, top_k: int
) -> Distillation | None:
    """The teacher, in the precision of the frozen base: of --distill yes or --distill_context; None without.

    text: the file of --distill_context.
    """
    task = trained.task
    if task.get("distill_context"):
        ids = building.context_ids(text, preseqlen, trained.base, trained.tokenizer)
        positions = "text" if positions == "all" else positions
        return Distillation(TextInFront(trained.base, ids), objective, positions, top_k)
    if task.get("distill") != "yes":
        return None
    dtype, directory = trained.base.get_input_embeddings().weight.dtype, Path(task["finetuned_model_path"])
    teacher = load_teacher(directory, task["mode"], trained.base, trained.text_positions, dtype)
    return Distillation(teacher, objective, positions, top_k)
