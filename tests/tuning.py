"""What the tests of the tuning modes share: settings of each mode, a killed run, comparing weights, flags in pairs."""

import dataclasses
import itertools
from collections.abc import Callable

import torch
from safetensors.torch import load_file

from prefixlib.settings.flags import METHOD, RARE, START, Flags, spelled
from prefixlib.system.errors import UserError

TUNED = ("finetune", "finetune-top", "adaptertune", "bothtune")
MORE = {  # each mode's own flags, away from their defaults
    "prefixtune": {"preseqlen": 3, "mid_dim": 16},
    "finetune": {},
    "finetune-top": {"top_layers": 2, "top_embeddings": "no"},
    "adaptertune": {"adapter_design": 2, "adapter_bottleneck": 6},
    "bothtune": {"preseqlen": 3, "mid_dim": 16},
}


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def die_after(work):
    """`work`, and then the end."""

    def die(*arguments, **named):
        work(*arguments, **named)
        raise Killed

    return die


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def moved(before, after):
    """The tensors of `after` that are new or differ from `before`; a tied head counts once."""
    return {name for name, tensor in after.items() if name not in before or not torch.equal(tensor, before[name])}


def weights(output):
    return {path.relative_to(output): load_file(path) for path in output.rglob("*.safetensors")}


def model_weights(mode, output):
    return load_file(output / ("model" if mode == "bothtune" else "") / "model.safetensors")


def other_values(field):
    """Values of a flag, as the command line spells them, that are not its default."""
    kind = type(field.default) if field.default is not None else str
    if field.metadata["choices"] or kind is bool:
        return [spelled(value) for value in field.metadata["choices"] or (True, False) if value != field.default]
    if kind in (int, float):
        return [field.default + 1 if kind is int else 0.25]
    return ["something"]


OF_EVERY_MODE = (  # flags that are rarely needed and change no method
    *("max_source_length", "max_target_length", "train_max_target_length", "val_max_target_length"),
    *("test_max_target_length", "model_revision", "cache_dir", "warmup_steps", "num_workers", "force_bos"),
    "skip_decode",
)


def pairs(modes, settings: type[Flags], *groups: str):
    """(tuning mode, flag, value) for every flag of `groups` at each value that is not its default."""
    apart = {"tuning_mode", *OF_EVERY_MODE}
    fields = [f for f in dataclasses.fields(settings) if f.metadata["group"] in groups and f.name not in apart]
    return [(mode, f.name, value) for mode, f in itertools.product(modes, fields) for value in other_values(f)]


def judge(launch: Callable, child: Callable, cases):
    """Per mode the flags that launcher and child accept; the rest is refused with one line that names the flag.

    launch: a launcher's words -> the child's command; child: the child's words -> its settings.
    """
    accepted, refusals = {mode: set() for mode, _, _ in cases}, {}
    for mode, flag, value in cases:
        try:
            command = launch(["--tuning_mode", mode, f"--{flag}", str(value)])
        except UserError as error:
            refusals[mode, flag, value] = str(error)
            continue
        parsed = child(command[2:])
        assert (parsed.tuning_mode, str(spelled(getattr(parsed, flag)))) == (mode, str(value))
        accepted[mode].add(flag)
    for (_, flag, _), message in refusals.items():
        assert f"--{flag}" in message
        assert "\n" not in message
    return accepted


OF_THE_METHOD = (METHOD, START, RARE)
