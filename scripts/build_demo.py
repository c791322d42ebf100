"""python scripts/build_demo.py gpt2   -- makes data/demo/: a small pretrained GPT-2 and sets to tune it on."""

import argparse
import itertools
import json
import logging
import random
from pathlib import Path

from demo_text import RESTAURANT, SEEN, UNSEEN, documents, make_facts, realise

from prefixlib.errors import UserError, one_line_errors

EOS = "<|endoftext|>"
DEMO = Path(__file__).resolve().parent.parent / "data" / "demo"
log = logging.getLogger("build_demo")


# ---- the sets to tune on ----


def examples(rng, domains, count, references, used):
    """`count` new sources: (domain, name, facts, texts). `used` holds all sources so far: none comes twice."""
    made = []
    while len(made) < count:
        domain = domains[len(made) % len(domains)]
        name, facts = make_facts(rng, domain, rng.randint(1, 4))
        source = (name, *((kind.key, value) for kind, value in facts))
        if source in used:
            continue
        used.add(source)
        texts = dict.fromkeys(realise(rng, domain, name, facts) for _ in range(references))
        made.append((domain, name, facts, list(texts)))
    return made


def webnlg_entry(number, example):
    """One entry of the WebNLG 2017 JSON (with plain names, where DBpedia's carry underscores)."""
    domain, name, facts, texts = example
    triples = [{"object": value, "property": kind.key, "subject": name} for kind, value in facts]
    lexicalisations = [{"comment": "good", "lang": "", "lex": t, "xml_id": f"Id{i}"} for i, t in enumerate(texts, 1)]
    return {
        str(number): {
            "category": domain.category,
            "dbpedialinks": [],
            "lexicalisations": lexicalisations,
            "links": [],
            "modifiedtripleset": triples,
            "originaltriplesets": {"originaltripleset": [triples]},
            "shape": "NA",
            "shape_type": "NA",
            "size": str(len(facts)),
            "xml_id": f"Id{number}",
        }
    }


def e2e_lines(example):
    """The lines `name : X | area : Y||sentence . ` of one source, tokenised as in the E2E files."""
    _, name, facts, texts = example
    source = " | ".join([f"name : {name}", *(f"{kind.label} : {value}" for kind, value in facts)])
    return [f"{source}||{text.replace('.', ' .').replace(',', ' ,')} \n" for text in texts]


def dart_entry(example):
    """One entry of the DART JSON: triples with capital relations, and annotations."""
    _, name, facts, texts = example
    return {
        "tripleset": [[name, kind.label.upper().replace(" ", "_"), value] for kind, value in facts],
        "subtree_was_extended": False,
        "annotations": [{"source": "demo", "text": text} for text in texts],
    }


def write_json(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_sets(folder, seed):
    """The three table-to-text sets under `folder`. The unseen domains are in WebNLG's test file alone."""
    rng, used = random.Random(f"sets {seed}"), set()
    webnlg = {
        "train": examples(rng, SEEN, 320, 2, used),
        "dev": examples(rng, SEEN, 48, 3, used),
        "test": examples(rng, SEEN, 56, 3, used) + examples(rng, UNSEEN, 42, 3, used),
    }
    for split, made in webnlg.items():
        entries = [webnlg_entry(number, example) for number, example in enumerate(made, 1)]
        write_json(folder / "webnlg_challenge_2017" / f"{split}.json", {"entries": entries})
    (folder / "e2e_data").mkdir(parents=True, exist_ok=True)
    for split, count, references in (("train", 200, 3), ("valid", 40, 4), ("test", 60, 4)):
        lines = [line for e in examples(rng, [RESTAURANT], count, references, used) for line in e2e_lines(e)]
        (folder / "e2e_data" / f"src1_{split}.txt").write_text("".join(lines), encoding="utf-8")
    for split, count, references in (("train", 120, 2), ("dev", 30, 2), ("test", 40, 3)):
        entries = [dart_entry(e) for e in examples(rng, (*SEEN, RESTAURANT), count, references, used)]
        write_json(folder / "dart" / f"dart-v1.1.1-full-{split}.json", entries)


# ---- the model ----


def train_tokenizer(texts, vocabulary):
    """GPT-2's byte-level BPE over `texts`; the end-of-text token comes last, as in GPT-2, and is bos, eos and unk."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2TokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([EOS])
    return GPT2TokenizerFast(tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, unk_token=EOS)


def wire_copying(model):
    """Start two heads as an induction circuit (Olsson et al. 2022): copying is then learned in minutes, not hours.

    Layer 0, head 0 attends to the previous token, by way of sinusoidal position embeddings, and writes that token's
    code beside the present one; layer 1, head 0 looks for positions whose previous token is the present one and
    copies what stands there. Everything is trained on from there. The scales were found by trial.
    """
    import torch

    size, width = model.config.n_embd // model.config.n_head, model.config.n_embd
    text, position = model.transformer.wte.weight, model.transformer.wpe.weight
    previous, match = model.transformer.h[0].attn, model.transformer.h[1].attn
    rates = torch.logspace(0.45, -2.2, size // 2)
    angles = torch.arange(len(position))[:, None] * rates
    cos, sin = rates.cos().diag(), rates.sin().diag()
    one_back = torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)])  # the codes of t to those of t - 1
    random_axes = torch.linalg.qr(torch.randn(width - size, width - size))[0]
    axes = torch.cat([torch.zeros(size, width - size), random_axes])  # the first `size` dimensions are for positions
    token, before, copied = axes[:, :size], axes[:, size : 2 * size], axes[:, 2 * size : 3 * size]
    queries, keys, values = (slice(i * width, i * width + size) for i in range(3))  # columns of head 0 in c_attn
    with torch.no_grad():
        text[:, :size] = 0
        position.zero_()
        position[:, :size] = 0.15 * torch.cat([angles.sin(), angles.cos()], 1)
        previous.c_attn.weight[:, queries] = 0
        previous.c_attn.weight[:, keys] = 0
        previous.c_attn.weight[:size, queries] = 1.5 * one_back
        previous.c_attn.weight[:size, keys] = 1.5 * torch.eye(size)
        previous.c_attn.weight[:, values] = token
        previous.c_proj.weight[:size] = 0.3 * before.T
        match.c_attn.weight[:, queries] = 2 * token
        match.c_attn.weight[:, keys] = 2 * before
        match.c_attn.weight[:, values] = copied
        match.c_proj.weight[:size] = 0.3 * copied.T


def token_batches(tokenizer, rng, steps, batch, length):
    """The documents of `rng`, joined by the end-of-text token and cut into `steps` arrays (batch, length)."""
    import torch

    stream, needed = [], batch * length
    texts = documents(rng)
    for _ in range(steps):
        while len(stream) < needed:
            for ids in tokenizer(list(itertools.islice(texts, 256)))["input_ids"]:
                stream += [*ids, tokenizer.eos_token_id]
        yield torch.tensor(stream[:needed]).view(batch, length)
        del stream[:needed]


def pretrain(model, batches, steps, learning_rate):
    """Plain next-token training: AdamW, 5 % warm-up, then cosine decay to a tenth."""
    import torch
    from tqdm import tqdm
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    model.train()
    bar = tqdm(batches, total=steps, desc="pretraining", mininterval=5)
    for step, ids in enumerate(bar):
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def build_gpt2(args):
    """Write the sets and the pretrained GPT-2 under args.output_dir."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    write_sets(args.output_dir, args.seed)
    if args.sets_only == "yes":
        return
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(
        list(itertools.islice(documents(random.Random(f"bpe {args.seed}")), 20000)), args.vocabulary
    )
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=256, n_embd=args.width, n_layer=args.layers, n_head=args.width // 32,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    wire_copying(model)
    log.info("GPT-2 with %d parameters, vocabulary %d", model.num_parameters(), len(tokenizer))
    rng = random.Random(f"text {args.seed}")
    pretrain(model, token_batches(tokenizer, rng, args.steps, args.batch, args.length), args.steps, args.learning_rate)
    save_model(model, tokenizer, args.output_dir / "gpt2")


def save_model(model, tokenizer, folder):
    """An HF folder with float16 weights; config.json says float32, so that they are loaded as float32."""
    from safetensors.torch import load_file, save_file

    model.config.dtype = "float32"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json, merges.txt
    weights = folder / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("gpt2",))
    parser.add_argument("--seed", type=int, default=1, help="one seed, one set of files")
    parser.add_argument("--output_dir", type=Path, default=DEMO, help="default: data/demo")
    parser.add_argument("--sets_only", choices=("yes", "no"), default="no", help="yes: only the text files, in seconds")
    model = parser.add_argument_group("model and pretraining")
    model.add_argument("--vocabulary", type=int, default=1536, help="tokens, end of text included")
    model.add_argument("--width", type=int, default=128, help="hidden size; heads are 32 wide")
    model.add_argument("--layers", type=int, default=4)
    model.add_argument("--steps", type=int, default=2500, help="optimiser steps")
    model.add_argument("--batch", type=int, default=16, help="rows a step")
    model.add_argument("--length", type=int, default=128, help="tokens a row")
    model.add_argument("--learning_rate", type=float, default=3e-3)
    model.add_argument("--threads", type=int, default=2, help="the weights depend on it in their last bits")
    args = parser.parse_args(argv)
    if args.width % 32:
        raise UserError(f"--width {args.width}: must be a multiple of 32, the head size")
    return args


def main(argv=None):
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with one_line_errors():
        build_gpt2(parse_args(argv))


if __name__ == "__main__":
    main()
