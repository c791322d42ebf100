"""Data of the encoder-decoder tree: batches and their order, what the tokenizer adds, tables, ROUGE, decoding rules."""

import json
import shutil

import pytest
from transformers import AutoTokenizer, BartConfig

from prefixlib.data.tasks import SEQ2SEQ_MODES, find_task
from prefixlib.metrics import rouge
from prefixlib.system.errors import UserError
from seq2seq import decoding
from seq2seq.flags import Settings
from seq2seq.utils import Collator, EpochBatches, Example, load_examples, source_lengths
from tests.seq2seq_tiny import make_bart, make_summaries

BOS, PAD, EOS = 0, 1, 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(make_bart(tmp_path_factory.mktemp("bart") / "model"))


def collate(tokenizer, examples, source=20, target=8):
    return Collator(tokenizer, PAD, EOS, source, target)(examples)


def test_labels_and_decoder_input(tokenizer):
    """The decoder reads `</s> <s> w1 …` and predicts `<s> w1 … </s>`: the original's wrapped shift."""
    batch = collate(tokenizer, [Example("ab", ("xy",)), Example("abcd", ("x",))])
    a, b, c, d, x, y = tokenizer("abcdxy", add_special_tokens=False)["input_ids"]
    assert batch["input_ids"].tolist() == [[BOS, a, b, EOS, PAD, PAD], [BOS, a, b, c, d, EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert batch["labels"].tolist() == [[BOS, x, y, EOS], [BOS, x, EOS, PAD]]
    assert batch["decoder_input_ids"].tolist() == [[EOS, BOS, x, y], [EOS, BOS, x, EOS]]


def test_cut_texts_keep_their_end_and_are_counted(tokenizer):
    batch = collate(tokenizer, [Example("a" * 50, ("x" * 50,)), Example("a", ("x",)), Example("a" * 18, ("x" * 6,))])
    assert batch["input_ids"].shape == (3, 20)
    assert batch["labels"].shape == (3, 8)
    assert batch["input_ids"][0, -1] == batch["labels"][0, -1] == EOS
    assert batch["cut"] == 1


def test_fillers_count_for_nothing(tokenizer):
    batch = collate(tokenizer, [Example("ab", ("xy",)), Example("ab", ("xy",), filler=True)])
    assert batch["labels"][1].tolist() == [PAD] * 4
    assert batch["references"] == [["xy"], None]


def test_every_epoch_has_every_example_once_in_its_own_order():
    batches = EpochBatches(size=23, batch=4, seed=7)
    orders = []
    for epoch in range(3):
        batches.epoch = epoch
        orders.append([index for batch in batches for index in batch])
        assert sorted(orders[-1]) == list(range(23))
    assert len({tuple(order) for order in orders}) == 3
    assert len(batches) == 6
    batches.epoch, batches.skip = 1, 4
    assert [index for batch in batches for index in batch] == orders[1][16:]
    batches.epoch = 1
    assert [index for batch in batches for index in batch] == orders[1]  # the place counts once


def epochs_by_length(lengths, batch=4, **place):
    batches, found = EpochBatches(len(lengths), batch, seed=7, lengths=lengths, **place), []
    for epoch in range(3):
        batches.epoch = epoch
        found.append(list(batches))
    return found


def test_batches_by_length_hold_everything_once_in_an_order_of_their_own():
    lengths = [(n * 37) % 100 for n in range(503)]
    epochs = epochs_by_length(lengths)
    assert epochs == epochs_by_length(lengths)
    for batches in epochs:
        assert [len(batch) for batch in batches] == [4] * 125 + [3]
        assert sorted(index for batch in batches for index in batch) == list(range(503))
    assert len({str(batches) for batches in epochs}) == 3
    means = [sum(lengths[index] for index in batch) for batch in epochs[0]]
    assert means != sorted(means)  # short and long ones in turn, not one after the other
    again = EpochBatches(503, 4, seed=7, lengths=lengths)
    again.epoch, again.skip = 2, 100
    assert list(again) == epochs[2][100:]
    parts = [epochs_by_length(lengths, rank=rank, world=2)[1] for rank in (0, 1)]
    for batch, one, two in zip(epochs[1], *parts, strict=True):
        assert sorted(one + two) == sorted(batch)


def test_batches_by_length_are_padded_less():
    """Nine short texts to a long one: padding falls from most of what is computed to next to none."""
    lengths = [100 if n % 10 == 0 else 10 for n in range(800)]

    def computed(batches):
        return sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)

    assert computed(epochs_by_length(lengths)[0]) < 1.1 * sum(lengths)
    assert computed(EpochBatches(800, 4, seed=7)) > 2 * sum(lengths)


def test_lengths_of_sources_are_known_without_reading_them(tmp_path):
    path = make_summaries(tmp_path / "xsum") / "train.source"
    examples = load_examples("xsum", "train", path, first=7)
    assert source_lengths(examples) == [len(line) + 1 for line in path.read_text().split("\n")[:7]]  # with the newline
    assert source_lengths([Example("ab", ("x",)), Example("abcd", ("x",))]) == [2, 4]


def test_processes_share_the_global_batches():
    whole = list(EpochBatches(size=21, batch=4, seed=7))
    parts = [list(EpochBatches(size=21, batch=4, seed=7, rank=rank, world=2)) for rank in (0, 1)]
    assert len(whole) == len(parts[0]) == len(parts[1]) == 6
    for batch, one, two in zip(whole, *parts, strict=True):
        assert sorted(index for index in one + two if index >= 0) == sorted(batch)
    assert parts[1][-1] == [~whole[-1][0]]  # nothing left for the second: a filler


def test_webnlg_goes_through_the_readers(tmp_path):
    """Training: pairs marked good; validation: distinct inputs with all their references."""
    entry = {
        "category": "Airport",
        "lexicalisations": [{"lex": "One.", "comment": "good"}, {"lex": "Two.", "comment": "toFix"}],
        "modifiedtripleset": [{"subject": "A", "property": "is", "object": "B"}],
    }
    (tmp_path / "webnlg_challenge_2017").mkdir()
    for name in ("train", "dev"):
        (tmp_path / "webnlg_challenge_2017" / f"{name}.json").write_text(json.dumps({"entries": [{"1": entry}]}))
    train = load_examples("webnlg", "train", Settings(mode="webnlg", data_dir=str(tmp_path)).file("train"))
    assert train == [Example("| A : is : B", ("One.",), "Airport")]
    dev = load_examples("webnlg", "valid", Settings(mode="webnlg", data_dir=str(tmp_path)).file("valid"))
    assert dev == [Example("| A : is : B", ("One.", "Two."), "Airport")]


def test_summaries_are_found_and_read(tmp_path):
    data = make_summaries(tmp_path / "xsum")
    assert Settings(mode="xsum", data_dir=str(data)).file("valid") == data / "val.source"
    assert Settings(mode="xsum", data_dir=str(tmp_path)).file("valid") == data / "val.source"
    own = Settings(mode="xsum", data_dir=str(data), test_file=str(data / "my.source"))
    assert own.file("test") == data / "my.source"
    examples = load_examples("xsum", "train", data / "train.source")
    assert len(examples) == 23
    assert examples[4] == Example("the hen sat and so on.", ("hen sat",))
    assert len(load_examples("xsum", "train", data / "train.source", first=7)) == 7
    with pytest.raises(UserError, match="expected a file ending in 'source'"):
        load_examples("xsum", "train", data / "train.target")


@pytest.mark.parametrize(("name", "counts"), [("xsum", (2000, 250, 250)), ("cnn_dm", (300, 50, 50))])
def test_real_summaries(data_dir, name, counts):
    settings = Settings(mode=name, data_dir=str(data_dir))
    found = [len(load_examples(name, split, settings.file(split))) for split in ("train", "valid", "test")]
    assert tuple(found) == counts


def test_real_vocabulary(data_dir, tmp_path):
    """No space in front of the first word (the original's choice), 1024 tokens at most, special tokens included."""
    folder = tmp_path / "bart"
    shutil.copytree(data_dir / "tokenizers" / "bart", folder)
    BartConfig().save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = Collator(tokenizer, PAD, EOS, 1024, 60)([Example("Hello world", ("Hello world " * 90,))])
    assert batch["input_ids"].tolist() == [[0, 31414, 232, 2]]
    assert batch["labels"].shape == (1, 60)
    assert decoding.to_text(tokenizer, [0, 31414, 232, 479, 2]) == "Hello world."  # " ." is closed up


def test_rouge_of_the_corpus_and_the_original_s_average():
    """By hand: F1 of unigrams 1, 0 and 2/3; batches of two, so the last counts double in the original's average."""
    hypotheses, references = ["a cat", "dogs", "red hen"], ["a cat", "owl", "hen"]
    scores = [rouge.sentence_scores(h, [r])["rouge1"] for h, r in zip(hypotheses, references, strict=True)]
    assert scores == pytest.approx([100, 0, 200 / 3])
    assert rouge.original_way(hypotheses, references, 2)["rouge1"] == pytest.approx((50 + 200 / 3) / 2)
    assert rouge.sentence_scores("red hen", ["owl", "red hen"])["rouge2"] == 100
    # sentences in another order: summary-level ROUGE-L still finds both
    swapped = rouge.rouge_lsum(["It rained. We slept."], [["We slept. It rained."]])
    assert swapped == pytest.approx(100)
    assert rouge.rouge_lsum(["Cats dream. Birds sing."], [["birds sing cats dream"]]) == pytest.approx(100)
    assert rouge.sentence_scores("It rained. We slept.", ["We slept. It rained."])["rougeL"] == pytest.approx(50)


def rule_for(mode, **changes):
    settings = Settings(mode=mode, **changes)
    settings.check()
    return decoding.decoding_rule(settings.search(), None, BartConfig(max_position_embeddings=1024), find_task(mode))


def test_decoding_rules_of_the_modes():
    """Lengths count the start token: max_length 62 leaves 61 tokens to generate."""
    rules = {mode: rule_for(mode) for mode in SEQ2SEQ_MODES}
    assert len(rules) == 8
    shown = {
        mode: (r.num_beams, r.min_length, r.max_new_tokens, r.no_repeat_ngram_size, r.early_stopping, r.length_penalty)
        for mode, r in rules.items()
    }
    assert shown["xsum"] == shown["xsum_news"] == shown["xsum_news_sport"] == (6, 11, 61, 3, True, 1.0)
    assert shown["cnn_dm"] == (4, 56, 141, 3, True, 2.0)
    assert shown["e2e"] == shown["webnlg"] == shown["triples"] == shown["text"] == (5, 0, 141, 0, False, 1.0)
    assert all(rule.eos_token_id == rule.forced_last_token_id == EOS for rule in rules.values())
    changed = rule_for(
        "xsum", length_pen=0.8, early_stopping=False, num_beams=2, no_repeat_ngram_size=0, force_bos=True
    )
    assert (changed.length_penalty, changed.early_stopping, changed.num_beams) == (0.8, False, 2)
    assert (changed.no_repeat_ngram_size, changed.forced_first_token_id) == (0, BOS)
    with pytest.raises(UserError, match="--max_length 20: at least --min_length 30"):
        rule_for("xsum", max_length=20, min_length=30)
