"""The example of an export: this checkpoint's own prompt, token by token, and the text that we decode."""

import io
import runpy
import sys
from contextlib import redirect_stdout

import pytest

import gpt2
import seq2seq
from prefixlib.data.tasks import find_task
from prefixlib.settings.search import Search
from prefixlib.system.errors import UserError
from scripts import export
from tests.cli.test_own_data import USER, settings, write
from tests.cli.test_own_data_seq2seq import settings as seq2seq_settings
from tests.conftest import ROOT, run_command
from tests.llama2_tiny import make_llama
from tests.seq2seq_tiny import make_bart

DEMO = ROOT / "data" / "demo"
SOURCE = " the mill\n {x} "


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Checkpoints of the kinds of prompts."""
    folder = tmp_path_factory.mktemp("examples")
    make_llama(folder / "llama", chat=True)
    make_bart(folder / "bart")
    pairs = [{"source": f"the mill {n}", "target": f"by\nthe river {n}"} for n in range(4)]
    talk = [{"messages": [USER, {"role": "assistant", "content": f"by the\nriver {n}"}]} for n in range(4)]
    for name, rows in (("text", pairs), ("chat", talk)):
        (folder / name).mkdir()
        for split in ("train", "valid"):
            write(folder / name / f"{split}.jsonl", rows)
    brief = {"max_steps": 2, "learning_rate": 0.05, "decode": "none"}
    template = {"source_template": "Say\n{source}: "}
    runs = {
        "template": ("text", "llama", template),
        "plain": ("text", "llama", {}),
        "nopeek": ("text", "llama", {"format_mode": "nopeek"}),
        "chat": ("chat", "llama", {}),
    }
    for name, (data, model, more) in runs.items():
        gpt2.train(settings(folder / data, folder / name / "run", folder / model, **brief, **more))
    table = {"mode": "webnlg", "data_dir": str(DEMO), "train_file": None, "eval_file": None}
    gpt2.train(settings(folder / "text", folder / "table" / "run", DEMO / "gpt2", **{**brief, **table}))
    own = {"source_column": "source", "target_column": "target", **brief, **template}
    seq2seq.train(
        seq2seq_settings(
            folder,
            folder / "bart-run",
            **own,
            train_file=str(folder / "text" / "train.jsonl"),
            eval_file=str(folder / "text" / "valid.jsonl"),
        )
    )
    return folder


def run(folder, monkeypatch, *argv):
    """The variables of example.py, and what it prints."""
    monkeypatch.setattr(sys, "argv", ["example.py", *argv])
    printed = io.StringIO()
    with redirect_stdout(printed):
        names = runpy.run_path(str(folder / "example.py"))
    return names, printed.getvalue().removesuffix("\n")


KINDS = ("template", "plain", "nopeek", "chat", "table")


@pytest.mark.parametrize(("to", "name"), [*(("kv", name) for name in KINDS), ("cache", "template"), ("peft", "chat")])
def test_the_example_reads_and_writes_what_we_do(place, monkeypatch, to, name):
    checkpoint = place / name / "run"
    export.main([str(checkpoint), "--to", to, "--output_dir", str(place / name / to)])
    source = SOURCE if name != "table" else " | A : b : C"
    names, printed = run(place / name / to, monkeypatch, source)
    model = gpt2.load(checkpoint)
    (expected,) = model.encode([source], Search(max_new_tokens=100))
    assert names["prompt"].tolist() == [expected.prompt]
    (text,) = model.generate([source], strategy="greedy")
    if name != "table":  # there we ban newlines and clean the text
        assert printed == text
        assert len(text) > 10
    assert names["output"].shape[1] > len(expected.prompt)


def test_its_readme_says_how_the_prompt_looks(place):
    for to in ("kv", "cache", "peft"):
        export.main([str(place / "template" / "run"), "--to", to])
        card = (place / "template" / "run" / to / "README.md").read_text()
        assert "The prompt is `'Say\\nSOURCE: '` and then the tokenizer's end-of-text token, `</s>`" in card
        assert 'python example.py "A SOURCE"' in card
    export.main([str(place / "chat" / "run"), "--to", "kv"])
    assert (
        "the model's own chat template applied to the messages"
        in (place / "chat" / "run" / "kv" / "README.md").read_text()
    )


def test_as_a_command_without_a_source(place):
    export.main([str(place / "table" / "run"), "--to", "cache"])
    result = run_command(place / "table" / "run" / "cache" / "example.py")
    assert result.returncode == 0, result.stderr
    assert find_task("webnlg").example in (place / "table" / "run" / "cache" / "example.py").read_text()
    three = (place / "table" / "run" / "cache" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert three.count("\n") == 3


def test_the_encoder_reads_what_it_was_trained_on(place, monkeypatch):
    export.main([str(place / "bart-run"), "--to", "kv"])
    names, _ = run(place / "bart-run" / "kv", monkeypatch, SOURCE)
    (expected,) = seq2seq.load(place / "bart-run").encode([SOURCE], Search())
    assert names["source"].tolist() == [expected]
    assert names["text"] == f"Say\n{SOURCE}: "
    with pytest.raises(UserError, match="--to cache cannot hold .*: an encoder-decoder has several caches"):
        export.main([str(place / "bart-run"), "--to", "cache"])
