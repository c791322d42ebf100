"""A tiny random Llama whose tokenizer is as unlike GPT-2's as Llama 2's: "▁" for spaces, bytes as a fallback, a BOS."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>")
LETTERS = "▁" + "".join(map(chr, range(33, 127)))
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[/{{ m['role'] }}]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_llama(folder: Path, chat: bool = False, **settings) -> Path:
    """A model folder: 2 layers, 4 query and 2 key/value heads of size 4."""
    vocabulary = [*SPECIAL, *(f"<0x{n:02X}>" for n in range(256)), *LETTERS, "▁t", "he", "▁the"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    bpe = BPE({token: n for n, token in enumerate(vocabulary)}, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = TEMPLATE if chat else None
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"vocab_size": len(vocabulary), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    shape |= {"initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    LlamaForCausalLM(LlamaConfig(**{**shape, **settings})).save_pretrained(folder)
    return folder
