"""Every bad input of the table: one line that says what is wrong, a non-zero exit, and no file changed or lost."""

import copy
import functools
import hashlib
import json
import operator
import os
import re
import shutil

import pytest

from gpt2 import run_generation
from prefixlib.checkpoints.checkpoint import CONFIG
from prefixlib.system.errors import one_line_errors
from seq2seq import finetune
from tests.conftest import run_command
from tests.robustness.bad_inputs import ROWS, renamed_arrays
from tests.robustness.places import PACKAGES, at, settings_of

SLOW = os.environ.get("PREFIX_TUNING_SLOW") == "1"
CASES = [(row, tree) for row in ROWS for tree in row.trees]


def work_on(place, work, changes):
    """What a case asks for, as the command line runs it."""
    if work == "load":
        PACKAGES[place.tree].load(changes.pop("directory", place.checkpoint), mode="webnlg")
    elif work == "decode" and place.tree == "gpt2":
        words = ["--mode=webnlg", "--split=test", f"--checkpoint={place.checkpoint}", f"--data_file={changes['file']}"]
        run_generation.main([*words, "--disable_tqdm=yes"])
    elif work == "decode":
        words = ["--mode=webnlg", "--do_train=no", f"--prefix_model_path={place.checkpoint}"]
        finetune.main([*words, f"--test_file={changes['file']}", f"--output_dir={place.output}"])
    else:
        if work == "resume":
            changes = {"output_dir": str(place.run), "resume": True, **changes}
        PACKAGES[place.tree].train(settings_of(place, **changes))


def contents(root):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("row", "tree"), CASES, ids=[f"{row.kind}-{tree}" for row, tree in CASES])
def test_a_bad_input_is_one_line_and_nothing_is_lost(row, tree, good, tmp_path, capfd):
    root = tmp_path / "place"
    shutil.copytree(good[tree].base.parent, root)
    place = at(root, tree)
    changes = row.make(place) or {}
    before = contents(root)
    with pytest.raises(SystemExit) as ended, one_line_errors():
        work_on(place, row.work, changes)
    said = capfd.readouterr().err
    assert ended.value.code in (1, 2)
    assert said.startswith("error: ") and said.count("\n") == 1, said  # noqa: PT018
    for words in row.words:
        assert any(alternative in said for alternative in words.split("|")), said
    assert not re.search(r"Error\b.*Error\b|Traceback|<class", said), said
    assert contents(root) == before  # nothing was lost, and no work was done


def test_the_command_line_says_it_in_one_line_too(good, tmp_path):
    """Without the tables that transformers prints of weights that did not load."""
    shutil.copytree(good["gpt2"].base, tmp_path / "base")
    renamed_arrays(at(tmp_path, "gpt2"))
    where = ["--mode=webnlg", f"--data_dir={good['gpt2'].data}", f"--model_name_or_path={tmp_path / 'base'}"]
    result = run_command("gpt2/run_language_modeling.py", *where, f"--output_dir={tmp_path / 'out'}")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def places(value, path=()):
    """Every place in a JSON value that is not the whole."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield (*path, key)
        yield from places(part, (*path, key))


ODD = (None, [], {}, "odd", 7, -1, 0, 0.5, True, 10**30, [None], {"odd": None})


@pytest.mark.parametrize("tree", PACKAGES)
def test_any_value_in_any_place_of_a_checkpoints_config(tree, good, tmp_path, capfd):
    """Refused in one line, or of no account: then the checkpoint decodes. Each place gets two of the values."""
    config = json.loads((good[tree].checkpoint / CONFIG).read_text())
    shutil.copytree(good[tree].checkpoint, tmp_path / "checkpoint", ignore=shutil.ignore_patterns("checkpoint-*"))
    refused, taken = 0, set()
    for number, where in enumerate(places(config)):
        for value in ODD if SLOW else (ODD[number % len(ODD)], ODD[(number + 5) % len(ODD)]):
            spoilt = copy.deepcopy(config)
            holder = functools.reduce(operator.getitem, where[:-1], spoilt)
            if holder[where[-1]] == value and type(holder[where[-1]]) is type(value):
                continue
            holder[where[-1]] = value
            (tmp_path / "checkpoint" / CONFIG).write_text(json.dumps(spoilt))
            try:
                with one_line_errors():
                    model = PACKAGES[tree].load(tmp_path / "checkpoint", mode="webnlg")
                    model.generate([" | A : b : C"], max_new_tokens=2, num_beams=1)
                taken.add(where[0] if where[0] != "prefix" else where)
            except SystemExit:
                refused += 1
                said = capfd.readouterr().err
                assert said.startswith("error: "), (where, value)
                assert said.count("\n") == 1, said
    assert refused > len(list(places(config)))
    # what the loading of a prefix does not need: what is recorded of its training
    assert taken <= {"task", "versions", "base_model", ("prefix", "init_text"), ("prefix", "prefix_dropout")}


def test_the_table_is_walked_whole():
    assert len({row.kind for row in ROWS}) == len(ROWS)
    assert len(CASES) == 251
