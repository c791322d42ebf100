"""A new model to train: the base model, a prefix and its start; or what is tuned inside the base model.

Legend: P prefix length, L layers, H key/value heads, D head size, E width of the word embeddings.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpt2.dataset import encode
from gpt2.flags import DEFAULT_MODEL, Settings
from gpt2.frozen_lm import check_rows, key_values, max_positions
from gpt2.model import Model, load_prefix
from gpt2.prefix_lm import PrefixLM
from gpt2.train_control import FAMILY, PrefixConfig, join_layers, make_prefix
from prefixlib.base_model import gguf_base
from prefixlib.base_model.load import (
    check_tokenizer,
    dropout_settings,
    evaluating,
    fingerprint,
    load_config,
    load_model,
    load_tokenizer,
    resolve_model_name,
)
from prefixlib.checkpoints import checkpoint
from prefixlib.data.readers import read_text
from prefixlib.methods.starts import Given, regress, start_from_checkpoint, start_random
from prefixlib.methods.table import METHODS
from prefixlib.system.errors import UserError

logger = logging.getLogger(__name__)


def new(
    settings: Settings, *, resuming: bool = False, task: Mapping[str, Any] | None = None, texts: Sequence[str] = ()
) -> Model:
    """The model that a run trains: a base with a new prefix in front, or the base itself, whole, in part, or adapters.

    Just what the tuning mode trains requires gradients. A resumed run has its weights already, so its prefix does not
    start from a text again. The tokenizer must be able to write `texts`. Raises UserError for a base model that does
    not fit.
    """
    name = resolve_model_name(settings.model_name_or_path or DEFAULT_MODEL)
    hub = {"revision": settings.model_revision, "cache_dir": settings.cache_dir}
    tokenizer = load_tokenizer(name, **hub)
    method, checkpointing = METHODS[settings.tuning_mode], settings.gradient_checkpointing
    frozen = not method.tunes_base
    # layers are checkpointed in train mode only, so there the dropout has to be taken out of a frozen model
    silent = frozen and checkpointing and not settings.use_dropout
    residual = settings.dropout if settings.use_custom_teacher_dropout else None
    base = load_model(
        name,
        FAMILY,
        **hub,
        # frozen weights need no float32 master copy under bf16; weights that are trained do
        dtype=torch.bfloat16 if settings.bf16 and frozen else torch.float32,
        quantization=settings.quantization,
        **_dropouts(load_config(name, **hub), name, residual, silent),
    )
    check_tokenizer(name, tokenizer, base, texts)
    revision = settings.model_revision or getattr(base.config, "_commit_hash", None)
    base_record = {"name": name, "revision": revision, "fingerprint": fingerprint(base, tokenizer)}
    base_record |= gguf_base.described(name)
    if settings.quantization:
        base_record["quantization"] = settings.quantization
    prefix, train_base = None, True
    if settings.has_prefix:
        prefix = make_start(
            base,
            tokenizer,
            settings.start,
            settings.prefix_settings(),
            settings.start_path,
            freeze_first=settings.freeze_first,
            resuming=resuming,
        )
        train_base = method.tunes_base or settings.use_dropout or checkpointing
    else:
        check_rows(base)  # now, not when the result of the training is to be decoded
    method.apply(base, vars(settings))
    lm = PrefixLM(base, prefix, train_base=train_base, checkpointing=checkpointing, freeze=not method.tunes_base)
    return Model(lm, tokenizer, dict(task or settings.training_settings()), base_record)


def _dropouts(config: Any, name: str, residual: float | None, silent: bool) -> dict[str, float]:
    """The base model's dropout probabilities that the run changes. residual: --dropout of a teacher."""
    if silent:
        return dict.fromkeys(dropout_settings(config), 0.0)
    if residual is None:
        return {}
    if not hasattr(config, "resid_pdrop"):
        raise UserError(f"--use_custom_teacher_dropout yes: {name} has no residual dropout (resid_pdrop) to set")
    return {"resid_pdrop": residual}


def check_same_prefix(
    given: Mapping[str, Any], earlier: PrefixConfig, directory: Path | str, *, loaded: bool = False
) -> None:
    """Raise UserError naming both values if `given` asks for another prefix than the checkpoint in `directory` has.

    loaded: a run starts from the prefix's weights, so how these were initialised does not count.
    """
    given, known = dict(given), earlier.as_dict()
    text, started = given.pop("init_text"), known.pop("init_text")
    if not loaded and text != started:
        how = "did not start from a text" if started is None else f"started from the text {started!r}"
        raise UserError(f"{directory} {how}: --init_text (--init_shallow_word, --lowdata_token) says otherwise")
    if text is not None:
        del given["preseqlen"]  # it is the text's
    for values in (given, known):
        values["dropout"] = values.pop("prefix_dropout")
    checkpoint.check_agrees(given, known, directory)


def make_start(
    base: nn.Module,
    tokenizer: Any,
    name: str,
    chosen: Mapping[str, Any],
    path: Path | None = None,
    *,
    freeze_first: bool = False,
    resuming: bool = False,
) -> nn.Module:
    """The prefix with the start `name` of STARTS.

    chosen: the settings of its PrefixConfig. path: the checkpoint or the text file that it starts from.
    A resumed run reads its weights later; it does not start again. Raises UserError for a model that it does not fit.
    """
    chosen, given = dict(chosen), Given(base)
    if name == "text":
        given.ids = text_ids(tokenizer, chosen["init_text"], max_positions(base.config) - 2)
        chosen["preseqlen"] = len(given.ids)
    elif name == "context":
        given.ids = context_ids(path, chosen["preseqlen"], base, tokenizer)[: chosen["preseqlen"]]
    config = PrefixConfig.for_model(base, **chosen)
    check_rows(base)
    if name == "checkpoint":
        earlier = load_prefix(path)
        check_same_prefix(chosen, earlier.config, path, loaded=True)
        shape = {name: value for name, value in config.as_dict().items() if name.startswith(("n_", "head"))}
        checkpoint.check_agrees(shape, earlier.config.as_dict(), path)
        given.network = earlier.network
    prefix = make_prefix(config, freeze_first=freeze_first)
    if not resuming:
        STARTS[name](prefix, given)
    return prefix


LEAST_BEHIND = 64  # positions that --distill_context has to leave for what follows its text


def context_ids(path: Path, preseqlen: int, base: nn.Module, tokenizer: Any) -> list[int]:
    """The tokens of --distill_context. Raises UserError unless they are more than the prefix, and fit the model."""
    if not path.is_file():
        raise UserError(f"--distill_context {path}: no such file")
    ids, positions = encode(tokenizer, [read_text(path)])[0], max_positions(base.config)
    if not 1 <= len(ids) <= positions - LEAST_BEHIND:
        raise UserError(
            f"--distill_context {path} has {len(ids)} tokens; the model takes 1 to {positions - LEAST_BEHIND}, "
            f"as {LEAST_BEHIND} of its {positions} positions are for what follows the text"
        )
    if len(ids) <= preseqlen:
        raise UserError(f"--preseqlen {preseqlen}: {path} has {len(ids)} tokens, and the prefix stands for more")
    return ids


# ---- starting a prefix from a text (paper section 7.4) -----------------------------------------------------------


def text_ids(tokenizer: Any, text: str, limit: int) -> list[int]:
    """The text's tokens, its first word with a leading space as inside a sentence. UserError unless 1 to `limit`."""
    ids = encode(tokenizer, [text if text[:1].isspace() else f" {text}"])[0] if text.strip() else []
    if not 1 <= len(ids) <= limit:
        raise UserError(f"the initial text {text[:40]!r} has {len(ids)} tokens; it needs 1 to {limit}")
    return ids


def start_uniform(prefix: nn.Module, given: Given) -> None:
    """Draw what a random prefix is made of, its P vectors (without an MLP its keys and values), from [0, 1)."""
    drawn = [module.weight for module in prefix.modules() if isinstance(module, nn.Embedding)]
    for parameter in [*drawn, prefix.control_trans] if prefix.config.init_shallow else drawn:
        nn.init.uniform_(parameter)


def start_from_text(prefix: nn.Module, given: Given) -> list[float]:
    """Start the prefix at a text of P tokens; returns the losses of a regression, [] if none is needed.

    activation, no MLP (--init_shallow yes)     copied: the prefix starts exactly as if the text preceded every input
    activation, MLP                             the MLP is trained onto the text's keys and values for 500 steps
    embedding, --parametrize_emb Emb            copied: the trained embeddings start as the text's words
    embedding, MLP                              the MLP is trained onto the words' embeddings for 500 steps
    infix                                       exact: the MLP adds 0 to the keys and values of the text's words
    """
    base = given.base
    text = torch.tensor([list(given.ids)], device=base.get_input_embeddings().weight.device)
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
    if config.init_shallow:
        prefix.load_state_dict({"control_trans": states})
        return []
    return _regress(prefix, prefix.flat, states)


def _copy(parameter: Tensor, values: Tensor) -> list[float]:
    with torch.no_grad():
        parameter.copy_(values)
    return []


def _regress(prefix: nn.Module, output: Callable[[], Tensor], target: Tensor) -> list[float]:
    target = target.to(prefix.wte.weight.device)

    def loss() -> Tensor:
        return nn.functional.mse_loss(prefix.dropout(output()), target)

    return regress(prefix, prefix.control_trans.parameters(), loss, len(target))


# Every start of a prefix, by the name that `Settings.start` gives: (prefix, what it is made of) -> None.
STARTS: Mapping[str, Callable[[nn.Module, Given], Any]] = {
    "random": start_random,
    "uniform": start_uniform,
    "text": start_from_text,
    "context": start_from_text,  # the first P tokens of --distill_context
    "checkpoint": start_from_checkpoint,
}
