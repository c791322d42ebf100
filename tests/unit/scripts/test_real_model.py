"""Tables with a base model of the user's choice: commands that the launchers take, names everywhere, rates from dev."""

import json
from dataclasses import replace

import pytest

import reproduce
from paper import real_model, report
from paper.real_model import Base, build, chosen_rates, rebuild
from paper.training_runs import Settings, runs_of
from prefixlib.settings.flags import spelled
from prefixlib.system.errors import UserError
from tests.unit.scripts.test_experiments import check_words

RATES = {"prefix@100": 1e-3, "finetune@100": 3e-5, "prefix@500": 3e-4, "finetune@500": 1e-5}
RATES |= {"top2@100": 1e-4, "adapter-3@100": 1e-3, "adapter-0.1@100": 3e-3}
BASE = Base("smollm2-135m", real_model.SHAPES["smollm2-135m"], test_sources=20, rates=RATES)
ROWS = {"rates": 21, "lowdata": 8, "unseen": 5, "init": 6, "length": 5, "placement": 3}


def runs(name, folder, base=BASE):
    experiment = build(name, base)
    given = Settings(folder, folder / "data", gpt2_model=base.name, own_base=True)
    made = [run for row in experiment.rows for run in runs_of(experiment, row, given, "_smollm2-135m", 1, 2)]
    for run in made:
        (run.folder / "best").mkdir(parents=True, exist_ok=True)
    return made


def test_every_experiment_is_walked():
    assert {name: len(build(name, BASE).rows) for name in real_model.EXPERIMENTS} == ROWS


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("precision", ["yes", "no"])
def test_the_launchers_take_every_command(name, tmp_path, precision):
    made, counted = runs(name, tmp_path, replace(BASE, bf16=precision)), 0
    for run in made:
        parsed = [check_words(words) for words in run.steps()]
        counted += len(parsed)
        train = parsed[1]
        assert train.model_name_or_path == "smollm2-135m"
        for flag, value in run.row.train.items():
            assert spelled(getattr(train, flag)) == value
        assert train.train_file.startswith(str(tmp_path / "drawn_data"))  # the user's data folder is left as it is
        if run.row.decoded:
            assert (parsed[2].decode_limit, parsed[2].reference_loss, parsed[2].bf16) == (20, "yes", precision)
            assert parsed[2].length_normalization == "output"
    assert len(made) == 2 * ROWS[name]
    assert counted == len(made) * (2 if name == "rates" else 3)


def test_every_row_names_the_model_and_none_quotes_the_paper():
    for name in ROWS:
        experiment = build(name, BASE)
        assert "smollm2-135m" in experiment.title
        assert all("smollm2-135m" in row.name and not row.paper for row in experiment.rows)
        assert len({row.key for row in experiment.rows}) == len(experiment.rows)
        assert rebuild(name, json.loads(json.dumps(experiment.own))) == experiment
    assert "smollm2-135m" in real_model.caption(BASE)
    assert "first 20 test inputs" in real_model.caption(BASE)
    assert "in bfloat16" in real_model.caption(BASE)
    assert "in float32" in real_model.caption(replace(BASE, bf16="no"))
    assert "test inputs" not in real_model.caption(Base("x", (1, 1, 1)))


def test_a_shared_run_is_the_same_run(tmp_path):
    """The low-data table and that of the starts take the search's winner, which is trained once."""
    search = {run.folder: run.recipe() for run in runs("rates", tmp_path)}
    shared = [run for name in ("lowdata", "init") for run in runs(name, tmp_path) if run.row.home]
    assert len(shared) == 2 * (4 + 1)
    for run in shared:
        assert search[run.folder] == run.recipe()
    folders = [run.folder for name in ROWS for run in runs(name, tmp_path) if not run.row.home]
    assert len(set(folders)) == len(folders)


def test_the_steps_are_the_papers():
    steps = {(row.size, row.tuning_mode): row.train["max_steps"] for row in build("lowdata", BASE).rows}
    assert [steps[n, "prefixtune"] for n in (50, 100, 200, 500)] == [200, 200, 200, 400]
    assert [steps[n, "finetune"] for n in (50, 100, 200, 500)] == [100, 100, 200, 400]
    budgets = {row.train["max_steps"] for row in build("unseen", BASE).rows}
    assert budgets == {200}  # one budget for every method


def test_the_lowest_dev_loss_chooses_the_rate_at_each_size():
    losses = {"100-prefix-lr0.001": 49.5, "100-prefix-lr0.0003": 49.6, "100-prefix-lr0.003": 60.0}
    losses |= {"500-prefix-lr0.001": 189.0, "500-prefix-lr0.0003": 42.0, "500-adapter-0.1-lr1e-05": 1.0}
    entries = {key: {"row": f"e2e-{key}", "scores": {"dev loss": loss}} for key, loss in losses.items()}
    assert chosen_rates(entries) == {"prefix@100": 1e-3, "prefix@500": 3e-4, "adapter-0.1@500": 1e-5}
    with pytest.raises(UserError, match="no learning rate is chosen for finetune@100 examples yet: run"):
        build("lowdata", Base("x", (2, 32, 1000), rates={"prefix@100": 1e-3}))


def test_a_size_takes_the_rate_of_the_nearest_searched_size():
    rates = {row.size: row.train["learning_rate"] for row in build("lowdata", BASE).rows if "prefix" in row.name}
    assert rates == {50: 1e-3, 100: 1e-3, 200: 1e-3, 500: 3e-4}
    assert {row.train["learning_rate"] for row in build("length", BASE).rows} == {3e-4}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["unseen"], "unseen is for a base model of your own: pass --size smollm2"),
        (["table1", "--size", "smollm2"], "table1 has no rows for a base model of your own"),
        (["lowdata", "--size", "smollm2", "--demo", "yes"], "and --demo do not go together"),
        (["lowdata", "--size", "smollm2", "--gpt2_model", "x"], "and --gpt2_model do not go together"),
        (["lowdata", "--size", "smollm2", "--model_name_or_path", "x"], "both name a base model"),
        (["lowdata", "--test_sources", "5"], "--size medium and --test_sources do not go together"),
        (["lowdata", "--size", "smollm2", "--budget_examples", "5"], "lowdata has training sets of fixed sizes"),
        (["unseen", "--size", "smollm2", "--test_sources", "0"], "--test_sources 0: must be above 0"),
    ],
)
def test_what_does_not_go_together(argv, message):
    with pytest.raises(UserError, match=message):
        reproduce.parse_args(argv)


def test_no_folder_is_shared_with_another_setting():
    """What changes a result stands in the name of the folder and of the tables."""
    command = ["length", "--size", "smollm2"]
    labels = {
        reproduce.label_of(reproduce.parse_args([*command, *more]))
        for more in ([], ["--test_sources", "5"], ["--budget_examples", "5"], ["--max_steps", "5"])
    }
    labels |= {reproduce.label_of(reproduce.parse_args(["length", *more])) for more in ([], ["--size", "large"])}
    other = ["length", "--model_name_or_path", "/models/My Model.gguf"]
    labels.add(reproduce.label_of(reproduce.parse_args(other)))
    assert len(labels) == 7
    assert "_smollm2-135m_n5" in labels
    assert "_My-Model.gguf" in labels


def test_tables_prints_what_is_there(tmp_path, capsys):
    experiment = build("lowdata", BASE)
    entry = {"row": "e2e-50-prefix", "recipe": {}, "scores": {"BLEU": 12.34, "loss": 1.5}, "trained_parameters": 7}
    report.write(experiment, {"a": entry}, tmp_path / "lowdata_smollm2-135m_t20", "the command", "the caption")
    assert reproduce.main(["tables", "--output_dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "### Low data: E2E with smollm2-135m\n\nthe caption\n" in out
    assert "| prefix, 50 examples (smollm2-135m), here | 12.3 | n/a | n/a | n/a | n/a | 1.500 | 7 | 1 |" in out
    assert "### Low data: E2E with GPT-2 medium" in out  # the paper's, apart


def test_the_summary_for_the_readme(tmp_path):
    """Means over the draws, methods side by side; rows without a run are said; the rest of the page stays."""

    def keep(name, scores):
        experiment = build(name, BASE)
        entries = {
            f"{n}": {"row": experiment.rows[row].key, "recipe": [], "scores": found, "trained_parameters": 10**row}
            for n, (row, found) in enumerate(scores)
        }
        entries = {n: {**entry, "stored_parameters": 7} for n, entry in entries.items()}
        report.write(experiment, entries, results / f"{name}_smollm2-135m_t20", "made so", "")

    results, page = tmp_path / "results", tmp_path / "README.md"
    page.write_text("before\n<!-- results: written -->\nold\n<!-- end of results -->\nafter\n")
    keep("lowdata", [(0, {"BLEU": 40.04, "loss": 2}), (0, {"BLEU": 50.04, "loss": 1}), (1, {"BLEU": 60, "loss": 1})])
    keep("unseen", [(0, {"BLEU seen": 1, "BLEU unseen": 2, "BLEU all": 3, "METEOR all": 0.5, "TER all": 0.25})])
    keep("length", [(1, {"BLEU": 12.34})])
    keep("placement", [(0, {"BLEU": 5.0})])
    ours = {"losses": [3.0, 2.0], "base_model": {"name": "a model"}}
    ours |= {"seconds": [1.0, 2.0, 0.5], "peak_memory_bytes": {"host": 21 * 10**8}}
    peft = {**ours, "seconds": [4.0, 4.0, 4.0], "peak_memory_bytes": {"host": 3 * 10**9}}
    found = {"parts": {"ours": ours, "PEFT": peft}, "largest_relative_difference": 2.4e-6}
    (results / "compare_peft_x.json").write_text(json.dumps(found))
    assert reproduce.main(["summary", "--output_dir", str(results)]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "\n| 50 | 45.0 | 60.0 | not run | not run | 1.500 | 1.000 | 1 / 2 |\n" in text
    assert "\n| prefix | 1 | 7 | 1.0 | 2.0 | 3.0 | 0.50 | 0.25 |\n" in text
    line = (
        "(results/length_smollm2-135m_t20.md), smollm2-135m, 500 training examples: P 1: not run, P 5: 12.3, P 10: not"
    )
    assert line in text
    lines = text.split("\n* ")
    assert len(lines) == 4
    assert lines[2].startswith("[Place of the trained vectors")
    assert lines[3].startswith(
        "[The same prefix through PEFT](results/compare_peft_x.md), a model: losses within 2e-06 over 2 steps; "
        "1.00 s a step and 2.1 GB here, 4.00 s a step and 3.0 GB there.\n"
    )
    assert "Start of the prefix" not in text
