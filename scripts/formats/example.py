"""example.py of an export: it answers a text, with this checkpoint's own prompt, on transformers (and PEFT) alone.

A prefix trained with one form of prompt answers nonsense with another, so the example contains the template, the
spaces, the separator and the special tokens of the training.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixlib.data.tasks import find_task
from prefixlib.data.wording import SLOT

NAME = "example.py"


@dataclass(frozen=True)
class Prompt:
    """The way a checkpoint's prompt is made from a source."""

    task: Mapping[str, Any]  # the checkpoint's record of its training
    decoder_only: bool
    with_source: bool = True  # False: --format_mode nopeek

    @property
    def row(self):
        """The task; E2E, the task of the original's first command, if the checkpoint names none."""
        return find_task(self.task.get("mode") or "data2text")

    def _template(self) -> str:
        """The template around a source; a template of columns is already part of SOURCE."""
        template = self.task.get("source_template") or ""
        return template if SLOT in template else ""

    def code(self) -> str:
        """A line of Python that makes `text`, which is tokenised, from SOURCE."""
        if self.task.get("chat"):
            return (
                'messages = [{"role": "user", "content": SOURCE}]\n'
                "text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)"
            )
        template = self._template()
        body = f'{template!r}.replace("{SLOT}", SOURCE)' if template else "SOURCE"
        if not self.decoder_only:
            return f"text = {body}"
        if not self.with_source:
            return "text = tokenizer.eos_token  # trained without the source"
        before, after = self.row.source_spaces
        parts = [repr(before) if before else "", body, repr(after) if after else "", "tokenizer.eos_token"]
        return f"text = {' + '.join(filter(None, parts))}"

    def in_words(self) -> str:
        """The form of the prompt, for a README."""
        if self.task.get("chat"):
            return "The prompt is the model's own chat template applied to the messages, with the answer opened."
        form = (self._template() or SLOT).replace(SLOT, "SOURCE")
        if not self.decoder_only:
            return f"The encoder reads `{form!r}`, with the special tokens that the tokenizer adds by itself."
        before, after = self.row.source_spaces if self.with_source else ("", "")
        form, separator = form if self.with_source else "", self.task.get("separator") or "tokenizer.eos_token"
        return (
            f"The prompt is `{before + form + after!r}` and then the tokenizer's end-of-text token, `{separator}`, "
            "which separates source and output; no other special token is added."
        )


def readme(prompt: Prompt) -> str:
    """A README's section on the prompt and the example."""
    return f"""
## The prompt

{prompt.in_words()} Other prompts get other, worse answers. `python {NAME} "A SOURCE"` answers one, greedily.
"""


def decoder_only(prompt: Prompt, base: Mapping[str, Any], cache: str, imports: str, length: int) -> str:
    """cache: lines of Python that make `past`, a DynamicCache of `length` positions."""
    forward = f"""{cache}
mask = torch.ones(1, {length} + prompt.shape[1], dtype=torch.long)  # includes the prefix
output = model.generate(prompt, attention_mask=mask, past_key_values=past, **how)"""
    return _decoder_only(prompt, base, forward, f"{imports}\nfrom transformers import {AUTO}, DynamicCache")


def with_peft(prompt: Prompt, base: Mapping[str, Any]) -> str:
    """The example for an adapter of PEFT."""
    forward = """model = PeftModel.from_pretrained(model, HERE)
output = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **how)"""
    return _decoder_only(prompt, base, forward, f"from peft import PeftModel\nfrom transformers import {AUTO}")


AUTO = "AutoModelForCausalLM, AutoTokenizer"


def _decoder_only(prompt: Prompt, base: Mapping[str, Any], forward: str, imports: str) -> str:
    strip = "" if prompt.row.verbatim else ".strip()"
    return f"""{_head(prompt, base, imports)}
model = AutoModelForCausalLM.from_pretrained(BASE, revision=REVISION, dtype=torch.float32)
# the text contains the special tokens, as in training
prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
end = tokenizer.eos_token_id
how = {{"max_new_tokens": 100, "do_sample": False, "num_beams": 1, "eos_token_id": end, "pad_token_id": end}}
{forward}
answer = tokenizer.decode(output[0, prompt.shape[1] :], clean_up_tokenization_spaces=False)
print(answer.split(tokenizer.eos_token)[0]{strip})
"""


def _head(prompt: Prompt, base: Mapping[str, Any], imports: str) -> str:
    name, revision = base.get("name"), base.get("revision")
    return f'''"""Answers a text with the prefix in this folder: python {NAME} "A SOURCE"."""

import sys
from pathlib import Path

import torch
{imports}

HERE = Path(__file__).resolve().parent
BASE, REVISION = {name or "BASE"!r}, {revision!r}
SOURCE = sys.argv[1] if len(sys.argv) > 1 else {prompt.row.example!r}

tokenizer = AutoTokenizer.from_pretrained(BASE, revision=REVISION)
{prompt.code()}'''


def encoder_decoder(prompt: Prompt, base: Mapping[str, Any], file: str, length: int, layers: Mapping[str, int]) -> str:
    """layers: how many layers have a prefix at each site: "encoder", "self", "cross"."""
    imports = """from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DynamicCache, EncoderDecoderCache"""
    return f'''{_head(prompt, base, imports)}
model = AutoModelForSeq2SeqLM.from_pretrained(BASE, revision=REVISION, dtype=torch.float32)
prefix, name, P = load_file(HERE / "{file}"), "{{}}.layer_{{}}.{{}}", {length}  # P positions before the decoder's


def cache(site, layers):
    states = [[prefix[name.format(site, n, kind)][None] for kind in ("key", "value")] for n in range(layers)]
    return DynamicCache(states)


def from_zero(_, args, kwargs):
    return args, {{**kwargs, "position_ids": kwargs["position_ids"] - P}}


# transformers' decoder counts positions from the end of its cache; the hook subtracts P again
model.get_decoder().embed_positions.register_forward_pre_hook(from_zero, with_kwargs=True)
source = tokenizer(text, return_tensors="pt").input_ids
encoded = model.get_encoder()(source, past_key_values=cache("encoder.self", {layers["encoder"]}))
past = EncoderDecoderCache(cache("decoder.self", {layers["self"]}), cache("decoder.cross", {layers["cross"]}))
past.is_updated = dict.fromkeys(past.is_updated, False)  # the encoder's own keys and values are still to be joined
mask = torch.ones(1, P + 1, dtype=torch.long)
output = model.generate(
    encoder_outputs=encoded, past_key_values=past, decoder_attention_mask=mask, num_beams=1, max_new_tokens=60
)
print(tokenizer.decode(output[0], skip_special_tokens=True))
'''


def path_of(base: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """The base model's name for a folder that may be moved: a model inside the checkpoint gets its full path."""
    name = base.get("name")
    if isinstance(name, str) and name.startswith("./"):
        return {**base, "name": str((directory / name).resolve())}
    return dict(base)
