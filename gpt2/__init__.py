"""Table-to-text with a decoder-only language model: load a trained model, or train one.

    import gpt2
    model = gpt2.load("CHECKPOINT")
    texts = model.generate([" | Aarhus_Airport : cityServed : Aarhus"])
    result = gpt2.train(gpt2.Settings(mode="webnlg", output_dir="runs/webnlg"))

The names are imported when they are first used, so that `import gpt2` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2.flags import Settings
    from gpt2.model import Model, load, load_mixed
    from gpt2.run_language_modeling import TrainResult, train
    from prefixlib.mixed import MixedPrefixes

__all__ = ["MixedPrefixes", "Model", "Settings", "TrainResult", "load", "load_mixed", "train"]

_HOME = {
    "Model": "gpt2.model",
    "load": "gpt2.model",
    "MixedPrefixes": "prefixlib.mixed",
    "load_mixed": "gpt2.model",
    "Settings": "gpt2.flags",
    "train": "gpt2.run_language_modeling",
    "TrainResult": "gpt2.run_language_modeling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gpt2' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
