"""The paper's experiments: every command is one the launchers take; the tables say what the numbers are."""

import itertools
import json

import pytest

import reproduce
from gpt2 import gen, run_generation, train_e2e
from paper import report
from paper.experiments import EXPERIMENTS, ONE_SIZE, build
from paper.recipes import DEV, METHODS, SHAPES, TABLE1, adapter_bottleneck
from paper.training_runs import Run, RunFailed, Settings, runs_of
from prefixlib.settings.flags import spelled
from scripts import prepare_data
from seq2seq import train_bart

SIZES = ("medium", "large", "demo")
ALL = [(name, size) for name, size in itertools.product(EXPERIMENTS, SIZES) if size != "large" or name not in ONE_SIZE]
# rows of each experiment: medium, large, demo (which has no XSum by topic and too few texts to draw 500)
ROWS = {
    "table1": (15, 6, 15),
    "table2": (3, 0, 3),
    "xsum": (2, 0, 2),
    "lowdata": (16, 16, 6),
    "extrapolation": (9, 6, 5),
    "length": (12, 12, 12),
    "embedding-only": (4, 4, 4),
    "infix": (4, 4, 4),
    "init": (9, 9, 9),
}


def one_run_each(name, size, folder, **settings):
    """A run of every row, with its folder and its best checkpoint there, as after a training."""
    experiment = build(name, size)
    made = []
    for row in experiment.rows:
        label = "" if size == "medium" else f"_{size}"
        model = "gpt2-large" if size == "large" else "gpt2-medium"
        given = Settings(folder, demo=size == "demo", gpt2_model=model, **settings)
        made += runs_of(experiment, row, given, label, 1, 1)
    for run in made:
        (run.folder / "best").mkdir(parents=True, exist_ok=True)
    return made


def check_words(words):
    """Let the launcher of a command parse it."""
    script, argv = words[0], words[1:]
    if script == "gpt2/train_e2e.py":
        return train_e2e.parse_args(argv).settings
    if script == "gpt2/gen.py":
        child = gen.build_command(*gen.parse_args(argv))
        return run_generation.make_parser().parse_args(child[2:])
    if script == "seq2seq/train_bart.py":
        return train_bart.parse_args(argv).settings
    assert script == "scripts/prepare_data.py"
    return prepare_data.parse_args(argv)


def test_every_experiment_is_walked():
    assert len(ALL) == 9 * 3 - 2
    assert {name: tuple(len(build(name, size).rows) if (name, size) in ALL else 0 for size in SIZES)
            for name in EXPERIMENTS} == ROWS  # fmt: skip


@pytest.mark.parametrize(("name", "size"), ALL)
@pytest.mark.parametrize("passed_on", [{}, {"max_steps": 3, "bf16": "yes", "gradient_checkpointing": "yes"}])
def test_the_launchers_take_every_command(name, size, passed_on, tmp_path):
    runs = one_run_each(name, size, tmp_path, passed_on=passed_on)
    seen = 0
    for run in runs:
        steps = run.steps()
        parsed = [check_words(words) for words in steps]
        seen += len(steps)
        assert parsed[-2].output_dir == str(run.folder)
        for flag, value in run.row.train.items():  # what the row says reaches the launcher
            if size != "demo" and flag not in passed_on and flag != "eval_steps" and (flag, passed_on) != ("fp16", {}):
                got = spelled(getattr(parsed[-2], flag))
                assert got == value or (flag == "fp16" and passed_on), (flag, got, value)
    low = sum(run.row.size > 0 for run in runs)
    assert seen == 2 * len(runs) + low == 2 * ROWS[name][SIZES.index(size)] + low


def test_every_experiment_can_be_asked_for_by_its_rows():
    for name, size in ALL:
        keys = [row.key for row in build(name, size).rows]
        assert len(set(keys)) == len(keys)
        assert len(reproduce.choose_rows(build(name, size), keys)) == len(keys)


def test_shared_runs_are_the_same_run(tmp_path):
    """A row that shares a run with another table must ask for just that run."""
    shared = 0
    for name, size in ALL:
        for run in one_run_each(name, size, tmp_path):
            if run.row.home:
                (twin,) = (r for r in one_run_each(run.row.home, size, tmp_path) if r.row.key == run.row.key)
                assert (run.folder, run.recipe()) == (twin.folder, twin.recipe())
                shared += 1
    # extrapolation 5 + 2 + 5, embedding-only and infix 3 each, xsum 2
    assert shared == 12 + 6 + 2


def test_adapters_have_the_share_they_are_called_by():
    # design 1, per layer: LayerNorm 2E, down Eb + b, up bE + E; b 100 in GPT-2 medium is known to be 4,991,328
    def count(b, layers, width):
        return layers * (2 * width + width * b + b + b * width + width)

    assert count(100, 24, 1024) == 4_991_328
    widths = {size: [adapter_bottleneck(share, *SHAPES[size]) for share in (0.03, 0.001)] for size in SHAPES}
    assert widths == {"medium": [215, 6], "large": [250, 7], "demo": [28, 1]}
    assert count(215, 24, 1024) == 10_646_568  # 3.0005 % of 354,823,168
    assert count(6, 24, 1024) == 368_784  # 0.104 %


def test_the_papers_numbers_fit_their_columns():
    assert len(TABLE1) == 15 + 6
    assert {method for _, _, method in TABLE1} == set(METHODS)
    columns = {"E2E": 5, "WebNLG": 9, "DART": 6}
    assert all(len(numbers) == columns[task] for (_, task, _), numbers in TABLE1.items())
    rows = {row.key: row for row in build("extrapolation").rows}
    assert rows["webnlg-prefix"].paper == (45.3, 0.37, 0.51)  # BLEU, METEOR, TER of the unseen categories
    assert not any(row.paper or row.dev for name in EXPERIMENTS for row in build(name, "demo").rows)
    assert DEV.keys() == TABLE1.keys()
    columns = {"E2E": {5}, "WebNLG": {3}, "DART": {6, 1}}  # DART's large rows have BLEU alone
    assert {task: {len(numbers) for (_, of, _), numbers in DEV.items() if of == task} for task in columns} == columns
    rows = {row.key: row for row in build("table1").rows}
    assert rows["webnlg-prefix"].dev == (None, None, 64.52, None, None, 0.46, None, None, 0.32)


def test_the_recipes_are_the_papers():
    table1, table2 = ({row.key: row.train for row in build(name).rows} for name in ("table1", "table2"))
    wanted = {"e2e-prefix": (8e-5, 5, 10, 5), "webnlg-prefix": (5e-5, 5, 5, 5), "dart-prefix": (5e-5, 10, 5, 10)}
    names = ("learning_rate", "epoch", "bsz", "preseqlen")
    assert {key: tuple(table1[key][name] for name in names) for key in wanted} == wanted
    assert tuple(table2["xsum-prefix-2"][name] for name in (*names, "mid_dim")) == (5e-5, 30, 14, 100, 800)
    assert build("table2").rows[1].decode == {"num_beams": 6, "length_pen": 0.8}
    low = {row.size: row.train["max_steps"] for row in build("lowdata").rows if row.tree == "gpt2"}
    assert low == {50: 200, 100: 200, 200: 200, 500: 400}


SIZES_OF_LOW_DATA = (50, 100, 200, 500)


def test_low_data_recipes_are_the_papers():
    """Appendix A.2: fine-tuning has steps, epochs and a batch of its own; a dev set chooses the checkpoint."""
    rows = {row.key: row for row in build("lowdata").rows}

    def settings(name, method):
        return {flag: tuple(rows[f"{name}-{n}-{method}"].train.get(flag) for n in SIZES_OF_LOW_DATA)
                for flag in ("max_steps", "epoch", "bsz", "learning_rate", "warmup_steps")}  # fmt: skip

    table = {"epoch": (None,) * 4, "bsz": (10,) * 4, "learning_rate": (5e-5,) * 4, "warmup_steps": (100,) * 4}
    assert settings("e2e", "prefix") == {**table, "max_steps": (200, 200, 200, 400)}
    assert settings("e2e", "finetune") == {**table, "max_steps": (100, 100, 200, 400)}
    summary = {**table, "max_steps": (None,) * 4}
    assert settings("xsum", "prefix") == {**summary, "epoch": (30, 20, 20, 20), "bsz": (5,) * 4}
    assert settings("xsum", "finetune") == {**summary, "epoch": (30, 10, 3, 3), "bsz": (6,) * 4}
    assert {row.train["lowdata_token"] for row in rows.values() if row.tuning_mode == "prefixtune"} == {
        "table-to-text:", "summarize"}  # fmt: skip
    assert len(rows) == 16
    assert all(row.best for row in rows.values())  # early stopping
    assert all(row.train["keep_best"] == "yes" for row in rows.values() if row.tree == "gpt2")


def test_low_data_dev_sets_are_three_tenths_of_the_training_set(tmp_path):
    source = tmp_path / "e2e_data"
    source.mkdir()
    for split in ("train", "valid"):
        (source / f"src1_{split}.txt").write_text("".join(f"name : {n}||{n} .\n" for n in range(600)))
    for size, dev in zip(SIZES_OF_LOW_DATA, (15, 30, 60, 150), strict=True):
        made = prepare_data.draw_lowdata("e2e", source, size, 1, tmp_path)
        assert [len(path.read_text().splitlines()) for path in made] == [size, dev]
    (run,) = runs_of(build("lowdata"), build("lowdata").rows[0], Settings(tmp_path), "", 1, 1)
    words = run.train_words()
    assert words[words.index("--eval_file") + 1].endswith("lowdata_50_1_valid.txt")


def test_initialisations_are_compared_on_a_hundred_examples():
    rows = {row.key: row for row in build("init").rows}
    assert {row.size for row in rows.values()} == {100}
    assert rows["random"].train["init_random"] == "uniform"
    assert "use_lowdata_token" not in rows["random"].train
    words = {"active", "elephant", "summarize", "table-to-text", "banana", "beautiful", "divide", "keep"}
    assert set(rows) == {"random"} | words


# ---- tables ------------------------------------------------------------------------------------------------------


def entry(row, seed, **scores):
    return {
        **{"row": row, "seed": seed, "recipe": {}, "scores": scores, "trained_parameters": 1000},
        **{"device": "cpu", "versions": {"commit": "abc"}, "dev_loss": [[50, 3.0 + seed], [100, 2.0 + seed]]},
    }


def test_mean_and_standard_deviation_by_hand():
    # 70, 71, 72.5: mean 71.1666…; squares of the distances 1.3611 + 0.0278 + 1.7778 = 3.1667; / 2; root
    mean, sd = report.mean_and_sd([70.0, 71.0, 72.5])
    assert (round(mean, 4), round(sd, 4)) == (71.1667, 1.2583)
    assert report.mean_and_sd([70.0]) == (70.0, None)


def test_the_table_says_who_says_what():
    entries = {
        str(n): entry("e2e-prefix", n, BLEU=bleu, NIST=8.5, METEOR=None, CIDEr=2.0)
        for n, bleu in enumerate((70.0, 71.0, 72.5))
    }
    text = report.as_markdown(build("table1"), entries, "python scripts/reproduce.py table1")
    assert "| prefix 0.1 % (paper, quoted) | 70.3 | 8.82 | 46.3 | 72.1 | 2.46 |  |  |\n" in text
    assert "| prefix 0.1 % (paper, dev set, quoted) | 74.8 | 8.80 | 49.4 | 76.8 | 2.69 |  |  |\n" in text
    dev = "| top-2 layers (paper, dev set, quoted) | — | — | 54.6 | — | — | 0.39 | — | — | 0.47 |  |  |\n"
    assert dev in text
    assert text.count("dev set, quoted") == 15
    assert "| prefix 0.1 %, here | 71.2 ± 1.3 | 8.50 ± 0.00 | n/a | n/a | 2.00 ± 0.00 | 1,000 | 3 |\n" in text
    assert "| fine-tune, here | not run |  |  |  |  |  | 0 |\n" in text
    assert "| adapter 3 % (paper, quoted) | 45.2 | 0.38 | 0.46 | — | — | — |  |  |\n" in text
    assert text.endswith("over the runs. Device: cpu. Code: abc.\n")
    assert text.count("not run") == 14


PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("name", "keys", "plots"),
    [
        ("length", ("e2e-p1", "e2e-p10"), ["x_E2E.png"]),
        ("lowdata", ("e2e-50-prefix", "e2e-500-finetune", "xsum-50-prefix"), ["x_E2E.png", "x_XSum.png"]),
        ("init", ("random", "keep"), ["x_E2E.png"]),
        ("table1", ("e2e-prefix",), []),
    ],
)
def test_plots_where_the_paper_has_figures(name, keys, plots, tmp_path):
    scores = {"BLEU": 60.0, "NIST": 8.0, "ROUGE-L": 70.0, "CIDEr": 2.0, "ROUGE-1": 30.0}
    entries = {f"{key}-{n}": entry(key, n, **scores) for key in keys for n in (1, 2)}
    assert [path.name for path in report.draw(build(name), entries, tmp_path / "x")] == plots
    assert sorted(path.name for path in tmp_path.iterdir()) == plots
    assert all((tmp_path / plot).read_bytes().startswith(PNG) for plot in plots)


def test_results_of_another_recipe_are_not_taken(tmp_path):
    """An earlier table keeps what it has of other rows; of a selected row it keeps the same recipe only."""
    experiment = build("length")
    runs = [run for run in one_run_each("length", "medium", tmp_path) if run.row.key in ("e2e-p1", "e2e-p3", "e2e-p10")]
    same, changed, other = (dict(entry(run.row.key, 101), recipe=run.recipe()) for run in runs)
    changed["recipe"] = other["recipe"] = {"train": "something else", "decode": ""}
    path = tmp_path / "length.json"
    path.write_text(json.dumps({"runs": {r.name: e for r, e in zip(runs, (same, changed, other), strict=True)}}))
    kept = report.collect(experiment, runs, {"e2e-p1", "e2e-p3"}, path)
    assert list(kept) == ["e2e-p1-s101", "e2e-p10-s101"]


@pytest.mark.parametrize("text", ["{", "[]", '{"runs": {"a": {}}}', ""])
def test_a_broken_table_is_one_line(text, tmp_path):
    (tmp_path / "length.json").write_text(text)
    with pytest.raises(RunFailed) as caught:
        report.read_results(tmp_path / "length.json")
    assert str(tmp_path / "length.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tables_of_results_that_are_there(tmp_path, capsys):
    (tmp_path / "init.json").write_text(
        json.dumps({"command": "the command", "caption": "", "runs": {"a": entry("keep", 101, BLEU=12.34)}})
    )
    assert reproduce.main(["tables", "--output_dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "| “keep”, here | 12.3 | n/a | n/a | n/a | n/a | 1,000 | 1 |\n" in out
    assert out.count("\n### ") + out.startswith("### ") == 10  # nine, and table1 for GPT-2 large
    assert "Made by `the command`" in out


def test_a_recipe_does_not_depend_on_where_things_lie(tmp_path):
    (row,) = (row for row in build("lowdata").rows if row.key == "e2e-50-prefix")

    def recipe(root, **settings):
        return Run(row, root / "runs" / "x", 101, 1, Settings(root / "runs", root / "data", **settings)).recipe()

    assert recipe(tmp_path / "a") == recipe(tmp_path / "b")
    assert "DATA/lowdata_50_1_train.txt" in recipe(tmp_path / "a")["train"]
    assert recipe(tmp_path, gpt2_model="other") != recipe(tmp_path)
    assert recipe(tmp_path, passed_on={"bf16": "yes"}) != recipe(tmp_path)
