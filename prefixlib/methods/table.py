"""One row per --tuning_mode: what it trains and stores, and the flags only it reads (standard library only)."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """A way to tune a model."""

    prefix: bool = False  # trains a prefix, stored as prefix_model and prefix_flat.safetensors
    tunes_base: bool = True  # trains weights inside the base model, stored as a model folder of transformers
    module: str = ""  # prefixlib.methods.MODULE, whose `apply(base, **settings)` prepares the base model for training
    settings: tuple[str, ...] = ()  # flags of this method alone; checkpoints record them, a resumed run repeats them
    refusal: str = ""  # why the other methods refuse these flags
    notes: Callable[[Mapping[str, Any]], str] | None = None  # what the original added to the name of a run's folder

    @property
    def tunes_both(self) -> bool:
        """Whether the base model is trained together with a prefix; it is then stored inside the checkpoint."""
        return self.prefix and self.tunes_base

    def apply(self, base: Any, values: Mapping[str, Any]) -> None:
        """Insert the method's parameters into the base model and unfreeze them; `values`: the row's `settings`."""
        if self.module:
            module = importlib.import_module(f"prefixlib.methods.{self.module}")
            module.apply(base, **{name: values[name] for name in self.settings})


METHODS: Mapping[str, Method] = {
    "prefixtune": Method(prefix=True, tunes_base=False),
    "finetune": Method(),
    "finetune-top": Method(
        module="top_layers",
        settings=("top_layers", "top_embeddings"),
        refusal="the others train no chosen layers",
        notes=lambda s: f"l={s['top_layers']}" + ("" if s["top_embeddings"] in (True, "yes") else "_e=no"),
    ),
    "adaptertune": Method(
        module="adapters",
        settings=("adapter_design", "adapter_bottleneck"),
        refusal="there are no adapters",
        notes=lambda s: f"a={s['adapter_design']}_b={s['adapter_bottleneck']}",
    ),
    "bothtune": Method(prefix=True),
}
# The base model's name in a checkpoint if it was tuned together with the prefix: a folder inside the checkpoint.
OWN_MODEL = "./model"
TASK = "task_config.json"  # in the folder of a tuned model: what it was trained for
WITH_PREFIX = tuple(name for name, method in METHODS.items() if method.prefix)
FROZEN_BASE = tuple(name for name, method in METHODS.items() if not method.tunes_base)


def method_of(task: Mapping[str, Any]) -> Method:
    """The method of a checkpoint's `task` record; one without a mode holds a prefix alone."""
    return METHODS.get(task.get("tuning_mode") or "prefixtune", METHODS["prefixtune"])
