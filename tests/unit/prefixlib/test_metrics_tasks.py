"""score_task: which figures come out, refusals, unavailable metrics; and how sure they are."""

import subprocess
import sys

import numpy as np
import pytest

from prefixlib.metrics import learned, meteor, score_task, shown, tasks
from prefixlib.metrics.base import Metric, mean
from prefixlib.metrics.bootstrap import interval, paired
from prefixlib.metrics.tasks import Measured
from prefixlib.system.errors import UserError

TEXTS = ["Aarhus Airport serves the city of Aarhus.", "Bacon is an ingredient.", "Alan Bean was born in Texas."]
PLAIN = ["BLEU", "TER"]


def test_importing_the_metrics_is_cheap():
    heavy = ["nltk", "sacrebleu", "torch", "numpy", "rouge_score", "transformers"]
    code = f"import sys, prefixlib.metrics; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_perfect_output_of_every_task():
    references = [[text] for text in TEXTS]
    e2e = score_task("e2e", TEXTS, references, metrics=["BLEU", "NIST", "ROUGE-L", "CIDEr"])
    assert list(e2e) == ["BLEU", "NIST", "ROUGE-L", "CIDEr"]
    assert (e2e["BLEU"], e2e["ROUGE-L"], e2e["CIDEr"]) == pytest.approx((100, 100, 10))
    assert score_task("dart", TEXTS, references, metrics=PLAIN) == {"BLEU": pytest.approx(100), "TER": 0}
    for task in ("xsum", "cnn_dm"):
        assert score_task(task, TEXTS, references) == {"ROUGE-1": 100, "ROUGE-2": 100, "ROUGE-L": 100}


def test_each_task_is_on_the_scale_of_the_papers_table():
    # the paper prints E2E's METEOR as 46.2 and ROUGE-L as 71.7, WebNLG's and DART's METEOR as .44 and TER as .35
    spans = {name: {metric.name: metric.span for metric in tasks.TASKS[name].metrics} for name in tasks.TASKS}
    percent, lower = "0-100", "from 0, lower is better"
    e2e = {"BLEU": percent, "NIST": "from 0", "METEOR": percent, "ROUGE-L": percent, "CIDEr": "0-10"}
    triples = {"BLEU": percent, "METEOR": "0-1", "TER": lower}
    rouge = dict.fromkeys(("ROUGE-1", "ROUGE-2", "ROUGE-L"), percent)
    assert (spans["e2e"], spans["webnlg"], spans["xsum"], spans["cnn_dm"]) == (e2e, triples, rouge, rouge)
    assert spans["dart"] == {**triples, **dict.fromkeys(("MoverScore", "BERTScore", "BLEURT"), "0-1")}
    # what is said of a scale is what a perfect output gets on it
    for name in ("e2e", "webnlg", "xsum"):
        for figure in tasks.measure(name, TEXTS, [[text] for text in TEXTS]):
            top = {percent: 100, "0-1": 1, "0-10": 10, lower: 0}.get(figure.metric.span)
            assert figure.rows is None or top is None or figure.score() == pytest.approx(top), figure.name


def test_scores_are_printed_with_four_digits():
    values = {"BLEU": 45.1294, "TER": 1.00756, "METEOR": None, "both": {"a": 0.123456, "b": 3.0}}
    assert shown(values) == "BLEU 45.13  TER 1.008  METEOR n/a  both a 0.1235  b 3"


def test_modes_name_their_tasks():
    assert tasks.find_task("data2text") is tasks.TASKS["e2e"]
    assert tasks.find_task("triples") is tasks.TASKS["dart"]
    assert tasks.find_task("cnndm") is tasks.TASKS["cnn_dm"]


def test_webnlg_splits_by_category_and_gives_what_exists():
    references = [[text] for text in TEXTS]
    outputs = [TEXTS[0], TEXTS[1], "x"]
    scores = score_task("webnlg", outputs, references, categories=["Airport", "Food", "Artist"], metrics=PLAIN)
    assert list(scores) == ["BLEU seen", "BLEU unseen", "BLEU all", "TER seen", "TER unseen", "TER all"]
    assert (scores["BLEU seen"], scores["BLEU unseen"], scores["TER seen"], scores["TER unseen"]) == (
        pytest.approx((100, 0, 0, 1))
    )
    assert scores["TER all"] == pytest.approx(7 / (8 + 5 + 7))
    dev = score_task("webnlg", outputs, references, categories=["Airport", "Food", "City"], metrics=PLAIN)
    assert list(dev) == ["BLEU seen", "BLEU all", "TER seen", "TER all"]
    own = score_task("webnlg", outputs, references, categories=["a", "b", "b"], seen_categories=["a"], metrics=["TER"])
    assert own["TER seen"] == 0
    assert list(score_task("webnlg", outputs, references, categories=["", "", ""], metrics=PLAIN)) == PLAIN


def test_the_seen_categories_are_those_of_the_2017_training_data():
    seen = {"Airport", "Astronaut", "Building", "City", "ComicsCharacter", "Food", "Monument"}
    assert seen | {"SportsTeam", "University", "WrittenWork"} == tasks.SEEN_CATEGORIES


def test_e2e_knows_no_empty_references():
    # parallel files have an empty line where an input has fewer references: not a text of length 0 to be near to
    long = "The Mill is a cheap pub near the river ."
    outputs, references = ["The Mill is a cheap", TEXTS[0]], [[long], [TEXTS[0]]]
    filled = [["", long, " "], [TEXTS[0], "", ""]]
    names = ["BLEU", "NIST", "ROUGE-L", "CIDEr"]
    assert score_task("e2e", outputs, filled, metrics=names) == score_task("e2e", outputs, references, metrics=names)


def test_webnlg_uses_three_references():
    references = [["x y z w", "x y z w", "x y z w", TEXTS[0]]]
    assert score_task("webnlg", TEXTS[:1], references, metrics=["TER"])["TER"] == 2


def test_refusals_name_both_numbers_and_the_choices():
    with pytest.raises(UserError, match="3 hypotheses but 2 groups of references"):
        score_task("e2e", TEXTS, [["a"], ["b"]])
    with pytest.raises(UserError, match="3 hypotheses but 1 categories"):
        score_task("webnlg", TEXTS, [["a"]] * 3, categories=["Food"])
    with pytest.raises(UserError, match="0 hypotheses"):
        score_task("e2e", [], [])
    with pytest.raises(UserError, match="task 'squad': unknown; one of e2e, webnlg"):
        score_task("squad", TEXTS, [["a"]] * 3)
    with pytest.raises(UserError, match=r"metric 'METEORR': this task has BLEU, METEOR, TER, METEOR-jar"):
        score_task("webnlg", TEXTS, [["a"]] * 3, metrics=["METEORR"])


def test_without_its_package_meteor_is_none_and_says_what_to_install(monkeypatch):
    monkeypatch.setattr(meteor.importlib.util, "find_spec", lambda name: None)
    table = tasks.measure("webnlg", TEXTS, [["a"]] * 3, ["Food", "Food", "Artist"], metrics=["METEOR", "TER"])
    assert [figure.name for figure in table[:3]] == ["METEOR seen", "METEOR unseen", "METEOR all"]
    assert [figure.score() for figure in table[:3]] == [None] * 3
    assert table[0].unavailable == "pip install -e .[meteor]"
    assert table[3].score() > 0


def test_the_jar_needs_java_and_is_asked_for_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(meteor, "find_jar", lambda: tmp_path)
    monkeypatch.setattr(meteor.shutil, "which", lambda name: None)
    table = tasks.measure("webnlg", TEXTS, [["a"]] * 3, metrics=["METEOR-jar"])
    assert table[0].score() is None
    assert "Java" in table[0].unavailable
    assert "METEOR-jar" not in [metric.name for metric in tasks.TASKS["webnlg"].metrics]


def test_learned_metrics_are_none_where_not_installed(monkeypatch):
    for module in ("bert_score", "moverscore_v2", "bleurt", "bleurt.score"):
        monkeypatch.setitem(sys.modules, module, None)
    names = [metric.name for metric in learned.METRICS]
    assert score_task("dart", TEXTS, [["a"]] * 3, metrics=names) == dict.fromkeys(names)


def test_meteor_of_the_official_sums():
    # GKB_Unimelb, all categories: the sums over its segments as the jar reports them (-ssOut), and its final score
    sums = [40666, 42030, 19072, 19451, 16805, 16805, 12492, 12492, 107, 107, 1, 1, 93, 102, 130, 121]
    sums += [463, 519, 818, 954, 12139, 30909, 31101]
    assert float(meteor.combine(np.array(sums, dtype=float))) == pytest.approx(0.3763962007897742, abs=1e-12)


def test_a_segment_that_is_its_reference_has_no_chunk():
    perfect = [3, 3, 1, 1, 2, 2, 1, 1, *[0] * 12, 1, 3, 3]
    partial = [4, 3, 1, 1, 2, 2, 1, 1, *[0] * 12, 1, 3, 3]
    rows = meteor.without_perfect_chunks(np.array([perfect, partial], dtype=float))
    assert rows[:, 20].tolist() == [0, 1]
    assert meteor.combine(rows[0]) == 1


MEAN = Metric("mean", None, mean)


def figure(values) -> Measured:
    return Measured("mean", MEAN, np.stack([np.array(values, dtype=float), np.ones(len(values))], axis=1))


def test_interval_of_equal_segments_has_no_width():
    assert interval(figure([0.5] * 20), 200) == pytest.approx((0.5, 0.5))


def test_interval_of_a_mean_is_its_normal_one():
    # 400 coin tosses: standard error 0.025, so 0.5 -+ 1.96 * 0.025
    low, high = interval(figure([0, 1] * 200), 4000)
    assert (low, high) == pytest.approx((0.451, 0.549), abs=0.006)
    assert interval(figure([0, 1] * 200), 4000) == (low, high)
    assert interval(Measured("mean", MEAN, None), 10) is None


def test_paired_test_of_equal_and_of_different_systems():
    generator = np.random.default_rng(0)
    values = generator.random(100)
    same = paired(figure(values), figure(values), 500)
    assert (same["difference"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1)
    better = paired(figure(values), figure(values + 0.1), 500)
    assert better["difference"] == pytest.approx(0.1)
    assert better["p"] == pytest.approx(1 / 501)
    noise = paired(figure(values), figure(generator.permutation(values)), 500)
    assert noise["low"] < 0 < noise["high"]
    assert noise["p"] > 0.9  # the same values in another order: no difference in the mean


def test_paired_p_of_a_case_that_can_be_counted():
    # 4 segments, all better by 1: of 16 swaps two give a difference of 4, so p is near 2 / 16
    result = paired(figure([0, 0, 0, 0]), figure([1, 1, 1, 1]), 4000)
    assert result["p"] == pytest.approx(0.125, abs=0.02)
