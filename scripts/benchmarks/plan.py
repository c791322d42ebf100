"""The cost of a prefix on a large GPU, from the count of operations and bytes alone (scripts/benchmark.py plan).

Nothing here is measured. A step's time is its operations at a share of the card's rate. A token's time is the bytes
that it must read, weights, keys and values, at the card's bandwidth. The base is bfloat16, the prefix float32.
"""

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig

from benchmarks.operations import Sizes, decoding, training_step

CARD, RATE, BANDWIDTH, MEMORY = "H100 SXM", 989e12, 3.35e12, 80e9  # NVIDIA's data sheet: bfloat16 operations/s, bytes/s
SHARE = 0.4  # of the rate: reached by well-tuned training code on such cards
LENGTHS = (16, 64, 200, 512)
BATCH, TEXT, OUTPUT, MID_DIM = 16, 512, 128, 512  # texts of a step, tokens of a text (half scored), of an output
MODELS: dict[str, PreTrainedConfig] = {
    "GPT-2 large": GPT2Config(n_layer=36, n_head=20, n_embd=1280),
    "Llama 8B": LlamaConfig(
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        hidden_size=4096,
        intermediate_size=14336,
        vocab_size=128_256,
    ),
}
HEAD = ("model", "P", "operations a step", "step, s", "trained, GB", "base, GB", "stored, MB", "ms a token", "that fit")


def rows() -> list[tuple]:
    """A row for each model and P, under HEAD.

    trained: the network with its gradient and AdamW's two moments. stored: keys and values in float32. ms a token: one
    text at a time. that fit: prefixes (bfloat16) in the card's memory beside the base.
    """
    found = []
    for name, config in MODELS.items():
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(config)
        sizes, weights = Sizes.of(base), 2 * sum(parameter.numel() for parameter in base.parameters())
        for length in LENGTHS:
            positions = 2 * sizes.layers * sizes.keys  # size of one position's keys and values
            network = length * sizes.hidden + MID_DIM * (sizes.hidden + positions)
            step = sum(training_step(sizes, [TEXT] * BATCH, BATCH * TEXT // 2, length, MID_DIM).values())
            read = 2 * sizes.all_weights + 2 * positions * (length + TEXT // 2 + OUTPUT // 2)
            operations = sum(decoding(sizes, [TEXT // 2], [OUTPUT], 1, length).values()) / OUTPUT
            token = max(read / BANDWIDTH, operations / RATE)
            fit = int((MEMORY - weights) // (2 * positions * length))
            memory = (16 * network / 1e9, weights / 1e9, 4 * positions * length / 1e6)
            found.append((name, length, step, step / RATE / SHARE, *memory, token * 1e3, fit))
    return found


def table() -> str:
    """The rows as Markdown, with their assumptions."""
    lines = [HEAD, ["---"] * len(HEAD)]
    for name, length, step, seconds, trained, base, stored, token, fit in rows():
        numbers = (f"{step:.3g}", f"{seconds:.2g}", f"{trained:.2g}", f"{base:.3g}", f"{stored:.3g}", f"{token:.2g}")
        lines.append((name, str(length), *numbers, f"{fit:,}"))
    assumed = (
        f"Arithmetic, not measured: one {CARD} ({RATE / 1e12:.0f} bfloat16 TFLOP/s, {BANDWIDTH / 1e12:.2f} TB/s, "
        f"{MEMORY / 1e9:.0f} GB). A step: {BATCH} texts of {TEXT} tokens, half of them scored, mid_dim {MID_DIM}, at "
        f"{SHARE:.0%} of the card's rate; memory without activations. Decoding: one text at a time, {TEXT // 2} tokens "
        f"of prompt and {OUTPUT} of output, at the card's bandwidth."
    )
    return assumed + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
