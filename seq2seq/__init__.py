"""Prefix-tuning of an encoder-decoder: summarisation, table-to-text, any text-to-text.

    import seq2seq

    model = seq2seq.load("CHECKPOINT")
    texts = model.generate(["The document to summarise."])
    result = seq2seq.train(seq2seq.Settings(mode="xsum", data_dir="data", output_dir="runs/xsum"))

Nothing heavy is imported before a name is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefixlib.mixed import MixedPrefixes
    from seq2seq.finetune import TrainResult, train
    from seq2seq.flags import Settings
    from seq2seq.model import Model, load, load_mixed

__all__ = ["MixedPrefixes", "Model", "Settings", "TrainResult", "load", "load_mixed", "train"]
_HOMES = {
    "MixedPrefixes": "prefixlib.mixed",
    "Model": "seq2seq.model",
    "Settings": "seq2seq.flags",
    "TrainResult": "seq2seq.finetune",
    "load": "seq2seq.model",
    "load_mixed": "seq2seq.model",
    "train": "seq2seq.finetune",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
