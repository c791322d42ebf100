"""--mode text in seq2seq/: the same files and flags as in gpt2/, and the same outputs from Python."""

import json
import shutil

import pytest

import seq2seq
from prefixlib.settings.search import Search
from prefixlib.system.errors import UserError
from seq2seq import finetune, run_generation, train_bart
from seq2seq.finetune import parse_args
from seq2seq.lightning_base import SummarizationModule
from tests.cli.test_own_data import PAIRS, USER, read, write
from tests.llama2_tiny import TEMPLATE
from tests.seq2seq_tiny import make_bart


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"q": source, "a": target} for source, target in PAIRS]
    write(folder / "train.jsonl", rows * 3)
    write(folder / "valid.jsonl", rows[:2])
    write(folder / "test.jsonl", [*rows, {"q": "the mill", "a": "another"}, {"q": "nothing\nknown"}])
    make_bart(folder / "bart")
    return folder


def settings(place, output, model="bart", **more):
    brief = {"preseqlen": 3, "mid_dim": 8, "bsz": 4, "max_steps": 3, "learning_rate": 1e-2, "max_new_tokens": 9}
    files = {f"{name}_file": str(place / f"{split}.jsonl") for name, split in (("train", "train"), ("eval", "valid"))}
    where = {"model_name_or_path": str(place / model), "output_dir": str(output)}
    columns = {"mode": "text", "source_column": "q", "target_column": "a", "disable_tqdm": True, "num_workers": 0}
    return seq2seq.Settings(**{**files, **where, **brief, **columns, **more})


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory):
    more = {"test_file": str(place / "test.jsonl"), "source_template": "Say {source}:"}
    return seq2seq.train(settings(place, tmp_path_factory.mktemp("run") / "run", **more))


def test_what_a_run_writes(trained):
    output = trained.output_dir
    rows = read(output / "run_test_beam.jsonl")
    assert [row["source"] for row in rows] == [*(source for source, _ in PAIRS), "nothing\nknown"]
    references = [[PAIRS[0][1], "another"], *([target] for _, target in PAIRS[1:]), []]
    assert [row["references"] for row in rows] == references
    lines = (output / "test_beam_1.0").read_text().split("\n")
    assert lines == [*(row["output"].replace("\n", " ") for row in rows), ""]
    assert list(trained.decoded["test"]) == ["BLEU", "ROUGE-L", "chrF", "exact match"]
    results = json.loads((output / "results.json").read_text())
    assert results["decoding"].keys() == {"test"}
    assert results["run"]["val_metric"] == "loss"
    assert results["training"]["last"].keys() == {"loss", "rouge1", "rouge2", "rougeL", "length", "exact_match"}


def test_python_gives_what_the_command_line_gives(trained, place):
    output, sources = trained.output_dir, [*(source for source, _ in PAIRS), "nothing\nknown"]
    written = [row["output"] for row in read(output / "run_test_beam.jsonl")]
    model = seq2seq.load(output)
    for batch in (1, 2, 10):
        assert model.generate(sources, max_new_tokens=9, batch_size=batch) == written
    assert trained.model.generate(sources, max_new_tokens=9) == written
    words = ["--mode", "text", "--do_train", "no", "--prefix_model_path", str(output), "--max_new_tokens", "9"]
    words += ["--test_file", str(place / "test.jsonl"), "--output_dir", str(output / "again" / "run")]
    for more, name, how in (
        ([], "beam", {}),
        (
            ["--temperature", "1.5", "--top_k", "9", "--seed", "3"],
            "nucleus",
            {"temperature": 1.5, "top_k": 9, "seed": 3},
        ),
        (["--temperature", "0"], "greedy", {"strategy": "greedy"}),
    ):
        command = train_bart.build_command(train_bart.parse_args([*words, *more]))
        run_generation.decode(*parse_args([*command[2:], "--disable_tqdm", "yes"]))
        rows = read(output / "again" / "run" / f"run_test_{name}.jsonl")
        assert [row["output"] for row in rows] == model.generate(sources, max_new_tokens=9, **how)


def test_the_template_is_what_the_model_reads(trained):
    model = trained.model
    (ids,) = model.encode(["the mill"], Search())
    assert ids == model.tokenizer("Say the mill:")["input_ids"]


def test_line_breaks_are_learnt(place, tmp_path):
    """They are neither stripped nor turned into spaces on the way in and out."""
    make_bart(tmp_path / "still", dropout=0.0, attention_dropout=0.0, d_model=32)
    more = {"tuning_mode": "finetune", "mid_dim": 512, "max_steps": 100, "epoch": 100, "learning_rate": 2e-2}
    more |= {
        "max_new_tokens": 40,
        "eval_steps": 100,
        "logging_steps": 100,
        "model_name_or_path": str(tmp_path / "still"),
    }
    write(tmp_path / "two.jsonl", [{"q": "a", "a": " x\n\ny\n"}, {"q": "b", "a": "\tz|| "}])
    files = {"train_file": str(tmp_path / "two.jsonl"), "eval_file": str(tmp_path / "two.jsonl")}
    result = seq2seq.train(settings(place, tmp_path / "run", **files, **more))
    assert [row["output"] for row in read(tmp_path / "run" / "run_valid_beam.jsonl")] == [" x\n\ny\n", "\tz|| "]
    assert result.decoded["valid"]["exact match"] == 100
    validated = json.loads((tmp_path / "run" / "results.json").read_text())["training"]["last"]
    assert validated["exact_match"] == 100  # line breaks are part of the texts in validation too


def test_stops(trained):
    model, sources = trained.model, [source for source, _ in PAIRS]
    how = {"strategy": "nucleus", "seed": 4, "max_new_tokens": 9}
    whole = model.generate(sources, **how)
    stop = next(text[2:4] for text in whole if len(text) > 4)
    short = model.generate(sources, stop=stop, **how)
    assert short == [text.split(stop)[0] for text in whole]
    assert whole != short
    assert "".join(model.stream(sources[0], stop=[stop], **how)) == short[0]


@pytest.mark.parametrize("more", [{}, {"val_metric": "rouge2"}])
def test_the_dev_loss_chooses_unless_another_score_is_asked_for(place, tmp_path, monkeypatch, more):
    rows = iter([{"rouge2": 9.0, "loss": 2.0}, {"rouge2": 5.0, "loss": 1.0}])
    end = SummarizationModule.on_validation_epoch_end

    def say(self):
        end(self)
        self.validation_result |= next(rows)

    monkeypatch.setattr(SummarizationModule, "on_validation_epoch_end", say)
    seq2seq.train(settings(place, tmp_path / "run", max_steps=2, eval_steps=1, decode="none", **more))
    training = json.loads((tmp_path / "run" / "results.json").read_text())["training"]
    assert training["best"]["step"] == (1 if more else 2)


@pytest.mark.parametrize("decode", ["both", "none"])
def test_what_is_decoded_after_training(place, tmp_path, decode):
    more = {"decode": decode, "test_file": str(place / "test.jsonl"), "n_test": 1, "max_steps": 1}
    result = seq2seq.train(settings(place, tmp_path / "run", **more))
    assert list(result.decoded) == {"both": ["valid", "test"], "none": []}[decode]
    for split in result.decoded:
        assert len(read(tmp_path / "run" / f"run_{split}_beam.jsonl")) == 1


def test_a_run_that_was_stopped_while_it_decoded(place, tmp_path, monkeypatch):
    """Resumed, it decodes what it had not decoded yet, with the weights it had, and nothing twice."""
    more = {"decode": "both", "test_file": str(place / "test.jsonl"), "n_test": 1, "max_steps": 1}
    whole = seq2seq.train(settings(place, tmp_path / "run", **more))
    shutil.rmtree(tmp_path / "run")
    decode_split, seen = run_generation.decode_split, []

    def until_test(model, split, *rest, **how):
        seen.append(split)
        if seen == ["valid", "test"]:
            raise KeyboardInterrupt
        return decode_split(model, split, *rest, **how)

    monkeypatch.setattr(run_generation, "decode_split", until_test)
    with pytest.raises(KeyboardInterrupt):
        seq2seq.train(settings(place, tmp_path / "run", **more))
    resumed = seq2seq.train(settings(place, tmp_path / "run", resume=True, **more))
    assert resumed.decoded == whole.decoded
    assert seen == ["valid", "test", "test"]
    flags = [f"--{name}={value}" for name, value in settings(place, tmp_path / "run", **more).as_flags().items()]
    finetune.main([*flags, "--resume=yes"])
    assert seen == ["valid", "test", "test"]


def test_conversations_go_through_the_models_template(place, tmp_path):
    make_bart(tmp_path / "chatty")
    (tmp_path / "chatty" / "chat_template.jinja").write_text(TEMPLATE)
    talk = [{"messages": [USER, {"role": "assistant", "content": f"by the\nriver {n}"}]} for n in range(4)]
    write(tmp_path / "talk.jsonl", talk)
    files = {f"{name}_file": str(tmp_path / "talk.jsonl") for name in ("train", "eval")}
    columns = {"source_column": None, "target_column": None, "model_name_or_path": str(tmp_path / "chatty")}
    result = seq2seq.train(settings(place, tmp_path / "run", **files, **columns))
    (row,) = read(tmp_path / "run" / "run_valid_beam.jsonl")
    assert row["source"] == [USER]
    (ids,) = result.model.encode(["the mill?"], Search())
    assert ids == result.model.tokenizer("<s>[user]the mill?[/user]\n[assistant]")["input_ids"]
    assert seq2seq.load(tmp_path / "run").generate([[USER]], max_new_tokens=9) == [row["output"]]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"mode": "xsum"}, "--mode xsum and --source_column do not go together"),
        ({"decode": "test"}, "--decode test: there is no test file"),
        ({"source_column": "source"}, r'train.jsonl: row 1: no column "source", found'),
        ({"max_length": 9}, "--max_length and --max_new_tokens do not go together"),
        ({"top_k": 3, "num_beams": 2}, "--strategy nucleus and --num_beams do not go together"),
    ],
)
def test_what_makes_no_sense_is_one_line(place, tmp_path, more, message):
    with pytest.raises(UserError, match=message) as error:
        seq2seq.train(settings(place, tmp_path / "run", **more))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_the_end_of_text_cannot_stand_in_a_text(place, tmp_path):
    write(tmp_path / "rows.jsonl", [{"q": "a </s> b", "a": "c"}])
    files = {f"{name}_file": str(tmp_path / "rows.jsonl") for name in ("train", "eval")}
    with pytest.raises(UserError, match="'</s>' separates source and target and must not occur in a text: 'a </s> b'"):
        seq2seq.train(settings(place, tmp_path / "run", **files))
