"""PEFT's file format of a prefix for a decoder-only model, written and read without PEFT (checked on PEFT 0.21).

adapter_config.json         the adapter's kind, its base model, its shape
adapter_model.safetensors   `prompt_embeddings` (P, 2*L*H*D): keys and values, columns ordered layer0.K, layer0.V, ...

PEFT stores nothing else, with or without `prefix_projection`: the projection is applied when the adapter is saved.
`token_dim` is H*D of the keys and values, so it is smaller than the hidden size in a grouped-query model. A cartridge
(Eyuboglu et al. 2025: keys and values trained without a network) is stored in the same way, its frozen positions first.

Legend: P prefix length, L layers, H key/value heads, D head size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefixlib.checkpoints.checkpoint import check_arrays, check_numbers, unpickled
from prefixlib.system import files, schema
from prefixlib.system.errors import UserError, first_line

CONFIG, WEIGHTS, PICKLED, CARD = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "README.md"
EMBEDDINGS = "prompt_embeddings"
KINDS = ("PREFIX_TUNING", "CARTRIDGE")  # of peft_type
NUMBERS = ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim")


class Config(TypedDict, total=False):
    """The values that are read from adapter_config.json, besides NUMBERS."""

    peft_type: str
    task_type: str | None
    num_transformer_submodules: int | None
    base_model_name_or_path: str | None
    revision: str | None


@dataclass(frozen=True)
class Adapter:
    """A prefix in PEFT's form."""

    flat: Tensor  # keys and values (P, 2*L*H*D), float32
    layers: int  # L
    heads: int  # H
    base: Mapping[str, Any]  # {"name": hub id, folder or None, "revision": str or None}


def write(directory: Path, adapter: Adapter) -> None:
    """Write the adapter's three files into `directory`, which exists."""
    length, width = adapter.flat.shape
    config = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base.get("name"),
        "revision": adapter.base.get("revision"),
        "inference_mode": True,
        "num_virtual_tokens": length,
        "num_layers": adapter.layers,
        "num_attention_heads": adapter.heads,
        "token_dim": width // (2 * adapter.layers),
        "num_transformer_submodules": 1,
        "prefix_projection": False,
        "encoder_hidden_size": width // (2 * adapter.layers),  # the projection's width; unused without one
    }
    save_file({EMBEDDINGS: adapter.flat.contiguous()}, directory / WEIGHTS, metadata={"format": "pt"})
    files.write_json(directory / CONFIG, config)
    files.write_text(directory / CARD, _card(adapter))


def read(directory: Path) -> Adapter:
    """Read a prefix adapter of PEFT. Raises UserError if it is none, damaged, or of an encoder-decoder."""
    config = _read_config(directory)
    length, layers, heads, width = (config[name] for name in NUMBERS)
    weights = _read_weights(directory)
    check_arrays(weights, directory)
    flat = weights.get(EMBEDDINGS)
    if flat is None or list(weights) != [EMBEDDINGS]:
        raise UserError(f"{directory}: expected the one array {EMBEDDINGS}, found {', '.join(weights) or 'none'}")
    if flat.shape != (length, 2 * layers * width):
        raise UserError(
            f"{directory}: {EMBEDDINGS} is {'x'.join(map(str, flat.shape))}, "
            f"its {CONFIG} asks for {length}x{2 * layers * width}"
        )
    check_numbers(weights, directory)
    base = {"name": config.get("base_model_name_or_path"), "revision": config.get("revision")}
    return Adapter(flat.float(), layers, heads, base)


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    if not path.is_file():
        raise UserError(f"{directory} is not an adapter of PEFT: {CONFIG} is missing")
    config = schema.read(path, Config, "use another adapter")
    kind, task, submodules = (config.get(k) for k in ("peft_type", "task_type", "num_transformer_submodules"))
    if kind not in KINDS:
        raise UserError(f"{directory} is an adapter of the kind {kind}; only {' and '.join(KINDS)} are prefixes")
    if task != "CAUSAL_LM" or submodules not in (1, None):
        raise UserError(
            f"{directory} is a prefix for the task type {task}; only CAUSAL_LM can be read, as PEFT's prefix of an "
            "encoder-decoder is in the decoder alone and shifts its positions"
        )
    absent = [name for name in NUMBERS if type(config.get(name)) is not int or config[name] < 1]
    if absent:
        raise UserError(f"{path}: {', '.join(absent)} must be whole numbers above 0")
    return config


def _read_weights(directory: Path) -> dict[str, Tensor]:
    path = directory / WEIGHTS
    try:
        if path.is_file():
            return load_file(path)
        path = directory / PICKLED  # the file of PEFT versions before safetensors
        return unpickled(path)
    except FileNotFoundError as error:
        raise UserError(f"{directory} has no {WEIGHTS}") from error
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error})") from error
    except Exception as error:  # torch.load raises several exception types for a damaged or unsafe file
        raise UserError(f"{path} cannot be read without running pickled code: {first_line(error)}") from error


def _card(adapter: Adapter) -> str:
    """A README in the hub's form, with an example."""
    name = adapter.base.get("name")
    on_hub = name is not None and not Path(name).is_absolute()
    revision = f", revision={adapter.base['revision']!r}" if adapter.base.get("revision") else ""
    header = f"base_model: {name}\n" if on_hub else ""
    return f"""---
library_name: peft
{header}---
# Prefix for {name or "an unnamed base model"}

A trained prefix (Li & Liang 2021, arXiv 2101.00190) of {adapter.flat.shape[0]} positions, for decoding: PEFT cannot
continue training an adapter that it has loaded.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({name or "BASE"!r}{revision})
model = PeftModel.from_pretrained(base, ".")  # "." is this folder
```
"""
