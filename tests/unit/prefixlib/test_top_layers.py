"""Training the top layers only: which parameters that is, by name, for several architectures; that only they move."""

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MBartConfig,
    MBartForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
)

from prefixlib.methods import top_layers
from prefixlib.system.errors import UserError

IDS = torch.tensor([[5, 9, 2, 33, 17], [1, 2, 3, 4, 5]])
SHAPE = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
BART = {f"{side}_{kind}": 2 for side in ("encoder", "decoder") for kind in ("layers", "attention_heads")}
BART |= {"vocab_size": 50, "d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_layer=3, n_head=2, n_embd=16, vocab_size=50)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, intermediate_size=24, num_key_value_heads=1)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SHAPE, ffn_dim=24, word_embed_proj_dim=16)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=3, n_head=2)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**BART)),
    "mbart": lambda: MBartForConditionalGeneration(MBartConfig(**BART)),
}
# Final norm, embeddings (with the head's where it has its own), and the layers' prefix. GPT-2's are the original's.
PARTS = {
    "gpt2": ({"transformer.ln_f"}, {"transformer.wte"}, "transformer.h"),
    "llama": ({"model.norm"}, {"model.embed_tokens", "lm_head"}, "model.layers"),
    "opt": ({"model.decoder.final_layer_norm"}, {"model.decoder.embed_tokens"}, "model.decoder.layers"),
    "bloom": ({"transformer.ln_f"}, {"transformer.word_embeddings"}, "transformer.h"),
    "bart": (set(), {"model.shared"}, "model.decoder.layers"),
    "mbart": ({"model.decoder.layer_norm"}, {"model.shared"}, "model.decoder.layers"),
}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("embeddings", [True, False])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_exactly_these_are_trained_and_move(family, count, embeddings):
    """The original's codes: 0, 1, 2 with embeddings; 11 and 22 without. The number of layers is the model's."""
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    norms, words, prefix = PARTS[family]
    depth = 2 if "bart" in family else 3
    tops = {f"{prefix}.{n}" for n in range(depth - count, depth)} | norms | (words if embeddings else set())
    wanted = {n for n, _ in model.named_parameters() if any(n.startswith(f"{top}.") for top in tops)}
    if not wanted:
        assert (family, count, embeddings) == ("bart", 0, False)
        with pytest.raises(UserError, match="--top_layers 0 and --top_embeddings no do not go together"):
            top_layers.train_top(model, count, embeddings)
        return
    assert set(top_layers.train_top(model, count, embeddings)) == wanted
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    silent = {name for name in wanted if name.endswith("k_proj.bias")}  # softmax does not see a shift of all its scores
    assert moved - silent == wanted - silent


def test_gpt2_medium_names_of_the_original():
    """top_layers 2 of 24: ln_f, wte, h.23, h.22; a block of GPT-2 medium has 12 E^2 + 13 E numbers, E = 1024."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=24, n_head=16, n_embd=1024))
    names = top_layers.train_top(model, 2, embeddings=True)
    tops = {".".join(name.split(".")[:3]) if ".h." in name else name.split(".")[1] for name in names}
    assert tops == {"transformer.h.22", "transformer.h.23", "ln_f", "wte"}
    assert len(names) == 2 * 12 + 3
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 2 * (12 * 1024**2 + 13 * 1024) + 50_257 * 1024 + 2 * 1024


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gpt2", "--top_layers 4: the model has 3 layers"),
        ("llama", "--top_layers 4: the model has 3 layers"),
        ("bart", "--top_layers 4: the decoder has 2 layers"),
    ],
)
def test_more_layers_than_there_are(family, message):
    model = MODELS[family]()
    with pytest.raises(UserError, match=message):
        top_layers.train_top(model, 4, True)
    assert all(p.requires_grad for p in model.parameters())  # refused before anything was frozen


def test_a_model_without_attention_layers_is_refused():
    model = MODELS["gpt2"]()
    model.transformer.h = torch.nn.ModuleList([torch.nn.Linear(16, 16)])
    with pytest.raises(UserError, match="GPT2Model has no list of attention layers"):
        top_layers.train_top(model, 1, True)
