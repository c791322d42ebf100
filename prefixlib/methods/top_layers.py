"""Tuning the last layers of a model alone (the paper's section 5.2, "FT-top2")."""

from torch import nn

from prefixlib.methods.layers import find_stacks
from prefixlib.system.errors import UserError


def apply(model: nn.Module, top_layers: int, top_embeddings: bool) -> None:
    """Train the last layers alone: --tuning_mode finetune-top."""
    train_top(model, top_layers, top_embeddings)


def train_top(model: nn.Module, count: int, embeddings: bool) -> list[str]:
    """Freeze all but the decoder's last `count` layers, its final norm and, with `embeddings`, the word embeddings.

    Word embeddings are the input's and the head's, one matrix in most models. Returns the names of the trained
    parameters. Raises UserError if there are fewer layers, or nothing is left to train.
    """
    holder, layers = find_stacks(model)[-1]
    if count > len(layers):
        part = "decoder" if model.config.is_encoder_decoder else "model"
        raise UserError(f"--top_layers {count}: the {part} has {len(layers)} layers")
    model.requires_grad_(False)
    chosen = [*layers[len(layers) - count :], *_final_norms(holder)]
    if embeddings:
        chosen += [model.get_input_embeddings(), model.get_output_embeddings()]
    for module in chosen:
        module.requires_grad_(True)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not names:
        raise UserError(
            "--top_layers 0 and --top_embeddings no do not go together: this model has no final norm, nothing is left"
        )
    return names


def _final_norms(holder: nn.Module) -> list[nn.Module]:
    """The norm after the last layer, called ln_f, norm, final_layer_norm, ...; BART has none.

    The same module may hold norms of embeddings (BART's layernorm_embedding, BLOOM's word_embeddings_layernorm).
    """
    return [m for name, m in holder.named_children() if type(m).__name__.endswith("Norm") and "embedding" not in name]
