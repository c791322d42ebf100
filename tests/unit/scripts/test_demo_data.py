"""The files under data/demo: made again from the seed they are the same; what is held out is; the models have read."""

import itertools
import json
import math
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from demos.text import SEEN, UNSEEN, documents
from prefixlib.data.tasks import data_file, read_records, training_text

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "data" / "demo"
SETS = (
    "webnlg_challenge_2017/train.json",
    "webnlg_challenge_2017/dev.json",
    "webnlg_challenge_2017/test.json",
    "e2e_data/src1_train.txt",
    "e2e_data/src1_valid.txt",
    "e2e_data/src1_test.txt",
    "dart/dart-v1.1.1-full-train.json",
    "dart/dart-v1.1.1-full-dev.json",
    "dart/dart-v1.1.1-full-test.json",
    *(f"IMDB/{split}.txt" for split in ("train", "dev", "test")),
    *(f"AG-news/{split}1.tsv" for split in ("train", "dev", "test")),
    *(f"writingPrompts/{split}_small.txt" for split in ("train", "valid", "test")),
    *(f"cnn_dm/{split}.{kind}" for split in ("train", "val", "test") for kind in ("source", "target")),
)
SUMMARIES = tuple(f"xsum/{split}.{kind}" for split in ("train", "val", "test") for kind in ("source", "target"))
TASK_SETS = SETS[9:]


def documents_of(split):
    return [tuple((DEMO / "xsum" / f"{split}.{kind}").read_text().splitlines()) for kind in ("source", "target")]


def webnlg_entries(split):
    entries = json.loads((DEMO / "webnlg_challenge_2017" / f"{split}.json").read_text(encoding="utf-8"))["entries"]
    return [entry[str(number)] for number, entry in enumerate(entries, 1)]


def webnlg_sources(split):
    return [
        tuple((t["subject"], t["property"], t["object"]) for t in e["modifiedtripleset"]) for e in webnlg_entries(split)
    ]


def e2e_sources(split):
    lines = (DEMO / "e2e_data" / f"src1_{split}.txt").read_text(encoding="utf-8").splitlines()
    assert all(len(line.split("||")) == 2 and line.endswith(" . ") for line in lines)
    return [line.split("||")[0] for line in lines]


def dart_sources(split):
    entries = json.loads((DEMO / "dart" / f"dart-v1.1.1-full-{split}.json").read_text(encoding="utf-8"))
    return [tuple(map(tuple, entry["tripleset"])) for entry in entries]


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "scripts/build_demo.py", "gpt2", "--sets_only", "yes", "--output_dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


def test_sets_made_again_are_the_committed_ones(rebuilt):
    assert sorted(str(p.relative_to(rebuilt)) for p in rebuilt.rglob("*") if p.is_file()) == sorted(SETS)
    for name in SETS:
        assert (rebuilt / name).read_bytes() == (DEMO / name).read_bytes(), name


def test_another_seed_makes_other_sets(tmp_path):
    command = [sys.executable, "scripts/build_demo.py", "gpt2", "--sets_only", "yes", "--seed", "2"]
    subprocess.run([*command, "--output_dir", str(tmp_path)], cwd=ROOT, check=True)
    assert (tmp_path / SETS[0]).read_bytes() != (DEMO / SETS[0]).read_bytes()


def test_unseen_domains_are_in_the_test_file_alone():
    seen, unseen = {d.category for d in SEEN}, {d.category for d in UNSEEN}
    categories = {split: {entry["category"] for entry in webnlg_entries(split)} for split in ("train", "dev", "test")}
    assert categories == {"train": seen, "dev": seen, "test": seen | unseen}
    assert (len(seen), len(unseen)) == (8, 3)


def test_counts():
    counts = {split: len(webnlg_entries(split)) for split in ("train", "dev", "test")}
    assert counts == {"train": 320, "dev": 48, "test": 98}
    assert [len(set(e2e_sources(split))) for split in ("train", "valid", "test")] == [200, 40, 60]
    assert [len(dart_sources(split)) for split in ("train", "dev", "test")] == [120, 30, 40]


@pytest.mark.parametrize(
    ("sources", "splits"),
    [
        (webnlg_sources, ("train", "dev", "test")),
        (e2e_sources, ("train", "valid", "test")),
        (dart_sources, ("train", "dev", "test")),
    ],
)
def test_no_source_is_in_two_splits(sources, splits):
    for one, other in itertools.combinations(splits, 2):
        assert not set(sources(one)) & set(sources(other))


TASK_COUNTS = {  # mode -> lines of train, valid and test
    "sentiment": (220, 40, 60),
    "classify-topic": (320, 40, 80),
    "writingPrompts": (60, 8, 8),
    "cnndm": (50, 6, 8),
}


@pytest.mark.parametrize("mode", TASK_COUNTS)
def test_sets_of_the_other_tasks(mode):
    """Counts; no line in two splits; texts fit 256 positions beside a prefix of 20 and 100 new tokens."""
    records = {split: read_records(mode, data_file(mode, split, DEMO)) for split in ("train", "valid", "test")}
    assert tuple(map(len, records.values())) == TASK_COUNTS[mode]
    for one, other in itertools.combinations(records.values(), 2):
        assert not {(r.source, r.target) for r in one} & {(r.source, r.target) for r in other}
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "gpt2", local_files_only=True)
    for record in itertools.chain(*records.values()):
        prompt, continuation = training_text(mode, record.source, record.target, "<|endoftext|>")
        assert len(tokenizer(prompt)["input_ids"]) <= 256 - 20 - 100
        assert len(tokenizer(prompt + continuation)["input_ids"]) <= 256 - 20


def test_labels_are_balanced():
    for mode, labels in (
        ("classify-sentiment", {"positive", "negative"}),
        ("classify-topic", {"airport", "band", "book", "bridge", "club", "film", "mountain", "river"}),
    ):
        for split in ("train", "valid", "test"):
            counts = Counter(r.target.strip() for r in read_records(mode, data_file(mode, split, DEMO)))
            assert counts.keys() == labels
            assert len(set(counts.values())) == 1


def test_several_references_per_source():
    assert all(len(entry["lexicalisations"]) > 1 for entry in webnlg_entries("test")[:56:8] if entry["size"] == "4")
    assert sum(len(entry["lexicalisations"]) for entry in webnlg_entries("test")) >= 2 * 98


def test_sizes():
    model = sum(p.stat().st_size for p in (DEMO / "gpt2").iterdir())
    assert 1e6 < model <= 6e6
    assert sum((DEMO / name).stat().st_size for name in SETS) <= 1.15e6
    assert sum((DEMO / name).stat().st_size for name in TASK_SETS) <= 150e3


def test_gpt2_has_read_such_text():
    """Nats per token on unread documents: far below the uniform distribution's ln(vocabulary)."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "gpt2", local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(DEMO / "gpt2", local_files_only=True)
    assert model.dtype == torch.float32
    assert {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id} == {len(tokenizer) - 1}
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token is None
    unread = tokenizer.eos_token.join(itertools.islice(documents(random.Random("unread")), 60))
    ids = torch.tensor(tokenizer(unread)["input_ids"])
    ids = ids[: len(ids) // 128 * 128].view(-1, 128)
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert loss < 0.35 * math.log(len(tokenizer))


@pytest.fixture(scope="module")
def bart():
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "bart", local_files_only=True)
    return tokenizer, AutoModelForSeq2SeqLM.from_pretrained(DEMO / "bart", local_files_only=True).eval()


def test_summaries_made_again_are_the_committed_ones(tmp_path):
    command = [sys.executable, "scripts/build_demo.py", "bart", "--sets_only", "yes", "--output_dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(SUMMARIES)
    for name in SUMMARIES:
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes(), name


def test_summaries():
    """600, 50 and 80 documents, none in two splits; each with a summary of its own."""
    splits = {split: documents_of(split) for split in ("train", "val", "test")}
    assert {split: [len(part) for part in both] for split, both in splits.items()} == {
        "train": [600, 600],
        "val": [50, 50],
        "test": [80, 80],
    }
    for one, other in itertools.combinations(splits.values(), 2):
        assert not set(one[0]) & set(other[0])
    assert sum((DEMO / name).stat().st_size for name in SUMMARIES) <= 4e5


def test_bart_has_read_such_text(bart):
    """It repairs unread articles: nats per token far below the uniform distribution's ln(vocabulary)."""
    tokenizer, model = bart
    assert model.dtype == torch.float32
    assert 1e6 < sum(p.stat().st_size for p in (DEMO / "bart").iterdir()) <= 8e6
    special = (
        tokenizer.bos_token_id,
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
        model.config.decoder_start_token_id,
    )
    assert special == (0, 1, 2, 2)
    articles = list(documents_of("test")[0])[:20]
    noisy = [text.replace(" was ", " <mask> ", 1) for text in articles]
    inputs = tokenizer(noisy, padding=True, return_tensors="pt")
    labels = tokenizer(articles, padding=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = model(**inputs, labels=labels.masked_fill(labels == tokenizer.pad_token_id, -100)).loss.item()
    assert loss < 0.1 * math.log(len(tokenizer))


def test_bart_copies_but_does_not_summarise(bart):
    """Without a prefix it gives the article back; what a prefix changes is seen in the demo's table."""
    tokenizer, model = bart
    source, target = (part[0] for part in documents_of("test"))
    ids = model.generate(**tokenizer(source, return_tensors="pt"), max_length=160, num_beams=1, do_sample=False)
    output = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert output.split()[:8] == source.split()[:8]
    assert target not in output


@pytest.mark.parametrize("text", ["\n", " ", "Zürich – 北京 \t{}", "a\n\nb", " The Old_Name : runwayLength : 2750"])
def test_any_text_survives_the_tokenizer(text):
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "gpt2", local_files_only=True)
    assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text
    assert len(tokenizer("\n")["input_ids"]) == len(tokenizer(" ")["input_ids"]) == 1
