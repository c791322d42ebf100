"""A tiny random Llama as a GGUF file, written as llama.cpp's converter writes one, and the model it should become."""

from pathlib import Path

import gguf
import numpy
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

END, MARK = "<|end|>", "<|start|>"
MERGES = ("t h", "Ġ th", "Ġth e", "e r")
TOKENS = (END, MARK, *bytes_to_unicode().values(), "th", "Ġth", "Ġthe", "er")
CONFIG = {  # 2 layers, 4 query and 2 key/value heads of size 8; rows a multiple of 32, the size of a Q8_0 block
    **{"vocab_size": len(TOKENS), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
    **{"rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "eos_token_id": 0, "bos_token_id": 1},
}
TENSORS = {  # transformers' names in a layer -> GGUF's
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    """model.layers.0.self_attn.q_proj.weight -> blk.0.attn_q.weight"""
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in whole:
        return f"{whole[stem]}.weight"
    layer, _, inside = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{TENSORS[inside]}.weight"


def write_tiny(path: Path, seed: int = 0, architecture: str = "llama", leave_out: str = "") -> LlamaForCausalLM:
    """Write the file, matrices in Q8_0 and norms in float32; returns the model with the same quantised weights."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_block_count(CONFIG["num_hidden_layers"])
    writer.add_head_count(CONFIG["num_attention_heads"])
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(CONFIG["rope_theta"])
    writer.add_layer_norm_rms_eps(CONFIG["rms_norm_eps"])
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(list(TOKENS))
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 2))
    writer.add_token_merges(list(MERGES))
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if leave_out and leave_out in name:
                continue
            values = weight.numpy()
            if values.ndim == 1:
                writer.add_tensor(gguf_name(name), values)
                continue
            packed = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            weight.copy_(torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)))
            heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
            if heads:  # llama.cpp rotates neighbouring numbers, transformers the two halves of a head
                packed = numpy.stack(numpy.split(packed.reshape(CONFIG[heads], 2, 4, -1), 2, axis=1), axis=3)
                packed = packed.reshape(-1, packed.shape[-1])
            writer.add_tensor(gguf_name(name), packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
