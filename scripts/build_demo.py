"""python scripts/build_demo.py gpt2 (or bart)  -- makes data/demo/: a small pretrained model and sets to tune it on."""

import itertools
import json
import logging
import random
from dataclasses import dataclass
from pathlib import Path

from demos.articles import corrupt, readings, write_articles
from demos.tasks import write_tasks
from demos.text import RESTAURANT, SEEN, UNSEEN, documents, make_facts, realise
from prefixlib.settings.flags import Parser, add_number
from prefixlib.system.errors import UserError, one_line_errors

EOS, MASK = "<|endoftext|>", "<mask>"
HEAD = 32  # the head size of both models
DEMO = Path(__file__).resolve().parent.parent / "data" / "demo"
log = logging.getLogger("build_demo")


# ---- the sets to tune on ----


def examples(rng, domains, count, references, used):
    """`count` new sources: (domain, name, facts, texts). `used` holds all earlier sources: none is repeated."""
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
    """One entry of the WebNLG 2017 JSON (with plain names, while DBpedia's have underscores)."""
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
    """The gpt2 tree's sets under `folder`. The unseen domains are in WebNLG's test file alone."""
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
    write_tasks(folder, seed)


# ---- the models ----


def gpt2_tokenizer(texts, vocabulary):
    """The end-of-text token comes last, as in GPT-2, and is bos, eos and unk."""
    from transformers import GPT2TokenizerFast

    from demos.model import train_bpe

    bpe = train_bpe(texts, vocabulary, last=[EOS])
    return GPT2TokenizerFast(tokenizer_object=bpe, bos_token=EOS, eos_token=EOS, unk_token=EOS)


def gpt2_batches(tokenizer, rng, steps, batch, length):
    """The documents of `rng`, joined by the end-of-text token and cut into `steps` arrays (batch, length)."""
    import torch

    stream, needed = [], batch * length
    texts = documents(rng)
    for _ in range(steps):
        while len(stream) < needed:
            for ids in tokenizer(list(itertools.islice(texts, 256)))["input_ids"]:
                stream += [*ids, tokenizer.eos_token_id]
        ids = torch.tensor(stream[:needed]).view(batch, length)
        yield {"input_ids": ids, "labels": ids}
        del stream[:needed]


def new_gpt2(tokenizer, args):
    """A GPT-2 whose layer 0 looks back by one token and whose layer 1 copies."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from demos.model import CopyingStart

    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=256, n_embd=args.width, n_layer=4, n_head=args.width // HEAD,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    start = CopyingStart(args.width, HEAD)
    back, match = model.transformer.h[0].attn, model.transformer.h[1].attn
    query, key, value = (slice(i * args.width, i * args.width + HEAD) for i in range(3))  # head 0's columns in c_attn
    with torch.no_grad():
        start.embed(model.transformer.wte.weight, model.transformer.wpe.weight)
        back.c_attn.weight[:, query] = 1.5 * start.position_query
        back.c_attn.weight[:, key] = 1.5 * start.position_key
        back.c_attn.weight[:, value] = start.token
        back.c_proj.weight[:HEAD] = 0.3 * start.before.T
        match.c_attn.weight[:, query] = 2 * start.token
        match.c_attn.weight[:, key] = 2 * start.before
        match.c_attn.weight[:, value] = start.copied
        match.c_proj.weight[:HEAD] = 0.3 * start.copied.T
    return model


def bart_tokenizer(texts, vocabulary):
    """BART's special tokens at BART's places: <s> <pad> </s> <unk> first, <mask> last."""
    from tokenizers import AddedToken, processors
    from transformers import BartTokenizerFast

    from demos.model import train_bpe

    mask = AddedToken(MASK, lstrip=True, special=True)
    bpe = train_bpe(texts, vocabulary, first=["<s>", "<pad>", "</s>", "<unk>"], last=[mask])
    bpe.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=False, add_prefix_space=False
    )
    return BartTokenizerFast(tokenizer_object=bpe, mask_token=mask)


def bart_batches(tokenizer, rng, steps, batch, length):
    """Corrupted texts in, whole texts out, as BART is pretrained; padded, cut at `length`, pads not scored."""
    texts = readings(rng)
    for _ in range(steps):
        whole = list(itertools.islice(texts, batch))
        noisy = [corrupt(rng, sentences, MASK) for sentences in whole]
        options = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
        inputs = tokenizer(noisy, **options)
        labels = tokenizer([" ".join(sentences) for sentences in whole], **options)["input_ids"]
        labels = labels.masked_fill(labels == tokenizer.pad_token_id, -100)
        yield {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}


def new_bart(tokenizer, args):
    """A BART whose first encoder layer looks back by one token and whose first decoder layer copies from there."""
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    from demos.model import CopyingStart

    config = BartConfig(
        vocab_size=len(tokenizer), max_position_embeddings=256, d_model=args.width,
        encoder_layers=2, decoder_layers=2, encoder_ffn_dim=4 * args.width, decoder_ffn_dim=4 * args.width,
        encoder_attention_heads=args.width // HEAD, decoder_attention_heads=args.width // HEAD,
        dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
    )  # fmt: skip
    model = BartForConditionalGeneration(config)
    start = CopyingStart(args.width, HEAD)
    back, match = model.model.encoder.layers[0].self_attn, model.model.decoder.layers[0].encoder_attn
    with torch.no_grad():
        start.embed(model.model.shared.weight, model.model.encoder.embed_positions.weight)
        start.embed(model.model.shared.weight, model.model.decoder.embed_positions.weight)
        back.q_proj.weight[:HEAD] = 1.5 * start.position_query.T
        back.k_proj.weight[:HEAD] = 1.5 * start.position_key.T
        back.v_proj.weight[:HEAD] = start.token.T
        back.out_proj.weight[:, :HEAD] = 1.5 * start.before
        match.q_proj.weight[:HEAD] = 3 * start.token.T
        match.k_proj.weight[:HEAD] = 3 * start.before.T
        match.v_proj.weight[:HEAD] = start.copied.T
        match.out_proj.weight[:, :HEAD] = 1.5 * start.copied
    return model


def build_model(args):
    """Pretrain the part's model and save it under args.output_dir."""
    import torch

    from demos.model import pretrain, save

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    part = PARTS[args.part]
    first_texts = itertools.islice(part.texts(random.Random(f"bpe {args.seed}")), 20000)
    tokenizer = part.tokenizer(list(first_texts), args.vocabulary)
    model = part.model(tokenizer, args)
    log.info("%s with %d parameters, vocabulary %d", args.part, model.num_parameters(), len(tokenizer))
    rng = random.Random(f"text {args.seed}")
    pretrain(model, part.batches(tokenizer, rng, args.steps, args.batch, args.length), args.steps, args.learning_rate)
    save(model, tokenizer, args.output_dir / args.part)


def article_texts(rng):
    return (" ".join(sentences) for sentences in readings(rng))


def write_summaries(folder, seed):
    """The summarisation set under `folder`."""
    write_articles(folder / "xsum", random.Random(f"articles {seed}"), {"train": 600, "val": 50, "test": 80})


@dataclass(frozen=True)
class Part:
    """The part of the demo for one tree, and the length and number of its pretraining steps."""

    sets: object
    texts: object
    tokenizer: object
    model: object
    batches: object
    steps: int
    length: int


PARTS = {
    "gpt2": Part(write_sets, documents, gpt2_tokenizer, new_gpt2, gpt2_batches, steps=2500, length=128),
    "bart": Part(write_summaries, article_texts, bart_tokenizer, new_bart, bart_batches, steps=2000, length=160),
}


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("part", choices=sorted(PARTS))
    add_number(parser, "--seed", low=0, default=1, help="one seed, one set of files")
    parser.add_argument("--output_dir", type=Path, default=DEMO, help="default: data/demo")
    parser.add_argument("--sets_only", choices=("yes", "no"), default="no", help="yes: only the text files, in seconds")
    model = parser.add_argument_group("model and pretraining")
    add_number(model, "--vocabulary", above=0, default=1536, help="tokens, special ones included")
    add_number(model, "--width", above=0, default=128, help=f"hidden size; heads are {HEAD} wide")
    add_number(model, "--steps", above=0, help="optimiser steps (default: 2500 for gpt2, 2000 for bart)")
    add_number(model, "--batch", above=0, default=16, help="rows a step")
    add_number(model, "--length", above=0, help="tokens a row (default: 128 for gpt2, at most 160 for bart)")
    add_number(model, "--learning_rate", float, above=0, default=3e-3, help="peak, after 5 %% of the steps")
    add_number(model, "--threads", above=0, below=1025, default=2, help="the weights depend on it in their last bits")
    args = parser.parse_args(argv)
    if args.width % HEAD or args.width < 4 * HEAD:
        raise UserError(f"--width {args.width}: must be a multiple of {HEAD}, the head size, and at least {4 * HEAD}")
    args.steps = args.steps or PARTS[args.part].steps
    args.length = args.length or PARTS[args.part].length
    return args


def main(argv=None):
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with one_line_errors():
        args = parse_args(argv)
        PARTS[args.part].sets(args.output_dir, args.seed)
        if args.sets_only == "no":
            build_model(args)


if __name__ == "__main__":
    main()
