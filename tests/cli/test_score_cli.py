"""scripts/score.py as a user runs it: table and JSON out, refusals in one line, nothing half done."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from prefixlib.system.errors import UserError
from scripts import score

ROOT = Path(__file__).resolve().parents[2]
GOLD = "The Mill is a pub.\nThere is a pub, The Mill.\n\nAlimentum is cheap.\n\n"
OUTPUT = "The Mill is a pub .\nAlimentum is cheap .\n"


@pytest.fixture
def files(tmp_path):
    """Paths of outputs and references of two E2E inputs."""
    (tmp_path / "out").write_text(OUTPUT)
    (tmp_path / "gold").write_text(GOLD)
    return tmp_path


def run(capsys, *argv) -> tuple[dict, list[str]]:
    """(the JSON, the lines above it) of one call."""
    score.main([str(argument) for argument in argv])
    *text, last = capsys.readouterr().out.splitlines()
    return json.loads(last), text


def test_table_json_and_output_file(files, capsys):
    flags = ["e2e", "--hypotheses", files / "out", "--references", files / "gold", "--metrics", "BLEU", "CIDEr"]
    result, text = run(capsys, *flags, "--output", files / "scores.json")
    assert result["scores"] == {"BLEU": pytest.approx(100), "CIDEr": pytest.approx(result["scores"]["CIDEr"])}
    assert (result["count"], result["empty"]) == (2, 0)
    assert text[0].split() == ["metric", "score"]
    assert text[1].split() == ["BLEU", "100.00"]
    assert json.loads((files / "scores.json").read_text()) == result


def test_bootstrap_adds_intervals(files, capsys):
    flags = ["e2e", "--hypotheses", files / "out", "--references", files / "gold", "--metrics", "ROUGE-L"]
    result, text = run(capsys, *flags, "--bootstrap", "50")
    assert result["intervals"] == {"ROUGE-L": [pytest.approx(100), pytest.approx(100)]}
    assert text[1].split() == ["ROUGE-L", "100.00", "100.00", "to", "100.00"]


def test_compare_two_systems(files, capsys):
    (files / "worse").write_text("a b c\nd e f\n")
    flags = ["e2e", "--compare", files / "worse", files / "out", "--references", files / "gold"]
    result, text = run(capsys, *flags, "--metrics", "ROUGE-L", "--bootstrap", "100")
    figures = result["scores"]["ROUGE-L"]
    # "a b c" shares one word with each reference: precision 1/3, best recall 1/5; the other output shares none
    assert (figures["A"], figures["B"], figures["difference"]) == (
        pytest.approx(11.96, abs=0.01),
        pytest.approx(100),
        pytest.approx(88.04, abs=0.01),
    )
    assert 0 < figures["p"] <= 1
    assert text[0].split()[:3] == ["metric", "A", "B"]


def test_a_missing_metric_reads_na_and_says_what_to_install(files, capsys, monkeypatch):
    monkeypatch.setattr("prefixlib.metrics.meteor.importlib.util.find_spec", lambda name: None)
    flags = ["e2e", "--hypotheses", files / "out", "--references", files / "gold"]
    result, text = run(capsys, *flags, "--bootstrap", "10")
    assert result["scores"]["METEOR"] is None
    assert ["METEOR", "n/a"] in [line.split() for line in text]
    assert any("METEOR n/a" in line and "pip install" in line for line in text[2:])


@pytest.mark.parametrize("more", [[], ["BLEU"]])
def test_a_metric_that_was_asked_for_and_is_missing_is_refused(files, capsys, monkeypatch, more):
    monkeypatch.setattr("prefixlib.metrics.meteor.importlib.util.find_spec", lambda name: None)
    flags = ["e2e", "--hypotheses", files / "out", "--references", files / "gold", "--metrics", *more, "METEOR"]
    with pytest.raises(UserError, match="--metrics 'METEOR': not available here; to have it: pip install"):
        run(capsys, *flags)


@pytest.mark.parametrize("long", ["a text that is longer than what one would call an answer", ""])
def test_exact_match_is_given_where_it_is_asked_for(tmp_path, capsys, long):
    rows = [{"output": "yes", "references": ["yes"]}, {"output": "no", "references": [long]}]
    (tmp_path / "out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "out.jsonl"
    result, text = run(capsys, "text", "--hypotheses", path, "--references", path, "--metrics", "exact match")
    assert result["scores"] == {"exact match": 50}
    assert text[1].split() == ["exact", "match", "50.00"]


def test_empty_outputs_are_counted(files, capsys):
    (files / "out").write_text("The Mill is a pub .\r\n\r\n")
    flags = ["e2e", "--hypotheses", files / "out", "--references", files / "gold", "--metrics", "BLEU"]
    result, text = run(capsys, *flags)
    assert (result["count"], result["empty"]) == (2, 1)
    assert any("1 of them empty (scored as empty)" in line for line in text)


def test_rouge_comes_with_its_distance_from_the_papers_tool(files, capsys):
    (files / "target").write_text("Police kill the gunman.\nIt rained.\n")
    result, text = run(capsys, "xsum", "--hypotheses", files / "target", "--references", files / "target")
    assert result["scores"] == {"ROUGE-1": 100, "ROUGE-2": 100, "ROUGE-L": 100}
    assert any("ROUGE-1.5.5" in line for line in text)


def test_webnlg_split_brings_the_categories(files, capsys):
    entry = {
        "category": "Food",
        "modifiedtripleset": [{"subject": "Bacon", "property": "is", "object": "Food"}],
        "lexicalisations": [{"comment": "good", "lex": "Bacon is a food.", "xml_id": "Id1"}],
    }
    other = {**entry, "category": "Artist", "modifiedtripleset": [{"subject": "A", "property": "b", "object": "C"}]}
    folder = files / "webnlg_challenge_2017"
    folder.mkdir()
    (folder / "dev.json").write_text(json.dumps({"entries": [{"1": entry}, {"2": other}]}))
    (files / "out").write_text("Bacon is a food.\nsomething else\n")
    flags = ["webnlg", "--hypotheses", files / "out", "--split", "valid", "--data_dir", files, "--metrics", "TER"]
    result, _ = run(capsys, *flags)
    assert result["scores"] == {"TER seen": 0, "TER unseen": 1, "TER all": 0.5}
    (files / "out").write_text("one line\n")
    with pytest.raises(UserError, match="out has 1 hypotheses but --split valid has 2 inputs"):
        run(capsys, *flags)


def test_categories_file_with_references(files, capsys):
    (files / "categories").write_text("Food\nArtist\n")
    flags = ["webnlg", "--hypotheses", files / "out", "--references", files / "gold", "--metrics", "TER"]
    result, _ = run(capsys, *flags, "--categories", files / "categories")
    assert list(result["scores"]) == ["TER seen", "TER unseen", "TER all"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--references", "gold"], "give either --hypotheses or --compare"),
        (["--hypotheses", "out", "--compare", "out", "out", "--references", "gold"], "give either --hypotheses or"),
        (["--hypotheses", "out"], "give either --references or --split"),
        (["--hypotheses", "out", "--references", "gold", "--data_dir", "x"], "--data_dir x: goes with --split only"),
        (["--hypotheses", "out", "--split", "test", "--categories", "x"], "--categories x: goes with --references"),
        (["--hypotheses", "out", "--references", "gold", "--bootstrap", "-1"], "--bootstrap -1: expected"),
        (["--hypotheses", "out", "--references", "gold", "--seed", "-1"], "--seed -1: expected 0 or more"),
        (["--hypotheses", "out", "--references", "gold", "--categories", "x"], "--categories x: goes with webnlg only"),
        (["--hypotheses", "blank", "--references", "gold"], "blank has 3 hypotheses (the last line is blank) but gold"),
        (
            ["--hypotheses", "blanks", "--references", "gold"],
            "blanks has 4 hypotheses (the last 2 lines are blank) but",
        ),
        (["--hypotheses", "out", "--references", "blank"], "blank has 1 group of references (the last line is blank)"),
        (["--hypotheses", "out", "--references", "out", "blank"], "but blank has 3 lines (the last line is blank)"),
        (["--hypotheses", "short", "--references", "gold"], "short has 3 hypotheses but gold has 2 inputs"),
        (["--hypotheses", "none", "--references", "gold"], "--hypotheses none: no such file"),
    ],
)
def test_refusals_are_one_line(files, monkeypatch, flags, message):
    monkeypatch.chdir(files)
    (files / "short").write_text("a\nb\nc\n")
    (files / "blank").write_text("a\nb\n\n")
    (files / "blanks").write_text("a\nb\n\n\n")
    with pytest.raises(UserError) as refused:
        score.main(["e2e", *flags])
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_compare_reads_both_files_before_it_scores_one(files, capsys, monkeypatch):
    (files / "short").write_text("one line\n")
    monkeypatch.setattr("prefixlib.metrics.tasks.measure", None)  # scoring would fail
    flags = ["e2e", "--compare", files / "out", files / "short", "--references", files / "gold"]
    with pytest.raises(UserError, match="short has 1 hypotheses but .*gold has 2 inputs"):
        run(capsys, *flags)


def test_inputs_without_references_are_reported(files, capsys):
    (files / "gold").write_text("The Mill is a pub.\n\n\n")
    flags = ["e2e", "--hypotheses", files / "out", "--references", files / "gold", "--metrics", "BLEU"]
    result, text = run(capsys, *flags)
    assert result["without_references"] == 1
    assert "1 of the inputs have no reference (scored against an empty one)" in text


def test_scales_are_said_task_by_task(files, capsys):
    flags = ["--hypotheses", files / "out", "--references", files / "gold", "--metrics"]
    _, text = run(capsys, "e2e", *flags, "BLEU", "ROUGE-L", "NIST", "CIDEr")
    assert "scales: BLEU 0-100; NIST from 0; ROUGE-L 0-100; CIDEr 0-10" in text
    _, text = run(capsys, "dart", *flags, "BLEU", "TER")
    assert "scales: BLEU 0-100; TER from 0, lower is better" in text


def test_unknown_categories_are_refused_with_those_that_are_known(files, capsys):
    flags = ["webnlg", "--hypotheses", files / "out", "--references", files / "gold", "--metrics", "TER"]
    (files / "categories").write_text("Food\nArtists\n")
    with pytest.raises(UserError) as refused:
        run(capsys, *flags, "--categories", files / "categories")
    assert str(refused.value).startswith(f"{files / 'categories'}:2: category 'Artists' is unknown; seen: Airport, ")
    assert str(refused.value).endswith("unseen: Artist, Athlete, CelestialBody, MeanOfTransportation, Politician")
    (files / "categories").write_text("Food\nArtist\n\n")
    with pytest.raises(UserError, match=r"2 hypotheses but .*categories has 3 lines \(the last line is blank\)"):
        run(capsys, *flags, "--categories", files / "categories")


@pytest.mark.parametrize(("samples", "warnings"), [("99", 1), ("100", 0), ("0", 0)])
def test_few_resamples_are_warned_of(files, capsys, caplog, samples, warnings):
    flags = ["e2e", "--hypotheses", files / "out", "--references", files / "gold", "--metrics", "ROUGE-L"]
    run(capsys, *flags, "--bootstrap", samples)
    assert [record.getMessage() for record in caplog.records if "--bootstrap" in record.getMessage()] == [
        "--bootstrap 99 is too few for 95 % intervals: 1000 or more"
    ] * warnings


@pytest.mark.parametrize("folder", [".", "scripts"])
def test_runs_from_both_folders(files, folder):
    command = [sys.executable, str(ROOT / "scripts" / "score.py"), "e2e", "--metrics", "BLEU"]
    command += ["--hypotheses", str(files / "out"), "--references", str(files / "gold")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / folder, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["scores"]["BLEU"] == pytest.approx(100)
    command[command.index(str(files / "out"))] = str(files / "none")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / folder, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --hypotheses")
    assert done.stderr.count("\n") == 1


def test_outputs_of_mode_text_are_read_as_objects(tmp_path):
    """The lines of a .jsonl are no texts: its `output` is scored against `references`, or `target`."""
    rows = [{"source": f"s{n}", "output": "a b\nc d e", "references": ["a b\nc d e"], "score": -1.0} for n in range(3)]
    rows[1]["output"] = "x y z w"
    (tmp_path / "out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "gold.jsonl").write_text("".join(json.dumps({"target": "a b\nc d e"}) + "\n" for _ in rows))
    for gold in ("out.jsonl", "gold.jsonl"):
        words = ["text", "--hypotheses", str(tmp_path / "out.jsonl"), "--references", str(tmp_path / gold)]
        outputs = score.read_outputs(score.parse_args(words), words[2])
        assert outputs.hypotheses == ["a b\nc d e", "x y z w", "a b\nc d e"]
        assert outputs.references == [["a b\nc d e"]] * 3
    (tmp_path / "bad.jsonl").write_text('{"text": 1}\n')
    words[2] = str(tmp_path / "bad.jsonl")
    with pytest.raises(UserError, match=r"bad.jsonl:1: expected an object with output"):
        score.read_outputs(score.parse_args(words), words[2])
