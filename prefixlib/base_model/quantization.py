"""Frozen base models in 4 or 8 bits: transformers' loading arguments, and whether this machine can use them."""

import importlib.util
from typing import Any

import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

from prefixlib.settings.flags import QUANTIZATIONS
from prefixlib.system.errors import UserError


def loading_options(kind: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of from_pretrained for --quantization `kind`, with computations in `dtype`; {} without quantisation.

    4bit, 8bit: bitsandbytes, on a GPU. int8: torchao's 8-bit weights, also without a GPU. Raises UserError for
    another kind, and if the library or the GPU is missing.
    """
    if kind in (None, "no"):
        return {}
    shown = f"--quantization {kind}"
    if kind not in QUANTIZATIONS:
        raise UserError(f"{shown}: one of {', '.join(QUANTIZATIONS)}")
    library = "torchao" if kind == "int8" else "bitsandbytes"
    if importlib.util.find_spec(library) is None:
        raise UserError(f"{shown} needs {library}: pip install {library}")
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    if not torch.cuda.is_available():
        raise UserError(f"{shown} needs a GPU and there is none here: int8 does without")
    config = BitsAndBytesConfig(
        load_in_4bit=kind == "4bit",
        load_in_8bit=kind == "8bit",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type="nf4",
    )
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}


def is_quantized(model: torch.nn.Module) -> bool:
    """Whether `model` was loaded with --quantization."""
    return getattr(model, "hf_quantizer", None) is not None


def check_quantized(model: torch.nn.Module, kind: str | None) -> None:
    """Raise UserError if --quantization `kind` changed no weight: torchao quantises linear layers alone."""
    if kind == "int8" and all(type(parameter.data) is torch.Tensor for parameter in model.parameters()):
        raise UserError(f"--quantization int8: a {model.config.model_type} model has no linear layers to quantise")
