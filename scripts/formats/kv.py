"""A prefix as plain arrays for other tools: one key and one value per layer, a JSON of their shapes, a README.

keys_values.safetensors   `SITE.layer_N.key` and `SITE.layer_N.value`, each (H, P, D)
keys_values.json          base model, sites, shapes, position of the first token of text
README.md                 the layout in words

Legend: P prefix length, L layers, H key/value heads, D head size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from prefixlib.system import files

ARRAYS, SHAPES, CARD = "keys_values.safetensors", "keys_values.json", "README.md"
CACHE = "cache.safetensors"
DECODER, CROSS, ENCODER = "decoder.self", "decoder.cross", "encoder.self"


@dataclass(frozen=True)
class KeysValues:
    """A prefix cut into layers."""

    sites: Mapping[str, Sequence[tuple[Tensor, Tensor]]]  # site -> per layer keys and values, each (H, P, D)
    family: str  # "decoder-only" or "encoder-decoder"
    text_starts_at: int  # position of the first token of text: P, or 0 in an encoder-decoder
    base: Mapping[str, Any]  # {"name", "revision"}
    task: Mapping[str, Any]
    settable_positions: bool = True  # of an encoder-decoder: whether positions can be passed to its decoder


def write(directory: Path, prefix: KeysValues) -> None:
    """Write the three files into `directory`, which exists."""
    arrays, shapes = {}, {}
    for site, layers in prefix.sites.items():
        for number, (keys, values) in enumerate(layers):
            arrays[f"{site}.layer_{number}.key"] = keys.contiguous()
            arrays[f"{site}.layer_{number}.value"] = values.contiguous()
        keys, values = (_described([layer[n].shape for layer in layers]) for n in (0, 1))
        shapes[site] = {"layers": len(layers), **keys}
        if values != keys:  # latent attention
            shapes[site]["values"] = values
    save_file(arrays, directory / ARRAYS, metadata={"format": "pt"})
    described = {
        "family": prefix.family,
        "base_model": dict(prefix.base),
        "task": dict(prefix.task),
        "names": "SITE.layer_N.key and SITE.layer_N.value",
        "array": "(heads, positions, head_size)",
        "text_starts_at_position": prefix.text_starts_at,
        "sites": shapes,
    }
    files.write_json(directory / SHAPES, described)
    files.write_text(directory / CARD, _card(prefix, shapes))


def _described(shapes: Sequence[torch.Size]) -> dict[str, Any]:
    """Heads, positions and head size of all layers' (H, P, D): lists of H and D where layers differ (Gemma 4)."""
    heads, length, size = shapes[0]
    if any(shape != shapes[0] for shape in shapes):
        heads, size = ([shape[n] for shape in shapes] for n in (0, 2))
    return {"heads": heads, "positions": length, "head_size": size}


def _card(prefix: KeysValues, shapes: Mapping[str, Mapping[str, Any]]) -> str:
    """A README for a reader who has this folder and transformers alone."""

    def form(of: Mapping[str, Any]) -> str:
        return f"({of['heads']}, {of['positions']}, {of['head_size']})"

    rows = "".join(
        f"| `{site}` | {s['layers']} | {form(s)}{', values ' + form(s['values']) if 'values' in s else ''} |\n"
        for site, s in shapes.items()
    )
    name = prefix.base.get("name")
    note = CAUSAL if prefix.family == "decoder-only" else ENCODER_DECODER if prefix.settable_positions else COUNTED
    return f"""# Keys and values of a prefix for {name or "an unnamed base model"}

A trained prefix (Li & Liang 2021, arXiv 2101.00190). Every layer attends to these keys and values as to tokens
before its own; they are used as they are, without projection or position.

`{ARRAYS}` holds `SITE.layer_N.key` and `SITE.layer_N.value`, N from 0:

| site | layers | (heads, positions, head size) |
|---|---|---|
{rows}
The first token of text has position {prefix.text_starts_at}. `{SHAPES}` contains the same for programs.

{note}"""


CAUSAL = """\
The attention mask covers prefix and text. A cache is filled in place: make one per call, expanded to the rows of the
batch (times the beams).
"""
COUNTED = """\
This model counts positions from the start of its cache, which would contain the prefix: there is no short example on
transformers alone. In this package, `seq2seq.load` of the checkpoint decodes it.
"""
ENCODER_DECODER = """\
transformers' decoder counts positions from the end of its cache; the hook in the example subtracts P again. One text
has no padding, so only the decoder's mask is passed; in a batch each mask starts with a visible column per prefix
position.
"""


def write_cache(directory: Path, prefix: KeysValues) -> None:
    """Write the states for `transformers.DynamicCache`, `keys` and `values`, each (L, 1, H, P, D), and a README.

    All layers' keys have the same shape, and so have their values.
    """
    layers = prefix.sites[DECODER]
    stacked = {name: torch.stack([layer[n][None] for layer in layers]) for n, name in enumerate(("keys", "values"))}
    save_file(stacked, directory / CACHE, metadata={"format": "pt"})
    name = prefix.base.get("name") or "an unnamed base model"
    files.write_text(
        directory / CARD,
        f"""# A prefix for {name}, as a cache

A trained prefix (Li & Liang 2021, arXiv 2101.00190): keys and values of {len(layers)} layers, each
(1, heads, positions, head size).

```python
states = load_file("{CACHE}")
past = DynamicCache(list(zip(states["keys"], states["values"])))
output = model.generate(prompt, attention_mask=mask, past_key_values=past)
```

{CAUSAL}The first token of text has position {prefix.text_starts_at}.
""",
    )
