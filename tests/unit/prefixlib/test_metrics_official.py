"""Published scores of real system outputs, which the official scorers gave: E2E, WebNLG 2017, DART, XSum.

The figures are copied from the scorers' own output files, which lie beside the system outputs. The longest runs are
left to PREFIX_TUNING_SLOW=1.
"""

import csv
import os
import shutil

import pytest

from prefixlib.metrics import bleu, meteor, nist, score_task
from prefixlib.metrics.base import Unavailable

slow = pytest.mark.skipif(os.environ.get("PREFIX_TUNING_SLOW") != "1", reason="PREFIX_TUNING_SLOW=1 runs it")
BLEU = {  # multi-bleu, lower-cased, three references: bleu3ref-*.txt
    "Baseline": {"all": 33.24, "old": 52.39, "new": 6.13},
    "GKB_Unimelb": {"all": 45.13, "old": 54.52, "new": 33.27},
    "UPF-TALN": {"all": 38.65, "old": 40.88, "new": 35.70},
}
TER = {  # tercom 7.25: ter3ref-*.txt
    "Baseline": {"all": 0.6130803717457806, "old": 0.44864834134000403, "new": 0.8072923224133149},
    "GKB_Unimelb": {"all": 0.47440303246041, "old": 0.4025981409363541, "new": 0.5592123486012133},
    "UPF-TALN": {"all": 0.5593273171576449, "old": 0.559126183234316, "new": 0.559564877999647},
}
METEOR = {"all": 0.3763962007897742, "old": 0.41464200677574886, "new": 0.3322133982986484}  # meteor-GKB_Unimelb_*
E2E = {  # the official e2e scorer's, *.scores.csv
    "seed10_epoch7": {"BLEU": 0.7145, "NIST": 8.4414, "CIDEr": 2.3798, "ROUGE-L": 0.7384, "METEOR": 0.4726},
    "seed1_epoch16": {"BLEU": 0.7109, "NIST": 8.5236, "CIDEr": 2.4766, "ROUGE-L": 0.7404, "METEOR": 0.4811},
}
PERCENT = ("BLEU", "ROUGE-L", "METEOR")
ROUGE_155 = {"ROUGE-1": 31.27, "ROUGE-2": 11.07, "ROUGE-L": 25.23}  # convs2s-test-output.rouge, F1


def lines(path) -> list[str]:
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def webnlg(data_dir, system: str, part: str):
    """Hypotheses and their three references (an empty line where there are fewer)."""
    folder = data_dir / "scoring" / "webnlg"
    references = [lines(folder / "references" / f"gold-{part}-cat-reference{k}.lex") for k in range(3)]
    hypotheses = lines(folder / "systems" / f"{system}_{part}-cat.txt")
    return hypotheses, [list(texts) for texts in zip(*references, strict=True)]


def e2e(data_dir, system: str):
    """Hypotheses and the raw references of each meaning representation, in order of first occurrence."""
    groups = {}
    with open(data_dir / "e2e_data" / "csv" / "devset.csv", newline="", encoding="utf-8") as rows:
        for row in csv.DictReader(rows):
            groups.setdefault(row["mr"], []).append(row["ref"])
    return lines(data_dir / "scoring" / "e2e" / f"{system}.txt"), list(groups.values())


def dart(data_dir):
    folder = data_dir / "scoring" / "dart"
    references = [lines(folder / f"all-delex-reference{k}.lex") for k in range(3)]
    return lines(folder / "bart-large_dart.txt"), [list(texts) for texts in zip(*references, strict=True)]


@pytest.fixture
def meteor_tables():
    """Skips where the package with METEOR's tables is not installed."""
    try:
        meteor.find_jar()
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("system", E2E)
def test_e2e_to_four_digits(data_dir, system):
    hypotheses, references = e2e(data_dir, system)
    assert (len(hypotheses), sum(map(len, references))) == (547, 4672)
    scores = score_task("e2e", hypotheses, references, metrics=["BLEU", "NIST", "ROUGE-L", "CIDEr"])
    printed = {name: round(value / 100 if name in PERCENT else value, 4) for name, value in scores.items()}
    assert printed == {name: E2E[system][name] for name in scores}
    assert len(printed) == 4


def test_e2e_of_outputs_cut_short(data_dir):
    # Both published systems are longer than their references. Cut to 15 words an output, seed1_epoch16 has 8,191
    # tokens. NIST: 8,191 * (4,672 references / 547 inputs) / 113,789 tokens of theirs = 0.614826; penalty 0.368782.
    # BLEU: nearest references of 11,116 tokens: exp(1 - 11,116 / 8,191).
    # The scores are those of a plain transcription of mteval's formulas, made apart from this package.
    hypotheses, references = e2e(data_dir, "seed1_epoch16")
    cut = [" ".join(text.split()[:15]) for text in hypotheses]
    nist_rows, bleu_rows = (metric.statistics(cut, references).sum(axis=0) for metric in (nist.METRIC, bleu.MTEVAL))
    assert nist_rows[:4].tolist() == [8191, 113789, 4672, 547]
    assert bleu_rows[:2].tolist() == [8191, 11116]
    scores = score_task("e2e", cut, references, metrics=["BLEU", "NIST"])
    assert scores == pytest.approx({"BLEU": 51.09144481743075, "NIST": 3.2611103810377826}, abs=1e-9)


@pytest.mark.parametrize("system", BLEU)
def test_webnlg_bleu_of_three_files_each(data_dir, system):
    found = {part: score_task("webnlg", *webnlg(data_dir, system, part), metrics=["BLEU"]) for part in BLEU[system]}
    assert {part: round(scores["BLEU"], 2) for part, scores in found.items()} == BLEU[system]
    assert len(found) == 3


def check_ter(data_dir, system, part):
    found = score_task("webnlg", *webnlg(data_dir, system, part), metrics=["TER"])
    assert found["TER"] == pytest.approx(TER[system][part], abs=1e-9)


def test_webnlg_ter_of_one_all_cat_file(data_dir):
    check_ter(data_dir, "Baseline", "all")


@slow
@pytest.mark.parametrize("part", ["all", "old", "new"])
@pytest.mark.parametrize("system", TER)
def test_webnlg_ter_of_every_file(data_dir, system, part):
    check_ter(data_dir, system, part)


def test_webnlg_seen_and_unseen_add_up_to_all(data_dir):
    # The parts' files joined, with a category each, must give all three official figures in one call.
    (seen, seen_references), (unseen, unseen_references) = (
        webnlg(data_dir, "Baseline", part) for part in ("old", "new")
    )
    categories = ["Food"] * len(seen) + ["Artist"] * len(unseen)
    hypotheses, references = seen + unseen, seen_references + unseen_references
    scores = score_task("webnlg", hypotheses, references, categories=categories, metrics=["BLEU"])
    assert {name: round(value, 2) for name, value in scores.items()} == {
        "BLEU seen": 52.39,
        "BLEU unseen": 6.13,
        "BLEU all": 33.24,
    }


def test_dart_bleu(data_dir):
    hypotheses, references = dart(data_dir)
    assert len(hypotheses) == 5097
    # the published figure: multi-bleu, three references
    assert round(score_task("dart", hypotheses, references, metrics=["BLEU"])["BLEU"], 2) == 48.56


@slow
def test_dart_ter(data_dir):
    assert round(score_task("dart", *dart(data_dir), metrics=["TER"])["TER"], 3) == 0.447  # tercom's


def test_meteor_of_the_first_segments(data_dir, meteor_tables):
    hypotheses, references = webnlg(data_dir, "GKB_Unimelb", "all")
    rows = meteor.statistics(hypotheses[:150], references[:150])
    # the official jar's statistics (-ssOut) of the first three and its score of all 150
    assert rows[:3].tolist() == [
        [11, 11, 4, 4, 7, 7, 3, 3, *[0] * 12, 2, 10, 10],
        [23, 23, 7, 7, 16, 16, 7, 7, *[0] * 12, 0, 23, 23],  # word for word: its chunk does not count
        [18, 15, 7, 5, 10, 10, 5, 5, *[0] * 12, 4, 15, 15],
    ]
    assert float(meteor.combine(rows.sum(axis=0))) == pytest.approx(0.5340511996169814, abs=1e-12)


@slow
@pytest.mark.parametrize("part", METEOR)
def test_webnlg_meteor(data_dir, meteor_tables, part):
    found = score_task("webnlg", *webnlg(data_dir, "GKB_Unimelb", part), metrics=["METEOR"])
    assert found["METEOR"] == pytest.approx(METEOR[part], abs=1e-12)


@slow
@pytest.mark.parametrize("system", E2E)
def test_e2e_meteor(data_dir, meteor_tables, system):
    found = score_task("e2e", *e2e(data_dir, system), metrics=["METEOR"])
    assert round(found["METEOR"] / 100, 4) == E2E[system]["METEOR"]


@slow
def test_meteor_agrees_with_the_jar_on_every_segment(data_dir, meteor_tables):
    if shutil.which("java") is None:
        pytest.skip("no Java runtime")
    # untokenised text with the punctuation of real writing: E2E's first references against the others
    _, references = e2e(data_dir, "seed1_epoch16")
    texts = [texts[0] for texts in references if len(texts) > 1]
    others = [texts[1:] for texts in references if len(texts) > 1]
    assert len(texts) > 400
    assert (meteor.statistics(texts, others) == meteor.jar_statistics(texts, others)).all()


def xsum(data_dir, count: int | None = None):
    folder = data_dir / "scoring" / "xsum"
    gold = lines(folder / "gold-test-sentences.txt")[:count]
    return lines(folder / "convs2s-test-output.txt")[:count], [[text] for text in gold]


def test_rouge_is_rouge_scores_own(data_dir):
    from rouge_score.rouge_scorer import RougeScorer

    hypotheses, references = xsum(data_dir, 300)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    whole = [scorer.score(texts[0], hypothesis) for hypothesis, texts in zip(hypotheses, references, strict=True)]
    own = [100 * sum(each[kind].fmeasure for each in whole) / 300 for kind in ("rouge1", "rouge2", "rougeL")]
    assert list(score_task("xsum", hypotheses, references).values()) == pytest.approx(own, abs=1e-9)


@slow
def test_rouge_stays_within_the_stated_distance_of_rouge_155(data_dir):
    scores = score_task("xsum", *xsum(data_dir))
    for name, official in ROUGE_155.items():
        assert 0.02 <= round(official - scores[name], 2) <= 0.43
