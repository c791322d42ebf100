"""Task modes: part limits, what is decoded for each, the output files, accuracy and distinct-n by hand."""

import pytest
from transformers import AutoTokenizer

from gpt2 import run_generation
from gpt2.dataset import TableToTextDataset
from gpt2.flags import Decoding, Settings
from gpt2.model import Model
from gpt2.prefix_lm import PrefixLM
from gpt2.run_generation import Prompts, make_prompts, write_inputs
from prefixlib.data.readers import Group, Record
from prefixlib.data.tasks import GPT2_MODES, SENTIMENT_OPENINGS, TOPIC_OPENINGS, find_task, read_groups, read_openings
from prefixlib.metrics import score_task
from prefixlib.metrics.distinct import distinct
from prefixlib.system.errors import UserError
from tests.conftest import ROOT

DEMO = ROOT / "data" / "demo"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO / "gpt2", local_files_only=True)


def decoding_settings(mode, *more):
    argv = ["--mode", mode, "--split", "test", "--checkpoint", "x", *more]
    return Decoding.from_args(run_generation.make_parser().parse_args(argv))


def test_part_limits_are_the_originals():
    assert {mode: find_task(mode).gpt2.lengths for mode in GPT2_MODES if find_task(mode).gpt2.lengths} == {
        "xsum": {"max_source_length": 512, "train_max_target_length": 60, "val_max_target_length": 60},
        "cnndm": {"max_source_length": 512, "train_max_target_length": 56, "val_max_target_length": 142},
    }
    assert Settings(mode="cnndm").lengths()["max_source_length"] == 512
    assert Model(None, None, {"mode": "cnndm"}).source_limit == 512
    assert Model(None, None, {"mode": "cnndm", "max_source_length": 40}).source_limit == 40
    assert Model(None, None, {"mode": "webnlg"}).source_limit is None


def test_summaries_are_cut_part_by_part(tokenizer):
    """tok(source)[:3] + [eos] + tok(target)[:2] + [eos], no spaces; parts within their limits are whole."""
    source, target = "Silver Harbour opened in 1900.", "It opened."
    records = [Record(source, target, True, (), ""), Record("It", "It", True, (), "")]
    eos = tokenizer.eos_token_id
    first, second = TableToTextDataset("xsum", records, tokenizer, 100, source_limit=3, target_limit=2)
    assert first.prompt == [*tokenizer(source)["input_ids"][:3], eos]
    assert first.continuation == [*tokenizer(target)["input_ids"][:2], eos]
    assert second.prompt == second.continuation == [*tokenizer("It")["input_ids"], eos]
    assert TableToTextDataset("xsum", records, tokenizer, 100).tokens_cut == 0


def test_the_openings_are_pplms():
    assert (len(SENTIMENT_OPENINGS), len(TOPIC_OPENINGS)) == (8, 20)
    assert (SENTIMENT_OPENINGS[:2], TOPIC_OPENINGS[::19]) == (
        ("The book", "The chicken"),
        ("In summary", "In this essay"),
    )
    assert len(set(SENTIMENT_OPENINGS + TOPIC_OPENINGS)) == 28


def test_prompts_are_labels_times_openings(tokenizer, tmp_path):
    """The label with its own trailing space, if any; the separator; a space and the opening."""
    path = tmp_path / "dev.txt"
    path.write_text("positive ||| A .\nnegative|||B .\npositive ||| C .\n")
    openings = tmp_path / "openings"
    openings.write_text("The book\n\nA town\n")
    settings = decoding_settings("sentiment", "--openings", str(openings), "--length", "20")
    prompts = make_prompts(model_of(64, tokenizer), path, settings)
    assert prompts.texts == [
        " negative<|endoftext|> The book",
        " negative<|endoftext|> A town",
        " positive <|endoftext|> The book",
        " positive <|endoftext|> A town",
    ]
    assert [example.prompt for example in prompts.inputs] == [tokenizer(text)["input_ids"] for text in prompts.texts]
    assert prompts.openings == [tokenizer(text)["input_ids"] for text in (" The book", " A town")] * 2
    with pytest.raises(UserError, match=r"the prompt .* has \d+ tokens; at most 4 fit"):
        make_prompts(model_of(24, tokenizer), path, settings)


def model_of(positions, tokenizer):
    """A model whose number of positions is all that matters."""
    from transformers import GPT2Config, GPT2LMHeadModel

    base = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=9, n_positions=positions))
    return Model(PrefixLM(base, None), tokenizer, {"mode": "sentiment"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; one opening a line is expected"),
        (b"\n \n", "no opening in it"),
        (b"\xff", "not UTF-8 text"),
        (b"The book\nThe <|endoftext|>\n", ":2: .* separates label and text"),
    ],
)
def test_a_bad_openings_file_is_one_line(tmp_path, content, message):
    path = tmp_path / "openings"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_openings(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("mode", "strategy", "samples"),
    [
        *((mode, "beam", 1) for mode in ("data2text", "webnlg", "triples", "xsum", "cnndm")),
        *((mode, "greedy", 1) for mode in ("classify-sentiment", "classify-topic")),
        *(("writingPrompts", "nucleus", 1), ("sentiment", "nucleus", 3), ("topic", "nucleus", 3)),
    ],
)
def test_strategies_are_the_originals(mode, strategy, samples):
    assert decoding_settings(mode).strategy_for(mode) == (strategy, samples)
    assert decoding_settings(mode).top_p == 0.8
    assert decoding_settings(mode, "--strategy", "greedy").strategy_for(mode) == ("greedy", 1)


@pytest.mark.parametrize(
    ("mode", "argv", "message"),
    [
        ("webnlg", ["--samples", "2"], "--strategy beam and --samples 2 do not"),
        ("topic", ["--samples", "0"], "--samples 0: must be at least 1"),
        ("topic", ["--num_beams", "3"], "--strategy nucleus and --num_beams do not"),
        ("topic", ["--strategy", "beam", "--top_p", "0.5"], "--strategy beam and --top_p do not"),
        ("webnlg", ["--openings", "x"], "--mode webnlg and --openings do not"),
    ],
)
def test_decoding_flags_without_effect_are_refused(mode, argv, message):
    with pytest.raises(UserError, match=message):
        decoding_settings(mode, *argv).strategy_for(mode)


def test_equal_texts_are_classified_line_by_line(tmp_path):
    path = tmp_path / "test1.tsv"
    path.write_text("world ||a b\nsports||a b\nworld||c\n")
    assert read_groups("classify-topic", path) == [
        Group("a b", ("world",), "", ()),
        Group("a b", ("sports",), "", ()),
        Group("c", ("world",), "", ()),
    ]
    assert [group.source for group in read_groups("topic", path)] == ["world ", "sports", "world"]


def test_output_files(tmp_path):
    """Line breaks become spaces; a blank line ends a source's references, but labels stand alone."""
    groups = [Group("a", ("one\ntwo", "three"), "", ()), Group("b", (), "", ())]
    prompts = Prompts(groups, [" a\nA", " b"], [[1], [2]], [[], []], 0)
    write_inputs(tmp_path / "n", prompts, one_reference=False)
    texts = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert texts == {"n_gold": "one two\nthree\n\n\n", "n_src": " a A\n b\n"}
    labels = Prompts([Group("a", ("world",), "", ())] * 2, [" a", " a"], [[1], [1]], [[], []], 0)
    write_inputs(tmp_path / "c", labels, one_reference=True)
    assert (tmp_path / "c_gold").read_text() == "world\nworld\n"


def test_accuracy_by_hand():
    outputs, references = ["world", " sports", "Business", "Error"], [["world"], ["sports "], ["business"], ["a", "b"]]
    for task in ("classify-topic", "classify-sentiment"):
        assert score_task(task, outputs, references) == {"accuracy": 50.0}


def test_distinct_by_hand():
    """Five of the six words of a b a / c d e differ, and all four pairs, none of which spans two texts."""
    assert distinct(["a b a", "c d e"]) == {"distinct-1": 5 / 6, "distinct-2": 1.0}
    assert distinct(["a b", "a b"]) == {"distinct-1": 0.5, "distinct-2": 0.5}
    assert distinct(["", "a"]) == {"distinct-1": 1.0, "distinct-2": 0.0}
