"""Resolve and load the frozen base model and its tokenizer: all rules for names, folders, dtypes and hub errors."""

import contextlib
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, is_offline_mode
from huggingface_hub.utils import get_session
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.activations import NewGELUActivation
from transformers.utils import logging as transformers_logging

from prefixlib.base_model import gguf_base
from prefixlib.base_model.quantization import check_quantized, is_quantized, loading_options
from prefixlib.methods import adapters
from prefixlib.methods.table import OWN_MODEL, TASK
from prefixlib.system import schema
from prefixlib.system.errors import UserError, first_line, refused_by_system

logger = logging.getLogger(__name__)

# A bare name could also be a folder here (`gpt2/` is one of ours), so the short names are spelled out.
HUB_IDS = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
    "bart-base": "facebook/bart-base",
    "bart-large": "facebook/bart-large",
}
AUTO_CLASSES = {"decoder-only": AutoModelForCausalLM, "encoder-decoder": AutoModelForSeq2SeqLM}


def resolve_model_name(name: str) -> str:
    """A model folder's absolute path if `name` is a folder with a config.json, else the full hub id.

    For a GGUF file it is the folder that the file is dequantised into. Raises UserError for a path without a model.
    """
    gguf = gguf_base.find(name)
    if gguf is not None:
        return str(gguf_base.model_folder(gguf))
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        gguf_base.check_whole(folder)
        return str(folder.resolve())
    if name in HUB_IDS:
        return HUB_IDS[name]
    is_path = folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if is_path or folder.is_dir():
        raise UserError(f"--model_name_or_path {name}: no model folder there (it needs a config.json)")
    return name


def choose_base(saved: Mapping[str, Any], given: str | None, directory: Path) -> tuple[str, str | None]:
    """The base model (name, revision) of the checkpoint in `directory`, whose record is `saved` {"name", "revision"}.

    `given` (--model_name_or_path) may be a folder, or name a model that has moved since the training.
    Raises UserError for another hub name than the checkpoint's, or if there is no model.
    """
    known = saved.get("name")
    if saved.get("gguf"):
        return gguf_base.choose(saved, given and resolve_model_name(given), directory), None
    if known == OWN_MODEL:
        if given is not None:
            raise UserError(f"--model_name_or_path {given} contradicts {directory}, which contains its own tuned model")
        known = str((directory / known).resolve())
    if given is None:
        if known is None or (Path(known).is_absolute() and not Path(known).is_dir()):
            raise UserError(
                f"the base model of {directory}, {known or 'unnamed'}, is not here: pass --model_name_or_path"
            )
        return resolve_model_name(known), saved.get("revision")
    given = resolve_model_name(given)
    if given != known and known is not None and not Path(given).is_dir():
        raise UserError(f"--model_name_or_path {given} contradicts {directory}, which was trained on {known}")
    return given, saved.get("revision") if given == known else None


TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.spm", "*.tiktoken", "tekken.json", "*.bpe")


def load_config(name: str, *, revision: str | None = None, cache_dir: str | None = None):
    """The base model's configuration. Raises UserError if it cannot be loaded."""
    return _fetch(AutoConfig.from_pretrained, name, revision=revision, cache_dir=cache_dir)


def dropout_settings(config) -> dict[str, float]:
    """The model's dropout probabilities above 0, by their names in its configuration or that of a part."""
    values = [pair for part in _parts(config) for pair in part.to_dict().items()]
    return {name: p for name, p in values if "drop" in name and isinstance(p, float) and p > 0}


def _parts(config) -> list[Any]:
    """The configuration, followed by those of the model's parts (T5Gemma's encoder and decoder)."""
    return [config, *(part for name in config.sub_configs if (part := getattr(config, name)) is not None)]


def load_tokenizer(name: str, *, revision: str | None = None, cache_dir: str | None = None):
    """The base model's tokenizer. Raises UserError if it cannot be loaded."""
    if os.path.isdir(name) and not any(next(Path(name).glob(kind), None) for kind in TOKENIZER_FILES):
        raise UserError(
            f"cannot load {name}: no tokenizer is in the folder; copy the model's tokenizer files (tokenizer.json, "
            "tokenizer_config.json) into it"
        )
    tokenizer = _fetch(AutoTokenizer.from_pretrained, name, revision=revision, cache_dir=cache_dir)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name}: its tokenizer has no end-of-sequence token, which separates source and target here")
    if getattr(tokenizer, "tgt_lang", "") is None:  # M2M100: targets need a language; take the source's
        tokenizer.tgt_lang = tokenizer.src_lang
    return tokenizer


def load_model(
    name: str,
    family: str,
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    dtype: torch.dtype = torch.float32,
    quantization: str | None = None,
    attn_implementation: str | None = None,
    **config_overrides: Any,
) -> torch.nn.Module:
    """The base model in `dtype`, in eval mode; family is "decoder-only" or "encoder-decoder".

    Adapters in a folder are loaded with it. quantization, attn_implementation: as the flags. Raises UserError if the
    model cannot be loaded or is of the other family.
    """
    options = loading_options(quantization, dtype)
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    config = load_config(name, revision=revision, cache_dir=cache_dir)
    if bool(config.is_encoder_decoder) != (family == "encoder-decoder"):
        kind = "an encoder-decoder" if config.is_encoder_decoder else "a decoder-only"
        raise UserError(
            f"{name} is {kind} model ({config.model_type}); one of the kind {family} is needed, "
            f"or the other tree, {'seq2seq/' if config.is_encoder_decoder else 'gpt2/'}"
        )
    for part in _parts(config):
        for key in config_overrides.keys() & part.to_dict().keys():
            setattr(part, key, config_overrides[key])
    adapted = adapters.has_adapters(config)
    model, loading = _fetch(
        (adapters.model_class(config) if adapted else AUTO_CLASSES[family]).from_pretrained,
        name,
        revision=revision,
        cache_dir=cache_dir,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # `check_loaded` refuses them, by name
        config=config if config_overrides else None,
        **options,
    )
    check_loaded(name, loading)
    if (Path(name) / TASK).is_file():  # a model that was tuned here
        check_finite(model, name)
        check_floating(Path(name))
    check_quantized(model, quantization)
    fuse_gelu(model)
    avoid_cudnn_attention()
    return model.eval()


def check_loaded(name: str, loading: Mapping[str, Any]) -> None:
    """Raise UserError if a model's files lack weights, which would stay random, or contain unknown ones.

    loading: from_pretrained's report. A head that is tied to the embeddings is not missing.
    """
    missing, unexpected = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
    mismatched = sorted(str(key[0]) for key in loading.get("mismatched_keys", ()))
    odd = [key for key in (*missing, *unexpected) if adapters.NAME in key]
    if odd:  # the original code's adapters have other names
        raise UserError(f"{name}: its adapters are not of this package's kind (differs in {', '.join(odd[:3])})")
    kinds = {"missing arrays": missing, "unexpected arrays": unexpected, "arrays of another shape": mismatched}
    wrong = [
        f"{kind}: {', '.join(keys[:3])}{f', … ({len(keys)} in all)' * (len(keys) > 3)}"
        for kind, keys in kinds.items()
        if keys
    ]
    if wrong:
        raise UserError(f"{name}: its weights do not fit its config.json; {'; '.join(wrong)}")


def check_finite(model: torch.nn.Module, name: str) -> None:
    """Raise UserError for a weight of NaN or infinity: it would decode nonsense."""
    for weight, array in model.state_dict().items():
        # the sum, one pass, is enough unless it overflows
        if array.is_floating_point() and not array.sum().isfinite() and not array.isfinite().all():
            raise UserError(
                f"{name}: its array {weight} holds NaN or infinity, not finite numbers; use another checkpoint"
            )


def check_floating(directory: Path) -> None:
    """Raise UserError for a weight file of whole numbers, which loading would convert without a word."""
    for path in sorted(directory.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            for weight in file.keys():  # noqa: SIM118 - it is no mapping
                kind = file.get_slice(weight).get_dtype()
                if kind.startswith(("I", "U", "BOOL")):
                    raise UserError(f"{path}: its array {weight} holds {kind}, not floating-point numbers")


def fingerprint(model: torch.nn.Module, tokenizer: Any) -> dict[str, str]:
    """{"model", "tokenizer"}: hashes that tell a base model from another one of the same shape, in milliseconds.

    The first one covers 16 values spread over each weight array, rounded to bfloat16, so that it does not depend on
    the precision of loading. Weights of a quantised model are left out, as they differ.
    """
    weights = hashlib.sha256()
    for parameter in () if is_quantized(model) else model.parameters():
        spread = parameter.detach().flatten()[:: max(parameter.numel() // 16, 1)][:16]
        weights.update(spread.to(device="cpu", dtype=torch.bfloat16).view(torch.int16).numpy().tobytes())
    entries = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    digests = {"model": weights.hexdigest()[:16], "tokenizer": hashlib.sha256(entries.encode()).hexdigest()[:16]}
    return {kind: digest for kind, digest in digests.items() if kind != "model" or not is_quantized(model)}


def check_fingerprint(
    saved: Mapping[str, Any], model: torch.nn.Module, tokenizer: Any, name: str, directory: Path
) -> None:
    """Raise UserError unless the checkpoint in `directory` was trained on `model` and `tokenizer`.

    saved: the checkpoint's record of its base model, without a fingerprint in earlier versions and other tools.
    """
    known = saved.get("fingerprint") or {}
    found = fingerprint(model, tokenizer) if known else {}
    for kind in found.keys() & known.keys():
        if known[kind] != found[kind]:
            what = "weights" if kind == "model" else kind
            raise UserError(
                f"{directory} was trained on {saved.get('name')}, and {name} has other {what} "
                f"(--allow_other_base yes decodes with it anyway)"
            )


def check_tokenizer(name: str, tokenizer: Any, model: torch.nn.Module, texts: Sequence[str]) -> None:
    """Raise UserError for a tokenizer that cannot write `texts`, or has more entries than the model has embeddings."""
    for text in texts:
        if any(token in text for token in tokenizer.all_special_tokens):
            continue  # the text is wrong, not the tokenizer: see special_tokens.py
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        letters = Counter(character for character in text.casefold() if character.isalnum())
        decoded = tokenizer.decode(ids, skip_special_tokens=True) if ids else ""
        kept = letters & Counter(decoded.casefold())
        if 2 * kept.total() < letters.total():
            raise UserError(
                f"{name}: its tokenizer turns {text[:40]!r} into {decoded[:40]!r}: tokenizer files are "
                "missing there, or belong to another model"
            )
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    unused = special - {tokenizer.eos_token_id}  # no text has these
    entries = max(number for number in tokenizer.get_vocab().values() if number not in unused) + 1
    embeddings = model.get_input_embeddings().num_embeddings
    if entries > embeddings:
        raise UserError(f"{name}: its tokenizer has {entries} entries, the model embeddings for {embeddings}")


def avoid_cudnn_attention() -> None:
    """Disable cuDNN's attention (half precision on new GPUs): it needs tens of ms of planning for every new shape.

    Packed batches and growing caches have another shape at nearly every call.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def fuse_gelu(model: torch.nn.Module) -> None:
    """Compute GPT-2's GELU with one kernel of torch instead of eight: the same formula, in a quarter of the memory."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))


def save_whole(directory: Path, model: torch.nn.Module, tokenizer) -> None:
    """Write a model that was itself tuned, and its tokenizer, in transformers' own format (safetensors)."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@contextlib.contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """While open, `module` is in eval mode."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def on_device(lm: torch.nn.Module) -> torch.nn.Module:
    """Move the model to a GPU if there is one, in eval mode."""
    if next(lm.parameters()).is_cuda:  # bitsandbytes' models are there already, and cannot be moved
        return lm.eval()
    return lm.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def freeze(model: torch.nn.Module) -> torch.nn.Module:
    """Make every parameter of the base model untrainable; returns the model."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def _fetch(load, name: str, **kwargs):
    """Call a from_pretrained and turn its errors into one line that says what to pass instead.

    Files in the hub's cache are used as they are; only missing ones are downloaded.
    """
    arguments = {key: value for key, value in kwargs.items() if value is not None}
    arguments["trust_remote_code"] = False  # a folder's own code is never run, nor is the user asked whether to
    for path in (Path(name) / file for file in ("config.json", "tokenizer.json", "tokenizer_config.json")):
        if path.is_file():  # transformers' own error names neither file nor fault
            schema.read(path, dict[str, Any], "use another model")
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # we report missing weights ourselves: see `check_loaded`
    try:
        if os.path.isdir(name):
            return load(name, **arguments)
        try:
            return load(name, local_files_only=True, **arguments)
        except (OSError, ValueError):
            _check_hub_reachable()
            return load(name, **arguments)
    except Exception as error:  # transformers raises several exception types for damaged files
        if refused_by_system(error):
            raise
        if os.path.isdir(name):
            raise UserError(f"cannot load {name}: {first_line(error)}") from error
        raise UserError(
            f"cannot load {name} from the hub ({first_line(error)}); without a network pass --model_name_or_path DIR, "
            "a folder with the model's config.json, weights and tokenizer"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def _check_hub_reachable() -> None:
    """Raise OSError at once if the hub cannot be reached: its own client would retry each file for half a minute."""
    if is_offline_mode():
        raise OSError("offline mode is on and the files are not in the cache")
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # httpx's and requests' errors share no base class
        raise OSError(f"{constants.ENDPOINT} cannot be reached: {error}") from error
