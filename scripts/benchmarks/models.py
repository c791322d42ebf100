"""The models that scripts/benchmark.py compares: shapes, random base models, and one builder per row.

A builder returns a model and its loss on a batch. Dropout is off in every row, so that all do the same arithmetic.

Legend: B batch, S source tokens, T tokens (of the target, for an encoder-decoder), P prefix length, L layers, H heads,
D head size, V vocabulary.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    T5Config,
)

from gpt2 import prefix_lm as gpt2_lm
from gpt2 import train_control as gpt2
from gpt2.trainer_prefix import row_losses
from prefixlib.base_model.load import avoid_cudnn_attention, fuse_gelu
from prefixlib.compute import attention
from prefixlib.system.errors import UserError
from seq2seq import prefix_lm as bart_lm
from seq2seq import prefixTuning as bart
from seq2seq.frozen_lm import attend_to

SHAPES = {  # layers (of each side), heads, width
    "gpt2-tiny": (2, 2, 64),
    "gpt2-mini": (4, 4, 256),
    "gpt2-small": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "bart-tiny": (2, 2, 64),
    "bart-mini": (2, 4, 256),
    "bart-base": (6, 12, 768),
    "bart-large": (12, 16, 1024),
    "llama-tiny": (2, 3, 48),
    "llama-135m": (30, 9, 576),  # SmolLM2-135M's
    "t5-tiny": (2, 2, 64),
    "t5-small": (8, 6, 512),  # T5 1.1's and Flan-T5's
}
POSITIONS = 1024
IDS = (4, 32_000)  # the random token ids: ordinary ones in every vocabulary
# default B, S, T, P, mid_dim: WebNLG's mean length; XSum's, shortened for a CPU
DEFAULTS = {"gpt2": (5, 0, 80, 5, 512), "bart": (5, 256, 40, 200, 800)}
SETTINGS = ("bsz", "source", "tokens", "preseqlen", "mid_dim")
LORA_RANK = 8
LIBRARIES = {"peft": "peft", "lora": "peft", "ct2": "ctranslate2", "ct2-int8": "ctranslate2"}  # row -> its library
LOUDER = 8.0  # factor on the random prefix, so that omitting or changing it would show in loss and tokens

Batch = dict[str, Tensor]
Case = tuple[nn.Module, Callable[[Batch], Tensor]]  # a model, and its loss on a batch


def is_seq2seq(args: argparse.Namespace) -> bool:
    return args.shape.startswith(("bart", "t5"))


def fill_defaults(args: argparse.Namespace) -> None:
    """Fill in the tree's own sizes where the command line has none."""
    for name, value in zip(SETTINGS, DEFAULTS["bart" if is_seq2seq(args) else "gpt2"], strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)


def config_of(shape: str) -> PreTrainedConfig:
    """transformers' configuration of a shape, without dropout."""
    family, (layers, heads, width) = shape.split("-")[0], SHAPES[shape]
    if family == "bart":
        sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (
            ("layers", layers), ("attention_heads", heads), ("ffn_dim", 4 * width))}  # fmt: skip
        off = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)
        return BartConfig(d_model=width, forced_eos_token_id=None, **sides, **off)
    if family == "t5":
        sizes = {"d_model": width, "num_layers": layers, "num_heads": heads, "d_ff": 2 * width}
        kind = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dropout_rate": 0.0}
        return T5Config(decoder_start_token_id=0, **sizes, **kind)
    if family == "llama":
        sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads // 3}
        sizes |= {"hidden_size": width, "intermediate_size": width * 8 // 3, "max_position_embeddings": POSITIONS}
        return LlamaConfig(vocab_size=49_152, tie_word_embeddings=True, **sizes)
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2Config(n_layer=layers, n_head=heads, n_embd=width, n_positions=POSITIONS, **off)


def make_base(args: argparse.Namespace) -> nn.Module:
    """transformers' own model with random weights of the given shape, without dropout; --bf16: in bfloat16."""
    torch.manual_seed(0)
    config = config_of(args.shape)
    auto = AutoModelForSeq2SeqLM if is_seq2seq(args) else AutoModelForCausalLM
    avoid_cudnn_attention()  # as load_model does; for every row
    base = auto.from_config(config).to(args.device, torch.bfloat16 if args.bf16 else torch.float32)
    base.generation_config.pad_token_id = config.eos_token_id if not is_seq2seq(args) else config.pad_token_id
    return base.eval()


def decoder_inputs(args: argparse.Namespace, labels: Tensor) -> Tensor:
    """An encoder-decoder's inputs: its start token, followed by the labels (B, T) without the last."""
    start = config_of(args.shape).decoder_start_token_id
    return torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)


def make_batch(args: argparse.Namespace) -> Batch:
    """Random ids without padding: half of a decoder-only row is scored, as in table-to-text, and all of a target."""
    torch.manual_seed(1)
    labels = torch.randint(*IDS, (args.bsz, args.tokens))
    if is_seq2seq(args):
        input_ids = torch.randint(*IDS, (args.bsz, args.source))
        batch = {"input_ids": input_ids, "labels": labels, "decoder_input_ids": decoder_inputs(args, labels)}
    else:
        batch = {"input_ids": labels.clone(), "labels": labels}
        labels[:, : args.tokens // 2] = -100
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return {name: part.to(args.device) for name, part in batch.items()}


def our_prefix(args: argparse.Namespace, base: nn.Module) -> nn.Module:
    """This package's prefix module, the same random weights each time."""
    torch.manual_seed(2)
    settings = {"preseqlen": args.preseqlen, "mid_dim": args.mid_dim, "prefix_dropout": 0.0}
    if is_seq2seq(args):
        sites = dict.fromkeys(("use_encoder_prefix", "use_cross_prefix", "use_self_prefix"), True)
        off = {"use_deep": False, "init_shallow": False}
        prefix = bart.PrefixTuning(bart.PrefixConfig.for_model(base.config, **settings, **sites, **off))
    else:
        named = {"prefix_mode": "activation", "format_mode": "cat"}
        prefix = gpt2.PrefixTuning(gpt2.PrefixConfig.for_model(base, **settings, **named))
    with torch.no_grad():
        for network in prefix.children():
            if isinstance(network, nn.Sequential):
                network[-1].weight.mul_(LOUDER)
    return prefix.to(args.device)


def our_model(args: argparse.Namespace, checkpointing: bool = False) -> nn.Module:
    """This package's PrefixLM around a base prepared as in `load_model`."""
    base = make_base(args)
    fuse_gelu(base)
    prefix = our_prefix(args, base)
    if not is_seq2seq(args):
        return gpt2_lm.PrefixLM(base, prefix, train_base=checkpointing, checkpointing=checkpointing)
    model = bart_lm.PrefixLM(base, prefix)
    if checkpointing:
        attention.enable_checkpointing(base)
    return model


def prefix_row(args: argparse.Namespace, checkpointing: bool = False) -> Case:
    """This package, called as in its trainers."""
    model = our_model(args, checkpointing).train()

    def loss(batch: Batch) -> Tensor:
        nll, rows = model(batch["input_ids"], batch["labels"], attention_mask=batch["attention_mask"])
        return row_losses(nll, rows, batch["labels"], torch.ones(1), mode=0).mean()

    def bart_loss(batch: Batch) -> Tensor:
        total, count = model.loss(**batch)
        return total / count

    return model, bart_loss if is_seq2seq(args) else loss


def checkpointing_row(args: argparse.Namespace) -> Case:
    """This package with activation checkpointing."""
    return prefix_row(args, checkpointing=True)


def import_peft():
    """The peft library. Raises UserError if it is missing."""
    try:
        import peft
    except ImportError as error:
        raise UserError("peft is not installed: pip install -e .[peers], or leave it out of --vs") from error
    return peft


def peft_model(args: argparse.Namespace) -> nn.Module:
    """PEFT's prefix tuning with projection. GPT-2: with our weights. BART: only its decoder gets a prefix."""
    peft = import_peft()
    base = make_base(args)
    config = peft.PrefixTuningConfig(
        task_type="SEQ_2_SEQ_LM" if is_seq2seq(args) else "CAUSAL_LM",
        num_virtual_tokens=args.preseqlen,
        prefix_projection=True,
        encoder_hidden_size=args.mid_dim,
    )
    model = peft.get_peft_model(base, config)
    if not is_seq2seq(args):
        ours, encoder = our_prefix(args, base), model.prompt_encoder["default"]
        encoder.embedding.load_state_dict(ours.wte.state_dict())
        encoder.transform.load_state_dict(ours.control_trans.state_dict())
    return model.to(args.device)


def lora_model(args: argparse.Namespace) -> nn.Module:
    """PEFT's LoRA with its defaults for the model (GPT-2: c_attn; BART: q_proj, v_proj): another method."""
    peft = import_peft()
    kind = {"task_type": "SEQ_2_SEQ_LM"} if is_seq2seq(args) else {"task_type": "CAUSAL_LM", "fan_in_fan_out": True}
    return peft.get_peft_model(make_base(args), peft.LoraConfig(r=LORA_RANK, **kind))


STOCK = {"peft": peft_model, "lora": lora_model, "finetune": make_base}  # models with transformers' own loss


def stock_row(make: Callable[[argparse.Namespace], nn.Module]) -> Callable[[argparse.Namespace], Case]:
    """A row of one of these models, whose loss makes the decoder's inputs from the labels."""

    def row(args: argparse.Namespace) -> Case:
        model = make(args).train()
        padding = (
            model.config.pad_token_id if is_seq2seq(args) else None
        )  # GPT-2's labels are marked as ignored already

        def loss(batch: Batch) -> Tensor:
            labels = batch["labels"]
            labels = labels if padding is None else labels.masked_fill(labels.eq(padding), -100)
            return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss

        return model, loss

    return row


class OriginalStyle(nn.Module):
    """The prefix around transformers' stock model as in the first implementation, without any short cut.

    The network runs on B*P rows, logits are computed and kept at every position, padding is included.
    """

    def __init__(self, args: argparse.Namespace):
        super().__init__()
        self.base = make_base(args)
        self.prefix = our_prefix(args, self.base)
        self.bart = is_seq2seq(args)
        self.base.requires_grad_(False)
        if self.bart:
            attention.install(self.base)  # the only way in: transformers has no encoder prefix

    def layers(self, rows: int) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Keys and values (rows, H, P, D) by site and layer, computed by the network for each row."""
        prefix, dtype = self.prefix, self.base.dtype

        def run(embedding: nn.Embedding, network: nn.Module, shape: tuple[int, int, int]):
            flat = network(embedding.weight.expand(rows, -1, -1).contiguous())  # (rows, P, 2*L*H*D)
            states = flat.unflatten(2, shape).permute(2, 0, 3, 1, 4).to(dtype)  # (2L, rows, H, P, D)
            return list(zip(states[0::2], states[1::2], strict=True))

        if not self.bart:
            config = prefix.config
            return {"self": run(prefix.wte, prefix.control_trans, (2 * config.n_layer, config.n_head, config.head_dim))}
        return {
            branch.site: run(
                getattr(prefix, branch.embedding), getattr(prefix, branch.network), prefix.config.shape(branch.site)
            )
            for branch in prefix.branches
        }

    def forward(self, batch: Batch) -> Tensor:
        """The mean loss over the labels that count."""
        layers = self.layers(len(batch["input_ids"]))
        if not self.bart:
            cache = DynamicCache(layers["self"])
            logits = self.base(input_ids=batch["input_ids"], past_key_values=cache, use_cache=True).logits
            logits, labels = logits[:, :-1].float(), batch["labels"][:, 1:]
            return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        wanted = ("input_ids", "attention_mask", "decoder_input_ids")
        with attend_to(self.base, layers):
            logits = self.base(**{name: batch[name] for name in wanted}, use_cache=False).logits
        labels, padding = batch["labels"].flatten(), self.base.config.pad_token_id
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels, ignore_index=padding)


def original_row(args: argparse.Namespace) -> Case:
    """The method as in the first implementation."""
    model = OriginalStyle(args)
    return model, model


GROUPED = "grouped"  # BART's epoch alone: this package with --group_by_length yes
ROWS: dict[str, Callable[[argparse.Namespace], Case]] = {
    "prefix": prefix_row,
    GROUPED: prefix_row,
    "checkpointing": checkpointing_row,
    **{name: stock_row(make) for name, make in STOCK.items()},
    "original-style": original_row,
}
LABELS = {
    GROUPED: "prefix, --group_by_length yes",
    "checkpointing": "prefix, activation checkpointing",
    "peft": "PEFT prefix tuning with MLP",
    "lora": f"PEFT LoRA, rank {LORA_RANK} (another method)",
    "finetune": "full fine-tuning",
}


def label(args: argparse.Namespace, row: str) -> str:
    """A row's name in a table, with a note if it does different work."""
    other = " (decoder self-attention only: another function)" if is_seq2seq(args) and row == "peft" else ""
    return LABELS.get(row, row) + other


def same_function(args: argparse.Namespace) -> tuple[str, ...]:
    """Rows that compute the same function of the same weights."""
    return ("prefix", "checkpointing", "original-style", *(() if is_seq2seq(args) else ("peft",)))


def check_equal_losses(args: argparse.Namespace, losses: dict[str, float]) -> None:
    """Raise UserError if rows that compute the same function differ by more than rounding."""
    same = [losses[row] for row in losses if row in same_function(args)]
    limit = 2e-2 if args.bf16 else 1e-4
    if same and max(same) - min(same) > limit:
        raise UserError(f"the rows do not compute the same loss, so their times do not compare: {losses}")
