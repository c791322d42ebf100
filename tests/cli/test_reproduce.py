"""scripts/reproduce.py as a user runs it: dry run, a table, stopped and killed runs, changed recipes, wrong input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_command

SCRIPT = ROOT / "scripts" / "reproduce.py"
COMMANDS = {  # rows x seeds x (training, decoding); low data: x (sample, training, decoding), 5 sets, 2 seeds
    "table1": 15 * 3 * 2,
    "table2": 3 * 3 * 2,
    "xsum": 2 * 3 * 2,
    "lowdata": 8 * 5 * 2 * 3,
    "extrapolation": 9 * 3 * 2,
    "length": 6 * 3 * 2,
    "embedding-only": 4 * 3 * 2,
    "infix": 4 * 3 * 2,
    "init": 9 * 5 * 2 * 3,
}
DEMO = ["--demo", "yes", "--rows", "e2e-prefix"]


def files_under(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


@pytest.mark.parametrize("name", COMMANDS)
def test_dry_run_prints_every_command_and_does_nothing(name, tmp_path):
    where = ["--runs_dir", tmp_path / "runs", "--output_dir", tmp_path / "results", "--data_dir", tmp_path / "data"]
    result = run_command(SCRIPT, name, "--dry_run", *where)
    assert (result.returncode, result.stderr) == (0, "")
    commands = [line for line in result.stdout.splitlines() if line.startswith("python ")]
    assert len(commands) == COMMANDS[name]
    assert len(set(commands)) >= len(commands) * 2 // 3  # a sample is drawn for several rows, a run is made once
    assert files_under(tmp_path) == []


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """table1's E2E prefix row on the demo, four steps."""
    folder = tmp_path_factory.mktemp("reproduce")
    command = [SCRIPT, "table1", *DEMO, "--max_steps", "4", "--runs_dir", folder]
    result = run_command(*command)
    assert result.returncode == 0, result.stderr
    return folder, command, result


def test_a_table_with_everything_about_its_runs(table):
    folder, _, result = table
    assert files_under(folder / "results") == ["table1_demo_max4.json", "table1_demo_max4.md"]
    found = json.loads((folder / "results" / "table1_demo_max4.json").read_text())
    (entry,) = found["runs"].values()
    assert list(found["runs"]) == ["e2e-prefix-s101"]
    assert set(entry["scores"]) == {"BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr"}
    assert (entry["row"], entry["seed"], entry["steps"]) == ("e2e-prefix", 101, 4)
    assert entry["train_seconds"] > 0
    assert entry["decode_seconds"] > 0
    assert {"python", "torch", "transformers"} <= set(entry["versions"])
    assert entry["device"].startswith("cpu") or entry["device"]
    # P 5, E 128, mid_dim 256, L 4: 5·128 + 128·256 + 256 + 256·1024 + 1024
    assert entry["trained_parameters"] == 296_832 == 5 * 128 + 128 * 256 + 256 + 256 * 1024 + 1024
    text = (folder / "results" / "table1_demo_max4.md").read_text()
    assert f"| prefix 0.1 %, here | {entry['scores']['BLEU']:.1f} |" in text
    assert "nothing here compares with the paper's numbers. Every training was cut at 4 steps" in text
    assert "quoted" not in text
    assert text in result.stdout


def test_what_is_done_is_not_done_again(table):
    folder, command, _ = table
    before = (folder / "results" / "table1_demo_max4.json").read_text()
    result = run_command(*command, timeout=20)
    assert result.returncode == 0, result.stderr
    assert "# 1 of 1: table1_demo_max4/e2e-prefix-s101 is done" in result.stdout
    assert "$ python" not in result.stdout
    assert (folder / "results" / "table1_demo_max4.json").read_text() == before


def test_a_changed_recipe_is_not_taken_for_done(table, tmp_path):
    folder, command, _ = table
    shutil.copytree(folder, tmp_path / "copy")
    recipe = tmp_path / "copy/table1_demo_max4/e2e-prefix-s101/recipe.json"
    recipe.write_text(recipe.read_text().replace("--preseqlen 5", "--preseqlen 6"))
    (recipe.parent / "keep.txt").write_text("mine")
    result = run_command(*command[:-1], tmp_path / "copy")
    assert result.returncode == 0, result.stderr
    assert "was made by another recipe: it is kept as e2e-prefix-s101.before-1" in result.stdout
    assert result.stdout.count("$ python gpt2/train_e2e.py") == 1
    assert (recipe.parent.with_name("e2e-prefix-s101.before-1") / "keep.txt").read_text() == "mine"
    assert not (recipe.parent / "keep.txt").exists()
    assert recipe.read_text() == (folder / "table1_demo_max4/e2e-prefix-s101/recipe.json").read_text()


def test_decoding_alone_is_made_up_for(table, tmp_path):
    """A run that was stopped between training and decoding is not trained again."""
    folder, command, _ = table
    shutil.copytree(folder, tmp_path / "copy")
    results = tmp_path / "copy/table1_demo_max4/e2e-prefix-s101/results.json"
    found = json.loads(results.read_text())
    scores = found.pop("decoding")["test"]["scores"]
    results.write_text(json.dumps(found))
    result = run_command(*command[:-1], tmp_path / "copy")
    assert result.returncode == 0, result.stderr
    assert "train_e2e.py" not in result.stdout
    assert json.loads(results.read_text())["decoding"]["test"]["scores"] == scores


@pytest.mark.parametrize("content", ["{", '"text"', ""])
def test_broken_results_are_one_line(content, table, tmp_path):
    folder, command, _ = table
    shutil.copytree(folder, tmp_path / "copy")
    results = tmp_path / "copy/table1_demo_max4/e2e-prefix-s101/results.json"
    results.write_text(content)
    result = run_command(*command[:-1], tmp_path / "copy", timeout=60)
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: e2e-prefix-s101: {results} ")
    assert line.endswith(f"delete {results.parent} to make the run again")
    assert "Traceback" not in result.stderr
    assert results.read_text() == content


def test_missing_data_is_said_once_and_the_rest_goes_on(tmp_path):
    """No file of any set: one line per file that is missing, not one per seed; the table is written all the same."""
    where = ["--data_dir", tmp_path / "data", "--runs_dir", tmp_path / "runs", "--output_dir", tmp_path / "results"]
    result = run_command(SCRIPT, "extrapolation", "--rows", "*-prefix", *where, timeout=60)
    assert result.returncode == 1
    errors = [line.split(": ", 2)[2] for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [
        f"{tmp_path}/data/{path} is missing: python scripts/prepare_data.py {name}"
        for path, name in (
            ("xsum_news/train.source", "xsum_news"),
            ("xsum_topic-news-sports/train.source", "xsum_news_sport"),
            ("webnlg_challenge_2017/train.json", "webnlg"),
        )
    ]
    assert (tmp_path / "results/extrapolation.md").read_text().count("not run") == 9


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("table1 --rows e2e-prefx", "--rows e2e-prefx: table1 has e2e-finetune, e2e-top2,"),
        ("table2 --size large", "--size large and table2 do not go together: table2 is about BART-large alone"),
        ("table1 --demo yes --size large", "--demo yes and --size large do not go together"),
        ("table1 --demo yes --data_dir data", "--demo yes and --data_dir do not go together"),
        ("table1 --seeds 0", "--seeds 0: must be above 0"),
    ],
)
def test_wrong_input_is_one_line(argv, message):
    result = run_command(SCRIPT, *argv.split(), "--dry_run")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1


# ---- stopped and killed ------------------------------------------------------------------------------------------

STEPS = 64  # two epochs of the demo's E2E: a checkpoint after step 32


def start(folder):
    """Start a run of two epochs in a group of its own."""
    command = [sys.executable, SCRIPT, "table1", *DEMO, "--max_steps", str(STEPS), "--runs_dir", folder]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, start_new_session=True, **pipes)


def wait_for_checkpoint(folder, seconds=90):
    run = folder / f"table1_demo_max{STEPS}" / "e2e-prefix-s101"
    deadline = time.monotonic() + seconds
    while not (run / "checkpoint-32" / "trainer_state.json").is_file():
        assert time.monotonic() < deadline, f"no checkpoint in {run}"
        time.sleep(0.05)
    return run


def child_of(process):
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(listed) == 1
    return int(listed[0])


def finish(folder, run):
    """Start again: the training goes on from its checkpoint and the table is whole."""
    process = start(folder)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "--resume yes" in out
    found = json.loads((run / "results.json").read_text())
    assert found["training"]["steps"] == STEPS
    table = json.loads((folder / "results" / f"table1_demo_max{STEPS}.json").read_text())
    assert table["runs"]["e2e-prefix-s101"]["scores"] == found["decoding"]["test"]["scores"]


needs_proc = pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for the child in /proc")


@needs_proc
def test_stopped_with_ctrl_c_and_gone_on(tmp_path):
    process = start(tmp_path)
    run = wait_for_checkpoint(tmp_path)
    child = child_of(process)
    os.killpg(process.pid, signal.SIGINT)  # to the whole group, as a terminal does
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.rstrip().endswith("interrupted")
    assert "Traceback" not in err
    assert not Path(f"/proc/{child}").exists()
    assert "not run" in (tmp_path / "results" / f"table1_demo_max{STEPS}.md").read_text()
    finish(tmp_path, run)


@needs_proc
def test_an_interrupt_of_the_script_alone_is_passed_on():
    """`kill -INT` reaches one process only; a training must not go on without it."""
    child = "import time; print('ready', flush=True); time.sleep(200)"
    parent = f"from paper import training_runs; training_runs.call(['-c', {child!r}], None)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT / "scripts", start_new_session=True, **pipes)
    while process.stdout.readline() != "ready\n":
        assert process.poll() is None
    pid = child_of(process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert err.count("KeyboardInterrupt") == 2  # the child's and the parent's
    assert not Path(f"/proc/{pid}").exists()


@needs_proc
def test_killed_and_gone_on(tmp_path):
    process = start(tmp_path)
    run = wait_for_checkpoint(tmp_path)
    child = child_of(process)
    os.kill(child, signal.SIGSTOP)  # so that it is still there when the script is started again
    process.kill()
    process.wait()
    try:
        again = start(tmp_path)
        _, err = again.communicate(timeout=60)
    finally:
        os.kill(child, signal.SIGKILL)
    assert again.returncode == 1
    assert "error: e2e-prefix-s101: another process is making it" in err
    process.communicate()
    finish(tmp_path, run)
