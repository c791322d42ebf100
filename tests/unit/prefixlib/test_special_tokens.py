"""Special tokens in any row of the data: both trees count them, name the first one, and refuse the end of a text."""

import json
from dataclasses import replace

import pytest

import gpt2
import seq2seq
from prefixlib.data import special_tokens
from prefixlib.data.readers import read_data2text
from prefixlib.data.special_tokens import check_rows, texts_of
from prefixlib.system.errors import UserError
from tests.llama2_tiny import make_llama
from tests.seq2seq_tiny import make_bart

TREES = {"gpt2": (gpt2, make_llama), "seq2seq": (seq2seq, make_bart)}


class Spelled:
    """A tokenizer's special tokens and no more."""

    eos_token = "</s>"
    all_special_tokens = ("<s>", "</s>", "<pad>")


def test_every_row_is_looked_at(tmp_path, caplog):
    path = tmp_path / "rows.txt"
    rows = [f"name : Inn {n}||It is {n}." for n in range(40)]
    rows[25] += " <pad>"
    rows[30] = f"<s>{rows[30]}"
    path.write_text("\n\n".join(rows))
    check_rows(Spelled(), path, texts_of(read_data2text(path)))
    assert caplog.messages == [
        f"{path}: 2 of 40 rows hold special tokens, which the model does not read as text; the first one is <pad> in "
        "line 51"
    ]
    path.write_text("\n".join([*rows, "a : b||c </s>"]))
    with pytest.raises(UserError, match=r"rows.txt: line 41: '</s>' separates source and target.*: 'c </s>'; take it"):
        check_rows(Spelled(), path, texts_of(read_data2text(path)))


def test_a_character_that_is_lost_is_noticed_in_any_row(caplog):
    class Words(Spelled):
        def __call__(self, text, add_special_tokens):
            return {"input_ids": [text.replace("\t", " ")]}

        def decode(self, ids, **_):
            return ids[0]

    special_tokens.warn_of_lost_characters(Words(), [*["a b"] * 50, "a\tb"])
    assert caplog.messages == ["the tokenizer does not keep every character: it turns 'a\\tb' into 'a b'"]


@pytest.mark.parametrize("tree", TREES)
def test_in_both_trees_before_the_training(tree, tmp_path, caplog):
    package, make = TREES[tree]
    base = make(tmp_path / "base")
    rows = [{"source": f"Inn {n}", "target": f"It is {n}."} for n in range(30)]
    files = {name: tmp_path / f"{name}.jsonl" for name in ("train", "eval", "test")}

    def write(name, changed):
        files[name].write_text("".join(json.dumps(row) + "\n" for row in changed))

    for name in files:
        write(name, rows)
    settings = package.Settings(
        **{"mode": "text", "model_name_or_path": str(base), "output_dir": str(tmp_path / "run"), "disable_tqdm": True},
        **{f"{name}_file": str(path) for name, path in files.items()},
        **{"preseqlen": 2, "mid_dim": 8, "max_steps": 1, "bsz": 4, "decode": "test", "max_new_tokens": 2},
    )
    for name in files:
        write(name, [*rows[:25], {"source": "a </s> b", "target": "c"}])
        with pytest.raises(UserError, match=f"{name}.jsonl: row 26: '</s>' separates source and target"):
            package.train(settings)
        assert not (tmp_path / "run" / "results.json").exists()
        write(name, rows)
    write("train", [*rows[:25], {"source": "<s>", "target": "<unk> c"}])
    package.train(replace(settings, decode="none"))
    said = [message for message in caplog.messages if "special tokens" in message]
    assert said == [
        f"{files['train']}: 1 of 26 rows hold special tokens, which the model does not read as text; the first one is "
        "<s> in row 26"
    ]
