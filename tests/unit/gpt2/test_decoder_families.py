"""Decoder-only models beyond GPT-2: grouped key/value heads, rotary positions, position offsets, sliding windows."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    DeepseekV32Config,
    DogeConfig,
    DynamicCache,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GraniteConfig,
    GraniteMoeHybridConfig,
    JambaConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MiMoV2FlashConfig,
    MiniCPM3Config,
    MistralConfig,
    NemotronHConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3NextConfig,
    RwkvConfig,
    SmolLM3Config,
    YoutuConfig,
    Zamba2Config,
)

import gpt2
from gpt2 import run_generation
from gpt2.building import Given, start_from_text
from gpt2.dataset import IGNORED, Encoded, collate, pad_sources
from gpt2.decoding import decode, decode_several
from gpt2.frozen_lm import check_rows, key_values, max_positions, shape_of, without_weights
from gpt2.model import Model, load
from gpt2.prefix_lm import PrefixLM
from gpt2.train_control import Past, PrefixConfig, join_layers, make_prefix, split_layers
from gpt2.trainer_prefix import PrefixTrainer
from prefixlib.compute import attention
from prefixlib.decoding.search import DecodingRule, beam_search
from prefixlib.methods import adapters, top_layers
from prefixlib.system.errors import UserError
from scripts import export
from tests import llama_tiny
from tests.conftest import SETTINGS, close

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "max_position_embeddings": 64}
GROUPED = {**SIZES, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
SPECIAL = {"bos_token_id": 48, "eos_token_id": 49, "pad_token_id": 0}  # these classes' own lie outside the vocabulary
MIXED = {"sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"]}
FOUR = {**GROUPED, "num_hidden_layers": 4, "sliding_window": 40, "layer_types": MIXED["layer_types"] * 2}
FOUR |= {"vocab_size_per_layer_input": 50, "hidden_size_per_layer_input": 4}
GRANITE = {"logits_scaling": 8.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3}
LATENT = {**GROUPED, "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 6}
LATENT |= {"qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 6}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_group": 1, "topk_group": 1}
EXPERTS |= {"n_shared_experts": 1, "first_k_dense_replace": 1}
OPT = {**SIZES, "num_attention_heads": 2, "ffn_dim": 32, "dropout": 0.0}
FAMILIES = {
    "llama": LlamaConfig(**GROUPED),
    "llama tied": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "mistral": MistralConfig(**GROUPED, sliding_window=None),
    "mistral window": MistralConfig(**GROUPED, sliding_window=40),
    "gemma": GemmaConfig(**GROUPED, head_dim=4),
    "neox": GPTNeoXConfig(**SIZES, intermediate_size=32, num_attention_heads=2, tie_word_embeddings=False),
    "gptj": GPTJConfig(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=64, rotary_dim=4),  # no sdpa
    "opt": OPTConfig(**OPT),
    "opt narrow": OPTConfig(**OPT, word_embed_proj_dim=8, do_layer_norm_before=False),
    "gpt2": GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=49, eos_token_id=49,
    ),
    "gemma2": Gemma2Config(**GROUPED, **MIXED, head_dim=4, query_pre_attn_scalar=4, final_logit_softcapping=2.0),
    "gemma3": Gemma3TextConfig(**GROUPED, **MIXED, head_dim=4),
    "gemma3 with eyes": Gemma3Config(
        text_config={**GROUPED, **MIXED, "head_dim": 4},
        vision_config={
            **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
            **{"image_size": 14, "patch_size": 14},
        },
        mm_tokens_per_image=1, image_token_index=45, boi_token_index=46, eoi_token_index=47,
    ),
    "gemma3n": Gemma3nTextConfig(
        **{**FOUR, "intermediate_size": [32] * 4}, head_dim=4, num_kv_shared_layers=2, laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4, altup_num_inputs=2, final_logit_softcapping=2.0,
    ),
    "gemma4": Gemma4TextConfig(
        **FOUR, head_dim=4, global_head_dim=8, num_global_key_value_heads=1, num_kv_shared_layers=2,
        attention_k_eq_v=True,
    ),
    "gemma4 capped": Gemma4TextConfig(
        **GROUPED, **MIXED, head_dim=4, global_head_dim=8, hidden_size_per_layer_input=0, final_logit_softcapping=2.0
    ),
    "phi3": Phi3Config(**GROUPED, **SPECIAL),
    "phi3 window": Phi3Config(**GROUPED, **SPECIAL, sliding_window=40),
    "olmo2": Olmo2Config(**GROUPED, **SPECIAL),
    "smollm3": SmolLM3Config(**GROUPED, **SPECIAL, no_rope_layers=[1, 0]),
    "granite": GraniteConfig(**GROUPED, **GRANITE),
    "cohere": CohereConfig(**GROUPED, **SPECIAL, logit_scale=0.25),
    "cohere2": Cohere2Config(**GROUPED, **SPECIAL, **MIXED, logit_scale=0.25),
    "falcon": FalconConfig(**SIZES, **SPECIAL, num_attention_heads=4, multi_query=True, new_decoder_architecture=False),
    "deepseek_v2": DeepseekV2Config(**LATENT, **SPECIAL, **EXPERTS),
    "deepseek_v3": DeepseekV3Config(**LATENT, **SPECIAL, **EXPERTS),
    "minicpm3": MiniCPM3Config(**LATENT, **SPECIAL, scale_emb=1),
    "youtu": YoutuConfig(**LATENT, **SPECIAL),
    "mimo_v2_flash": MiMoV2FlashConfig(**GROUPED, **SPECIAL, **MIXED, **EXPERTS, head_dim=6, v_head_dim=4),
}  # fmt: skip
STATEFUL = "layers of the kind linear_attention, which keep a state of their own"
LFM2 = Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"])
UNSTEERED = (
    *((FalconH1Config(), "hybrid"), (JambaConfig(), "linear_attention"), (MambaConfig(), "linear_attention")),
    (RwkvConfig(), "it has no attention"),
    *((config(), STATEFUL) for config in (Qwen3NextConfig, Qwen3_5TextConfig, GraniteMoeHybridConfig, NemotronHConfig)),
    *(
        (Zamba2Config(), "hybrid, linear_attention, which keep a state of their own"),
        (LFM2, "conv, which keep a state"),
    ),
    (Llama4TextConfig(), "chunked_attention, which do not see all of a long text"),
    (DeepseekV32Config(), "indexed_attention, which look keys up by an index of their own"),
)
UNSHARED = {  # texts cannot share a row
    "gpt_neo": GPTNeoConfig(
        vocab_size=50, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64, window_size=40,
    ),
    "falcon": FalconConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, alibi=True),
}  # fmt: skip
# The logits are not their output layer's alone.
OWN_HEAD = {
    "gemma2",
    "gemma3n",
    "gemma4 capped",
    "granite",
    "cohere",
    "cohere2",
    "minicpm3",
}  # the logits are not their output layer's alone
LATENT_KINDS = ("deepseek_v2", "deepseek_v3", "minicpm3", "youtu")
UNCHECKPOINTED = {"gptj", "falcon", "mimo_v2_flash", *LATENT_KINDS}  # refused, with a prefix
EXAMPLES = [
    Encoded([5, 6, 7, 49], [8, 9, 49], [5, 6, 7]),
    Encoded([10, 49], [11, 49], [10]),
    Encoded([3, 49], [12, 13, 14, 15, 49], [3, 1, 4, 1, 5]),
]
KINDS = {
    "cat": {},
    "shallow": {"init_shallow": True},
    "embedding": {"prefix_mode": "embedding"},
    "infix": {"format_mode": "infix"},
    "words": {"optim_prefix": False, "preseqlen": 0},
}


def random_model(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():  # far from the tiny initial values, under which all is alike
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
        elif "norm" not in name:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(params=FAMILIES)
def base(request):
    return random_model(FAMILIES[request.param])


def make(base, kind="cat", **more) -> PrefixLM:
    settings = {"preseqlen": 3, "mid_dim": 8, **SETTINGS, **KINDS[kind], **more}
    config = PrefixConfig.for_model(base, **settings)
    check_rows(base)
    return PrefixLM(base, make_prefix(config)).eval()


def kinds_for(base):
    """The kinds of prefix that fit the model: those that read a source need all of it in sight."""
    text = base.config.get_text_config()
    without = {"infix", "words"} if getattr(text, "sliding_window", None) else set()
    if getattr(text, "hidden_size_per_layer_input", None):  # every layer reads the words' ids
        without |= {"infix", "embedding"}
    return [kind for kind in KINDS if kind not in without]


def batch_for(model, examples):
    batch = collate(examples, pad_token_id=49)
    del batch["attention_mask"]
    if not model.prefix.config.needs_source:
        del batch["source"], batch["source_mask"]
    return batch


def test_only_the_prefix_moves_and_all_of_it_does(base):
    for kind in kinds_for(base):
        model = make(base, kind)
        before = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
        for _ in range(3):
            model.train()(**batch_for(model, EXAMPLES))[0].sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                model.eval()(**batch_for(model, EXAMPLES))
        after = model.state_dict()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == {name for name in before if name.startswith("prefix.")}, kind


def test_keys_and_values_of_real_tokens_equal_those_tokens_prepended(base):
    """Copied into a prefix, as its text start does: the text behind stands at positions P.., also with rotary ones."""
    for kind, extra in (("shallow", {}), ("embedding", {"parametrize_emb": "Emb"}), ("infix", {})):
        if kind not in kinds_for(base):
            continue
        model = make(base, kind, **extra)
        assert start_from_text(model.prefix, Given(base, [3, 1, 4])) == []
        source = pad_sources([Encoded([], [], [7, 8])]) if kind == "infix" else {}
        before = [7, 8, 3, 1, 4] if kind == "infix" else [3, 1, 4]
        whole = base(torch.tensor([[*before, 5, 6, 49, 9]])).logits[:, len(before) :]
        assert close(model(torch.tensor([[5, 6, 49, 9]]), **source), whole), kind


def test_flat_and_layers_are_one_another(base):
    layers = key_values(base, input_ids=torch.tensor([[3, 1, 4]]))
    config = make(base).prefix.config
    again = split_layers(join_layers(layers), config, batch_size=1)
    assert all(torch.equal(a, b) for one, two in zip(layers, again, strict=True) for a, b in zip(one, two, strict=True))


def test_a_padded_row_equals_the_row_alone(base):
    for kind in kinds_for(base):
        model = make(base, kind)
        together, rows = model(**batch_for(model, EXAMPLES))
        for row, example in enumerate(EXAMPLES):
            assert close(together[rows == row], model(**batch_for(model, [example]))[0]), kind


def test_checkpointing_changes_neither_loss_nor_gradient(base):
    if base.config.model_type in UNCHECKPOINTED or getattr(base.config, "num_kv_shared_layers", 0):
        pytest.skip("refused with checkpointing, see the test of refusals")
    for kind in kinds_for(base):
        plain = make(base, kind)
        recomputing = PrefixLM(copy.deepcopy(base), plain.prefix, train_base=True, checkpointing=True)
        results = []
        for model in (plain, recomputing):
            model.train()
            plain.prefix.zero_grad()
            nll, _ = model(**batch_for(model, EXAMPLES))
            nll.sum().backward()
            results.append([nll.detach(), *(p.grad.clone() for p in plain.prefix.parameters())])
        for kept, recomputed in zip(*results, strict=True):
            assert (kept - recomputed).abs().max() <= 1e-4 * max(1.0, kept.abs().max()), kind


@pytest.mark.parametrize("strategy", ["greedy", "beam"])
def test_batched_decoding_equals_single_and_the_training_forward(base, strategy):
    rule = DecodingRule(eos_token_id=49, max_new_tokens=6, num_beams=3)
    for kind in kinds_for(base):
        model = make(base, kind)
        trained, own = Model(PrefixLM(base, model.prefix), None), model.prefix.config.needs_source

        def run(members, trained=trained, own=own):
            past = (lambda rows: trained.past([EXAMPLES[members[n]] for n in rows])) if own else None
            layers = None if own else trained.past([]).layers
            prompts = [EXAMPLES[n].prompt for n in members]
            options = {"strategy": strategy, "batch_size": 3, "progress": False}
            return [h.tokens for h in decode(base, prompts, rule, layers=layers, past=past, **options)]

        whole = run([0, 1, 2])
        assert whole == [run([n])[0] for n in range(3)], kind
        if strategy == "greedy":
            for example, tokens in zip(EXAMPLES, whole, strict=True):
                source = pad_sources([example]) if own else {}
                ids = torch.tensor([[*example.prompt, *tokens]])
                best = model(ids, **source)[0].argmax(dim=-1)[len(example.prompt) - 1 : -1]
                assert best.tolist() == tokens, kind


class WithoutCache:
    """The reference: every text is read anew and alone at each step."""

    def __init__(self, lm, prompts):
        self.lm, self.texts = lm, [list(prompt) for prompt in prompts]

    def prefill(self):
        return torch.stack([self.lm(torch.tensor([text]))[0, -1] for text in self.texts])

    def advance(self, rows, tokens):
        self.texts = [[*self.texts[row], token] for row, token in zip(rows.tolist(), tokens.tolist(), strict=True)]
        return self.prefill()


@torch.no_grad()
def test_beams_equal_those_of_a_model_without_a_cache(base):
    rule = DecodingRule(eos_token_id=49, max_new_tokens=6, num_beams=3)
    model = make(base)
    prompts = [example.prompt for example in EXAMPLES]
    expected = beam_search(WithoutCache(model, prompts), prompts, rule)
    layers = Model(model, None).past([]).layers
    found = decode_several(base, prompts, rule, layers=layers, count=3, batch_size=3, progress=False)
    assert [[h.tokens for h in one] for one in found] == [[h.tokens for h in one] for one in expected]
    scores = torch.tensor([[h.score for h in one] for one in expected])
    assert close(torch.tensor([[h.score for h in one] for one in found]), scores)
    assert len({tuple(h.tokens) for one in expected for h in one}) > 3  # not the same text everywhere


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradient_are_those_of_the_model_s_own_logits(name, monkeypatch):
    """Also where the head caps or scales them, for a prefix and for a model that is tuned itself."""
    monkeypatch.setattr("prefixlib.compute.head.CHUNK", 3)
    for prefix in (True, False):
        base = random_model(FAMILIES[name])
        model = make(base) if prefix else PrefixLM(base, None).eval()
        assert model.head.plain == (name not in OWN_HEAD)
        batch = batch_for(model, EXAMPLES) if prefix else {"input_ids": torch.tensor([[5, 6, 7, 49, 8, 9]])}
        batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"].eq(7), IGNORED)
        parameters = [p for p in model.parameters() if p.requires_grad]
        nll, rows = model(**batch)
        found = torch.autograd.grad(nll.sum(), parameters, allow_unused=True)  # eyes have seen nothing
        past = model.prefix.past(base, len(batch["input_ids"])).layers if prefix else []
        positions = torch.arange(batch["input_ids"].shape[1]).unsqueeze(0) + (3 if prefix else 0)
        logits = base(
            input_ids=batch["input_ids"], position_ids=positions, past_key_values=DynamicCache(past), use_cache=True
        ).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        expected = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")[targets.ne(IGNORED)]
        assert close(nll, expected)
        assert rows.tolist() == targets.ne(IGNORED).nonzero()[:, 0].tolist()
        for one, other in zip(found, torch.autograd.grad(expected.sum(), parameters, allow_unused=True), strict=True):
            assert (one is None) == (other is None)
            assert one is None or close(one, other)


@pytest.mark.parametrize("name", ["gemma2", "gemma4", "falcon", "deepseek_v3"])
def test_a_run_is_resumed_decoded_and_loaded(name, tmp_path, monkeypatch):
    """Resumed equals unbroken; what the command line decodes, with beams, is what the loaded model generates."""
    config, base, file = copy.deepcopy(FAMILIES[name]), tmp_path / "base", tmp_path / "texts.txt"
    sizes = dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), llama_tiny.EMBEDDINGS)
    config.update({**llama_tiny.SPECIAL, **sizes})
    llama_tiny.save_tokenizer(base)
    random_model(config).save_pretrained(base)
    file.write_text("".join(f"a : {n}||{n} it is\n" for n in range(8)))
    step, steps = PrefixTrainer.training_step, itertools.count(1)

    def train(out):
        settings = {
            "train_file": str(file),
            "eval_file": str(file),
            "output_dir": str(tmp_path / out),
            "resume": out == "cut",
        }
        settings |= {"preseqlen": 3, "mid_dim": 8, "max_steps": 3, "save_steps": 1, "bsz": 4, "skip_decode": True}
        settings["resume"] = (tmp_path / out).exists()
        gpt2.train(gpt2.Settings(mode="data2text", model_name_or_path=str(base), **settings))
        return load_file(tmp_path / out / "prefix_model.safetensors")

    def interrupted(self, *args, **kwargs):
        if next(steps) == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    whole = train("whole")
    with monkeypatch.context() as patch:
        patch.setattr(PrefixTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train("cut")
    again = train("cut")
    assert all(torch.equal(array, again[key]) for key, array in whole.items())
    how = [
        "--mode=data2text",
        "--split=test",
        f"--checkpoint={tmp_path / 'whole'}",
        f"--data_file={file}",
        "--length=8",
    ]
    run_generation.main([*how, "--num_beams=3", "--disable_tqdm=yes"])
    written = (tmp_path / "whole" / "whole_test_beam").read_text().split("\n")[:-1]
    model = load(tmp_path / "whole")
    assert model.generate([f"a : {n}" for n in range(8)], num_beams=3, max_new_tokens=8) == written
    export.main([str(tmp_path / "whole"), "--to", "kv", "--output_dir", str(tmp_path / "kv")])
    arrays = load_file(tmp_path / "kv" / "keys_values.safetensors")
    for n, (keys, values) in enumerate(model.past([]).layers):
        assert torch.equal(arrays[f"decoder.self.layer_{n}.key"], keys[0])
        assert torch.equal(arrays[f"decoder.self.layer_{n}.value"], values[0])
    assert n == 1
    if name == "gemma4":  # layers of their own shapes
        for form in ("peft", "cache"):
            with pytest.raises(
                UserError, match=f"--to {form} cannot hold .*: its layers differ in their heads; use --"
            ):
                export.main([str(tmp_path / "whole"), "--to", form])
    if name == "deepseek_v3":
        with pytest.raises(UserError, match="--to peft cannot hold .*: its values have other heads than its keys; us"):
            export.main([str(tmp_path / "whole"), "--to", "peft"])
        moved = str((tmp_path / "base").rename(tmp_path / "moved"))
        export.main([str(tmp_path / "whole"), "--to", "cache", "--model_name_or_path", moved])
        arrays = load_file(tmp_path / "whole" / "cache" / "cache.safetensors")
        for one, (keys, values) in zip(
            zip(arrays["keys"], arrays["values"], strict=True), model.past([]).layers, strict=True
        ):
            assert torch.equal(one[0], keys)
            assert torch.equal(one[1], values)


def test_adapters_and_top_layers_are_those_of_the_model_that_writes(base):
    ids, layers = torch.tensor([[5, 6, 7, 8]]), base.config.get_text_config().num_hidden_layers
    before = base(ids).logits
    trained = top_layers.train_top(base, 1, embeddings=False)
    base(ids).logits.sum().backward()
    moved = {name for name, parameter in base.named_parameters() if parameter.grad is not None}
    assert moved == set(trained)
    adapters.insert(base, 1, 3)
    assert sum(name.endswith("adapter_block.up.weight") for name, _ in base.named_parameters()) == layers
    assert not torch.equal(base(ids).logits, before)


def test_a_text_start_through_an_mlp_comes_near(base):
    losses = start_from_text((model := make(base)).prefix, Given(base, [3, 1, 4]))
    assert len(losses) == 500
    assert losses[-1] < losses[0]
    states = [states for layer in key_values(base, input_ids=torch.tensor([[3, 1, 4]])) for states in layer]
    assert sum(one.shape[1] * one.shape[3] for one in states) == model.prefix.flat().shape[1]


def test_the_window_of_attention_is_the_limit_of_positions():
    config = FAMILIES["mistral window"]
    assert max_positions(config) == 40
    with pytest.raises(UserError, match="--preseqlen 39: the model has 40 positions; take 1 to 38"):
        PrefixConfig.for_model(without_weights(config), preseqlen=39, mid_dim=8, **SETTINGS)
    with pytest.raises(UserError, match="does not fit a mistral model, whose attention reaches only 40 tokens back"):
        PrefixConfig.for_model(without_weights(config), preseqlen=3, mid_dim=8, **{**SETTINGS, "format_mode": "infix"})
    assert max_positions(Qwen2Config(**GROUPED, sliding_window=40, use_sliding_window=False)) == 64


SHAPES = {  # (H, D) of every layer's keys, and of its values where they are others
    "falcon": ((2, 1, 4, 16), None),
    "deepseek_v2": ((2, 1, 8, 16), [[1, 8, 1, 2]] * 2),
    "deepseek_v3": ((2, 1, 8, 16), [[1, 8, 1, 2]] * 2),
    "minicpm3": ((2, 1, 8, 16), [[1, 8, 1, 2]] * 2),
    "youtu": ((2, 1, 8, 16), [[1, 8, 1, 2]] * 2),
    "mimo_v2_flash": ((2, 4, 6, 16), [[4, 6, 4, 4], [2, 6, 2, 4]]),
    "gemma4": ((2, 2, 4, 16), [[2, 4], [1, 8]]),
    "llama": ((2, 2, 4, 16), None),
    "opt narrow": ((2, 2, 8, 8), None),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_read_off_the_model(name):
    """Whatever its config.json says of heads; without weights as with them."""
    sizes, head_shapes = SHAPES[name]
    expected = {
        **dict(zip(("n_layer", "n_head", "head_dim", "n_embd"), sizes, strict=True)),
        "head_shapes": head_shapes,
    }
    assert shape_of(random_model(FAMILIES[name])) == expected
    before = FAMILIES[name].to_dict()
    assert shape_of(without_weights(FAMILIES[name])) == expected
    assert FAMILIES[name].to_dict() == before  # or a model that is made of it later would have another precision


@pytest.mark.parametrize("name", ["falcon", "deepseek_v3", "mimo_v2_flash"])
def test_prefixes_of_several_lengths_share_a_batch(name):
    base, rule = random_model(FAMILIES[name]), DecodingRule(eos_token_id=49, max_new_tokens=6, num_beams=3)
    pasts = [Model(make(base, "shallow", preseqlen=length), None).past([]) for length in (3, 5)]
    prompts = [example.prompt for example in EXAMPLES[:2]]

    def mixed(members):
        layers = [attention.pad_prefixes([pasts[n].layers[layer] for n in members]) for layer in range(2)]
        return Past([(layer.keys, layer.values) for layer in layers], layers[0].visible)

    together = decode(base, prompts, rule, past=mixed, progress=False)
    for prompt, past, found in zip(prompts, pasts, together, strict=True):
        assert decode(base, [prompt], rule, layers=past.layers, progress=False)[0].tokens == found.tokens


def test_checkpointing_is_refused_where_the_attention_changes_what_it_keeps():
    why = "attention changes the keys and values that it keeps"
    for config in (*(FAMILIES[name] for name in LATENT_KINDS), DogeConfig(**GROUPED, **SPECIAL)):
        model = make(random_model(config))
        with pytest.raises(UserError, match=f"--gradient_checkpointing yes .* not for a {config.model_type} mo.*{why}"):
            PrefixLM(model.base, model.prefix, checkpointing=True)


def test_models_without_keys_and_values_are_refused():
    config = MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4)
    config.num_attention_heads, config.max_position_embeddings = 2, 64
    base = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UserError, match="a mamba model takes no prefix"):
        make(base)
    for config, why in UNSTEERED:
        with pytest.raises(UserError, match=f"a {config.model_type} model takes no prefix of keys and values: .*{why}"):
            PrefixConfig.for_model(SimpleNamespace(config=config), preseqlen=3, mid_dim=8, **SETTINGS)
        with pytest.raises(
            UserError, match=f"a {config.model_type} model is not supported: .*{why}"
        ):  # to be tuned itself
            check_rows(SimpleNamespace(config=config))
    assert max_positions(UNSHARED["gpt_neo"]) == 40
    for kind, config in UNSHARED.items():
        with pytest.raises(UserError, match=f"a {kind} model is not supported: texts cannot share a row in it"):
            check_rows(random_model(config))
    with pytest.raises(UserError, match="a gpt_neo model is not supported: texts cannot share a row in it"):
        make(random_model(UNSHARED["gpt_neo"]))
    model = make(random_model(FAMILIES["gptj"]))
    with pytest.raises(UserError, match="--gradient_checkpointing yes with a prefix: not for a gptj model"):
        PrefixLM(model.base, model.prefix, checkpointing=True)
    model = make(random_model(FAMILIES["gemma4"]))
    with pytest.raises(UserError, match="--gradient_checkpointing yes with a prefix: not for a gemma4_text model"):
        PrefixLM(model.base, model.prefix, checkpointing=True)
    model = make(model.base, "embedding")
    with pytest.raises(UserError, match="a gemma4_text model reads the words' ids in every layer: --prefix_mode emb"):
        model(torch.tensor([[5, 6]]))
    with pytest.raises(UserError, match="a bloom model does not say how many positions it has"):
        max_positions(BloomConfig(n_layer=1, hidden_size=8, n_head=2))
