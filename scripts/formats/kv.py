"""A prefix as plain arrays for other tools: one key and one value per layer, a JSON of their shapes, a README.

keys_values.safetensors   `SITE.layer_N.key` and `SITE.layer_N.value`, each (H, P, D)
keys_values.json          base model, sites, shapes, position of the first token of text
README.md                 the layout in words, and an example on transformers alone

Legend: P prefix length, L layers, H key/value heads, D head size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from prefixlib import files

ARRAYS, SHAPES, CARD = "keys_values.safetensors", "keys_values.json", "README.md"
DECODER, CROSS, ENCODER = "decoder.self", "decoder.cross", "encoder.self"
SITE_OF = {"self_layers": DECODER, "cross_layers": CROSS, "encoder_layers": ENCODER}  # placeholders of the example


@dataclass(frozen=True)
class KeysValues:
    """A prefix cut into layers."""

    sites: Mapping[str, Sequence[tuple[Tensor, Tensor]]]  # site -> per layer keys and values, each (H, P, D)
    family: str  # "decoder-only" or "encoder-decoder"
    text_starts_at: int  # position of the first token of text: P, or 0 in an encoder-decoder
    base: Mapping[str, Any]  # {"name", "revision"}
    task: Mapping[str, Any]
    prompt: str = ""  # a prompt as training had them, of a decoder-only model
    settable_positions: bool = True  # of an encoder-decoder: whether its decoder takes positions from outside


def write(directory: Path, prefix: KeysValues) -> None:
    """Write the three files into `directory`, which exists."""
    arrays, shapes = {}, {}
    for site, layers in prefix.sites.items():
        for number, (keys, values) in enumerate(layers):
            arrays[f"{site}.layer_{number}.key"] = keys.contiguous()
            arrays[f"{site}.layer_{number}.value"] = values.contiguous()
        all_shapes = [keys.shape for keys, _ in layers]
        heads, length, size = all_shapes[0]
        if any(shape != all_shapes[0] for shape in all_shapes):  # Gemma 4: each layer has its own
            heads, size = ([shape[n] for shape in all_shapes] for n in (0, 2))
        shapes[site] = {"layers": len(layers), "heads": heads, "positions": length, "head_size": size}
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


def _card(prefix: KeysValues, shapes: Mapping[str, Mapping[str, int]]) -> str:
    """What a reader with this folder and transformers alone needs."""
    rows = "".join(
        f"| `{site}` | {s['layers']} | ({s['heads']}, {s['positions']}, {s['head_size']}) |\n"
        for site, s in shapes.items()
    )
    name = prefix.base.get("name")
    values = {"base": repr(name or "BASE"), "file": ARRAYS, "prompt": repr(prefix.prompt)}
    if prefix.family == "decoder-only":
        site = shapes[DECODER]
        example = DECODER_ONLY.format(**values, site=DECODER, layers=site["layers"], length=site["positions"])
    elif not prefix.settable_positions:
        example = COUNTED
    else:
        layers = {key: shapes.get(site, {}).get("layers", 0) for key, site in SITE_OF.items()}
        example = ENCODER_DECODER.format(**values, **layers, length=shapes.get(DECODER, {}).get("positions", 0))
    return f"""# Keys and values of a prefix for {name or "an unnamed base model"}

A trained prefix (Li & Liang 2021, arXiv 2101.00190). Every layer attends to these keys and values as if tokens stood in
front of its own; they are used as they are, without projection or position.

`{ARRAYS}` holds `SITE.layer_N.key` and `SITE.layer_N.value`, N from 0:

| site | layers | (heads, positions, head size) |
|---|---|---|
{rows}
The first token of text has position {prefix.text_starts_at}. `{SHAPES}` says the same for programs.

{example}"""


DECODER_ONLY = """\
The attention mask covers prefix and text. A cache is filled in place: make one per call, expanded to the rows of the
batch (times the beams).

```python
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

BASE, PROMPT = {base}, {prompt}
model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)
prefix, name = load_file("{file}"), "{site}.layer_{{}}.{{}}"
pairs = [(prefix[name.format(n, "key")][None], prefix[name.format(n, "value")][None]) for n in range({layers})]
prompt = tokenizer(PROMPT, add_special_tokens=False, return_tensors="pt").input_ids  # as in training
mask = torch.ones(1, {length} + prompt.shape[1], dtype=torch.long)
output = model.generate(prompt, attention_mask=mask, past_key_values=DynamicCache(pairs), max_new_tokens=50)
print(tokenizer.decode(output[0, prompt.shape[1] :]))
```
"""

COUNTED = """\
This model counts positions from the start of its cache, where the prefix would stand: there is no short example on
transformers alone. In this package, `seq2seq.load` of the checkpoint decodes it.
"""

ENCODER_DECODER = """\
transformers' decoder counts positions from the end of its cache; the hook takes that back. One text has no padding, so
only the decoder's mask is given; in a batch each mask gets a visible column per prefix position, in front.

```python
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DynamicCache, EncoderDecoderCache

BASE, SOURCE, P = {base}, "The text to summarise.", {length}  # P positions in front of the decoder
model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)
prefix, name = load_file("{file}"), "{{}}.layer_{{}}.{{}}"


def cache(site, layers):
    states = [[prefix[name.format(site, n, kind)][None] for kind in ("key", "value")] for n in range(layers)]
    return DynamicCache(states)


def from_zero(_, args, kwargs):
    return args, {{**kwargs, "position_ids": kwargs["position_ids"] - P}}


model.get_decoder().embed_positions.register_forward_pre_hook(from_zero, with_kwargs=True)
source = tokenizer(SOURCE, return_tensors="pt").input_ids
encoded = model.get_encoder()(source, past_key_values=cache("encoder.self", {encoder_layers}))
past = EncoderDecoderCache(cache("decoder.self", {self_layers}), cache("decoder.cross", {cross_layers}))
past.is_updated = dict.fromkeys(past.is_updated, False)  # the encoder's own keys and values are still to be joined
mask = torch.ones(1, P + 1, dtype=torch.long)
output = model.generate(
    encoder_outputs=encoded, past_key_values=past, decoder_attention_mask=mask, num_beams=1, max_new_tokens=60
)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```
"""
