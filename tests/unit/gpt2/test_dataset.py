"""From records to batches: exact ids, masks, truncation; and the real files' counts."""

import pytest
import torch
from transformers import AutoTokenizer

from gpt2.dataset import Encoded, TableToTextDataset, collate, encode, truncate
from gpt2.decoding import newline_token_ids, to_text
from prefixlib.data.readers import Record
from prefixlib.data.tasks import read_groups, read_records, training_text
from prefixlib.system.errors import UserError
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def gpt2_tokenizer(data_dir):
    return AutoTokenizer.from_pretrained(data_dir / "tokenizers" / "gpt2")


def test_collate_pads_right_and_masks_the_source():
    batch = collate([Encoded([1, 2, 9], [3, 9]), Encoded([4, 9], [5, 6, 7, 9])], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 9, 3, 9, 9], [4, 9, 5, 6, 7, 9]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 3, 9, -100], [-100, -100, 5, 6, 7, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    assert batch["input_ids"].dtype == torch.long


@pytest.mark.parametrize(
    ("max_length", "prompt", "continuation"),
    [
        (20, [*range(10), 99], [1, 2, 3, 4, 5, 99]),  # 17 tokens fit
        (14, [*range(10), 99], [1, 2, 3]),  # the target's end goes first
        (12, [*range(8), 99], [1, 2, 3]),  # then the source's, the separator stays
        (4, [0, 1, 99], [1]),
    ],
)
def test_truncation_never_cuts_the_separator(max_length, prompt, continuation):
    cut = truncate(Encoded([*range(10), 99], [1, 2, 3, 4, 5, 99]), max_length)
    assert cut == Encoded(prompt, continuation)
    assert len(cut) <= max_length


def test_dataset_skips_texts_not_meant_for_training_and_counts_what_it_cuts(gpt2_tokenizer, caplog):
    records = [
        Record(" | a : b : c", "A text.", True, ("b",), "X"),
        Record(" | a : b : c", "A bad text.", False, ("b",), "X"),
        Record(" | d : e : f", "word " * 50, True, ("e",), "X"),
    ]
    dataset = TableToTextDataset("webnlg", records, gpt2_tokenizer, max_length=20)
    assert len(dataset) == 2
    assert len(dataset[1]) == 20
    assert "1 of 2 examples cut to 20 tokens" in caplog.text
    with pytest.raises(UserError, match="no text to train on among 1 records"):
        TableToTextDataset("webnlg", records[1:2], gpt2_tokenizer, max_length=20)


def test_token_ids_of_the_template(gpt2_tokenizer):
    """Single spaces are tokens (220) on both sides of the separator; WebNLG starts with two spaces and a bar."""
    prompt, continuation = training_text("webnlg", " | A : b : C", "Text.", "<|endoftext|>")
    ids = encode(gpt2_tokenizer, [prompt, continuation])
    assert ids == [[220, 930, 317, 1058, 275, 1058, 327, 220, 50256], [8255, 13, 220, 50256]]


def test_newline_tokens_of_the_real_vocabulary(gpt2_tokenizer):
    assert newline_token_ids(gpt2_tokenizer) == (198, 628)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        (" It does n't cost 5 , does it ?", "It doesn't cost 5, does it?"),
        (" The Mill 's food , they 've said .", "The Mill's food, they've said."),
        (" rest<|endoftext|> more", "rest"),
        (" two\nlines", "two lines"),
        (" <|endoftext|>", "Error"),
    ],
)
def test_output_text_is_cleaned_as_the_original_did(gpt2_tokenizer, text, cleaned):
    assert to_text(gpt2_tokenizer, gpt2_tokenizer(text)["input_ids"]) == cleaned


@pytest.mark.parametrize(
    ("mode", "name", "examples", "sources", "tokens", "longest"),
    [
        ("webnlg", "webnlg_challenge_2017/train.json", 18025, 6893, 1_447_244, 261),
        ("webnlg", "webnlg_challenge_2017/dev.json", 2258, 871, 186_665, 260),
        ("data2text", "e2e_data/src1_train.txt", 42061, 4862, 2_369_208, 118),
        ("data2text", "e2e_data/src1_valid.txt", 4672, 547, 290_386, 128),
        ("triples", "dart/dart-v1.1.1-full-dev.json", 6980, 2721, 497_027, 230),
    ],
)
def test_real_files(data_dir, gpt2_tokenizer, mode, name, examples, sources, tokens, longest):
    path = data_dir / name
    dataset = TableToTextDataset(mode, read_records(mode, path), gpt2_tokenizer, max_length=1019)
    assert len(dataset) == examples
    assert len(read_groups(mode, path)) == sources
    assert dataset.tokens_cut == 0
    assert sum(map(len, dataset.examples)) == tokens
    assert max(map(len, dataset.examples)) == longest


def test_demo_files_are_read():
    for mode, name in (("webnlg", "webnlg_challenge_2017/dev.json"), ("data2text", "e2e_data/src1_valid.txt")):
        assert len(read_groups(mode, ROOT / "data" / "demo" / name)) > 10
