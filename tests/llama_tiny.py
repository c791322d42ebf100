"""A tiny Llama and its tokenizer: a byte vocabulary, <s> in front of every text, no padding token."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
EMBEDDINGS = 280  # more than the tokenizer's 259 entries: the vocabulary was resized


def save_tokenizer(folder):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def save_llama(folder):
    """The model folder, its weights in several files."""
    save_tokenizer(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 512, "vocab_size": EMBEDDINGS}
    config = LlamaConfig(**sizes, **SPECIAL, initializer_range=0.3)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="20KB")
    return folder
