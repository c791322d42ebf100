"""The layers of a transformers model, whatever its architecture: finding them, and training the last ones only."""

from torch import nn

from prefixlib.errors import UserError


def find_stacks(model: nn.Module) -> list[tuple[nn.Module, nn.ModuleList]]:
    """Each stack of layers with the module that holds it: [decoder], or [encoder, decoder] of an encoder-decoder.

    Raises UserError for a model that is not built of attention layers in a list.
    """
    if model.config.is_encoder_decoder:
        return [_find_stack(model.get_encoder()), _find_stack(model.get_decoder())]
    return [_find_stack(model.base_model)]


def _find_stack(body: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    for holder in body.modules():  # from the outside in, so that no list within a layer comes first
        for child in holder.children():
            if isinstance(child, nn.ModuleList) and len(child) and all(map(_attends, child)):
                return holder, child
    raise UserError(f"{type(body).__name__} has no list of attention layers: it can be trained as a whole, or prefixed")


def _attends(layer: nn.Module) -> bool:
    return any(is_attention(module) for module in layer.modules())


def is_attention(module: nn.Module) -> bool:
    """True for a module that its class names an attention (GPT2Attention, BartAttention, LlamaAttention, ...)."""
    return type(module).__name__.endswith("Attention")


def train_top(model: nn.Module, count: int, embeddings: bool) -> list[str]:
    """Freeze everything but the last `count` layers of the decoder, its final norm and, if asked, the word embeddings.

    The embeddings are those of the input and of the head, which are one matrix in most models. Returns the names of
    what is trained. Raises UserError if there are fewer layers, or nothing is left to train.
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
    """The norm behind the last layer, called ln_f, norm, final_layer_norm, ...; BART has none.

    Norms of the embeddings (BART's layernorm_embedding, BLOOM's word_embeddings_layernorm) stand beside it.
    """
    return [m for name, m in holder.named_children() if type(m).__name__.endswith("Norm") and "embedding" not in name]
