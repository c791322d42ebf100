"""scripts/reproduce.py with the user's own base model: rates searched, the winner shared, what was decoded tidied."""

import json

import pytest

from prefixlib.runs import record
from tests.conftest import ROOT, run_command

SCRIPT, DEMO = ROOT / "scripts" / "reproduce.py", ROOT / "data" / "demo"


def files_under(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two rates of one method, one of another, two steps each, then the low-data row that the better one is."""
    folder = tmp_path_factory.mktemp("own")
    shared = [
        "--model_name_or_path",
        DEMO / "gpt2",
        "--data_dir",
        DEMO,
        "--runs_dir",
        folder / "runs",
        "--max_steps",
        2,
    ]
    shared += ["--output_dir", folder / "results", "--test_sources", 3, "--keep_weights", "no"]
    tried = ("e2e-100-prefix-lr0.003", "e2e-100-prefix-lr0.0003")
    results = [
        run_command(SCRIPT, "rates", *shared, "--rows", *tried),
        run_command(SCRIPT, "rates", *shared, "--rows", "e2e-100-finetune-lr0.0001"),
    ]
    searched = as_if_searched(folder / "results" / "rates_gpt2_t3_max2.json")
    results.append(run_command(SCRIPT, "lowdata", *shared, "--rows", "e2e-100-prefix-*", "--samples", 1))
    for result in results:
        assert result.returncode == 0, result.stderr
    return folder, [result.stdout for result in results], searched


def as_if_searched(path):
    """Put the search with 500 examples, which the demo does not have, into the results; returns them without it."""
    found = json.loads(path.read_text())
    more = {}
    for name, entry in found["runs"].items():
        more[name.replace("e2e-100", "e2e-500")] = {**entry, "row": entry["row"].replace("e2e-100", "e2e-500")}
    path.write_text(json.dumps({**found, "runs": found["runs"] | more}))
    return found


def test_the_search_keeps_dev_losses(made):
    folder, printed, found = made
    losses = {entry["row"]: entry["scores"]["dev loss"] for entry in found["runs"].values()}
    assert set(losses) == {"e2e-100-prefix-lr0.003", "e2e-100-prefix-lr0.0003", "e2e-100-finetune-lr0.0001"}
    assert losses["e2e-100-prefix-lr0.003"] < losses["e2e-100-prefix-lr0.0003"]  # after two steps
    assert {entry["base_model"] for entry in found["runs"].values()} == {"gpt2"}
    assert found["own"]["name"] == "gpt2"
    assert "gen.py" not in printed[0] + printed[1]  # nothing was decoded
    assert str(ROOT) not in (folder / "results" / "rates_gpt2_t3_max2.md").read_text()


def test_the_winner_is_decoded_not_trained_again(made):
    folder, printed, _ = made
    assert printed[2].count("$ python gpt2/gen.py") == 1
    assert "train_e2e.py" not in printed[2].split("###")[0]
    found = json.loads((folder / "results" / "lowdata_gpt2_t3_max2.json").read_text())
    (entry,) = found["runs"].values()
    assert entry["row"] == "e2e-100-prefix-lr0.003"
    assert entry["test_sources"] == 3
    assert {"BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr", "loss"} == set(entry["scores"])
    assert entry["scores"]["loss"] > 0
    assert [step for step, _ in entry["dev_loss"]] == [2]
    table = (folder / "results" / "lowdata_gpt2_t3_max2.md").read_text()
    precision = "bfloat16" if record.has_fast_bfloat16() else "float32"
    assert f"Base model: gpt2, in {precision}." in table
    assert "over the first 3 test inputs" in table
    assert "quoted" not in table
    examples = (folder / "results" / "lowdata_gpt2_t3_max2_examples.md").read_text()
    assert examples.startswith("### Decoded examples. Low data: E2E with gpt2\n\n3 of 3 test inputs")
    assert examples.count("\n| reference | ") == examples.count("\n| prefix, 100 examples (gpt2) | ") == 3
    first = (DEMO / "e2e_data" / "src1_test.txt").read_text().splitlines()[0].split("||")
    assert f"**{first[0].strip()}**".replace("|", "\\|") in examples
    assert f"| reference | {first[1].strip()} |" in examples
    assert not (folder / "results" / "rates_gpt2_t3_max2_examples.md").exists()


def test_what_is_decoded_is_tidied_up(made):
    """Checkpoints to resume from go; models too, once decoded; prefixes and outputs stay."""
    folder, *_ = made
    left = files_under(folder / "runs" / "rates_gpt2_t3_max2")
    assert not any("checkpoint-" in path for path in left)
    assert "e2e-100-prefix-lr0.003-d1-s101/best/prefix_model.safetensors" in left
    assert "e2e-100-prefix-lr0.003-d1-s101/best_test_beam" in left
    assert "e2e-100-finetune-lr0.0001-d1-s101/best/model.safetensors" in left  # another table may decode it yet
    assert files_under(folder / "runs" / "drawn_data") == {
        f"e2e_lowdata/lowdata_100_1_{split}.txt" for split in ("train", "valid")
    }
