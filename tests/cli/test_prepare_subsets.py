"""scripts/prepare_data.py lowdata, xsum_news, xsum_news_sport: what is drawn and split, and what is refused."""

import json
import logging

import pytest

from prefixlib.data.tasks import read_records
from prefixlib.system.errors import UserError
from prepare.subsets import topic_of
from scripts import prepare_data
from tests.conftest import ROOT, run_command

SCRIPT = ROOT / "scripts" / "prepare_data.py"
DEMO = ROOT / "data" / "demo" / "e2e_data"


def draw(source, output, *more):
    prepare_data.main(["lowdata", "--source", str(source), "--output_dir", str(output), *map(str, more)])


def test_lowdata_draws_lines_of_the_training_set(tmp_path):
    draw(DEMO, tmp_path, "--sizes", 50, 100, "--samples", 1, 2)
    folder = tmp_path / "e2e_lowdata"
    names = {f"lowdata_{size}_{sample}_{split}.txt" for size in (50, 100) for sample in (1, 2)
             for split in ("train", "valid")}  # fmt: skip
    assert {path.name for path in folder.iterdir()} == names
    assert len(names) == 8
    drawn = {name: (folder / name).read_text().splitlines() for name in names}
    for split, share in (("train", 1.0), ("valid", 0.3)):
        lines = (DEMO / f"src1_{split}.txt").read_text().splitlines()
        for size in (50, 100):
            one, two = (drawn[f"lowdata_{size}_{sample}_{split}.txt"] for sample in (1, 2))
            assert len(one) == len(two) == round(share * size)
            assert one != two
            places = [lines.index(line) for line in one]
            assert places == sorted(places)  # in the file's order, each line once
            assert len(read_records("data2text", folder / f"lowdata_{size}_1_{split}.txt")) == len(one)
    assert set(drawn["lowdata_50_1_train.txt"]) - set(drawn["lowdata_100_1_train.txt"])  # drawn anew for each size


def test_lowdata_is_the_same_whatever_else_is_drawn(tmp_path):
    draw(DEMO, tmp_path / "a", "--sizes", 20, 30, "--samples", 1, 2, 3)
    draw(DEMO, tmp_path / "b", "--sizes", 30, "--samples", 3)
    for split in ("train", "valid"):
        one, other = ((tmp_path / x / f"e2e_lowdata/lowdata_30_3_{split}.txt").read_text() for x in "ab")
        assert one == other


def test_lowdata_of_summaries_keeps_pairs_together(tmp_path):
    source = tmp_path / "xsum"
    source.mkdir()
    for split in ("train", "val"):
        for ending in ("source", "target"):
            (source / f"{split}.{ending}").write_text("".join(f"{split} {n} {ending}\n" for n in range(40)))
    draw(source, tmp_path / "out", "--of", "xsum", "--sizes", 10, "--samples", 1)
    for split, count in (("train", 10), ("valid", 3)):
        stem = tmp_path / "out/xsum_lowdata" / f"lowdata_10_1_{split}"
        sources, targets = (stem.with_suffix(f".{ending}").read_text().splitlines() for ending in ("source", "target"))
        assert len(sources) == count
        assert [text.replace("source", "target") for text in sources] == targets


# ---- XSum by topic -----------------------------------------------------------------------------------------------

URLS = {
    "http://www.bbc.co.uk/news/world-europe-36040123": "world",
    "https://www.bbc.com/news/uk-england-london-123": "uk",
    "http://www.bbc.co.uk/news/business-1": "business",
    "http://www.bbc.co.uk/news/science-environment-22": "science",
    "http://www.bbc.co.uk/sport/football/3": "sport",
    "http://www.bbc.co.uk/sport/0/rugby-union/3": "sport",
    "http://news.bbc.co.uk/sport2/hi/football/4.stm": "sport",
    "http://news.bbc.co.uk/1/hi/business/5.stm": "business",
    "http://news.bbc.co.uk/2/hi/uk_news/6.stm": "uk",
    "http://web.archive.org/web/2016/http://www.bbc.co.uk/news/technology-9": "technology",
    "http://www.bbc.co.uk/programmes/x": "",
    "Sports": "sport",
    " World \n": "world",
    "": "",
}


@pytest.mark.parametrize("text", URLS)
def test_the_topic_of_an_address(text):
    assert topic_of(text) == URLS[text]


TOPICS = ["world", "uk", "business", "health", "technology", "sport", "sport"]


@pytest.fixture
def by_topic(tmp_path):
    """Seven articles in each split, each named by split and topic; topics beside them as addresses."""
    folder = tmp_path / "xsum"
    folder.mkdir()
    for split in ("train", "val", "test"):
        for ending in ("source", "target"):
            (folder / f"{split}.{ending}").write_text("".join(f"{split} {t} {ending}\n" for t in TOPICS))
        urls = [
            f"http://www.bbc.co.uk/{'' if t == 'sport' else 'news/'}{t}{'/' if t == 'sport' else '-'}1" for t in TOPICS
        ]
        (folder / f"{split}.url").write_text("".join(f"{url}\n" for url in urls))
    return folder


SPLITS = {  # within news: trained on world, UK, business, tested on the other news; else trained on all news
    ("xsum_news", "xsum_news"): (["world", "uk", "business"], ["health", "technology"]),
    ("xsum_news_sport", "xsum_topic-news-sports"): (TOPICS[:5], ["sport", "sport"]),
}


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("how", ["url", "topic", "id", "rows", "rows with ids"])
def test_articles_go_where_their_topic_belongs(name, how, by_topic, tmp_path, caplog):
    more = []
    urls = {split: (by_topic / f"{split}.url").read_text().splitlines() for split in ("train", "val", "test")}
    if how != "url":
        for split in urls:
            (by_topic / f"{split}.url").unlink()
    if how == "topic":
        for split in urls:
            (by_topic / f"{split}.topic").write_text("\n".join(TOPICS))  # without the last newline
    if how in ("id", "rows with ids"):
        rows = [{"id": f"{split}{n}", "url": url} for split, texts in urls.items() for n, url in enumerate(texts)]
        (tmp_path / "urls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        more = ["--urls", str(tmp_path / "urls.jsonl")]
    if how == "id":
        for split, texts in urls.items():
            (by_topic / f"{split}.id").write_text("".join(f"{split}{n}\n" for n in range(len(texts))))
    if how.startswith("rows"):
        for split, texts in urls.items():
            label = (lambda n, url, s=split: {"id": f"{s}{n}"}) if more else (lambda n, url: {"url": url})
            rows = [{"document": f"{split} {t} source", "summary": f"{split} {t} target", **label(n, url)}
                    for n, (t, url) in enumerate(zip(TOPICS, texts, strict=True))]  # fmt: skip
            (by_topic / f"{'validation' if split == 'val' else split}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in rows)
            )
            for ending in ("source", "target"):
                (by_topic / f"{split}.{ending}").unlink()
    with caplog.at_level(logging.INFO):
        prepare_data.main([name[0], "--source", str(by_topic), "--output_dir", str(tmp_path / "out"), *more])
    trained, tested = SPLITS[name]
    for split, topics in (("train", trained), ("val", trained), ("test", tested)):
        for ending in ("source", "target"):
            lines = (tmp_path / "out" / name[1] / f"{split}.{ending}").read_text().splitlines()
            assert lines == [f"{split} {topic} {ending}" for topic in topics]
    assert f"{name[0]} train: {len(trained)} of 7 articles (sport 2, world 1" in caplog.text
    assert len(list((tmp_path / "out").rglob("*.*"))) == 6


def test_articles_without_a_topic_are_counted_and_left_out(by_topic, tmp_path, caplog):
    urls = (by_topic / "train.url").read_text().splitlines()
    (by_topic / "train.url").write_text("\n".join(["http://www.bbc.co.uk/programmes/x", *urls[1:]]) + "\n")
    prepare_data.main(["xsum_news", "--source", str(by_topic), "--output_dir", str(tmp_path / "out")])
    assert (tmp_path / "out/xsum_news/train.source").read_text() == "train uk source\ntrain business source\n"
    assert "xsum_news train: 1 articles without a topic left out" in caplog.text


def break_it(folder, how):
    """Spoil the folder of articles; returns what the one line must say."""
    if how == "no topics":
        (folder / "val.url").unlink()
        return "val.source: topics are missing: put val.url or val.topic beside it"
    if how == "too few topics":
        (folder / "test.url").write_text("sport\n")
        return "test.source: 7 articles but 1 topics beside it: one a line"
    if how == "no sports":
        (folder / "test.url").write_text("world\n" * 7)
        return "no article of test is in xsum_news_sport; topics found: world 7"
    if how == "no split":
        (folder / "val.source").unlink()
        return "no valid split: X.source with X.target, or the hub's rows"
    (folder / "train.jsonl").write_text('{"document": "a"}\n')
    return "train.jsonl:1: expected the texts document and summary, found document"


@pytest.mark.parametrize("how", ["no topics", "too few topics", "no sports", "no split", "row"])
def test_bad_topics_are_one_line_and_leave_nothing(how, by_topic, tmp_path):
    message = break_it(by_topic, how)
    result = run_command(SCRIPT, "xsum_news_sport", "--source", by_topic, "--output_dir", tmp_path / "out")
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("lowdata --source SRC --sizes 600 --samples 1", "src1_train.txt: 502 examples, too few to sample 600"),
        ("lowdata --source SRC --sizes 500 --samples 1", "src1_valid.txt: 120 examples, too few to sample 150"),
        ("lowdata --source nowhere", "nowhere/src1_train.txt: no such file for mode data2text"),
        ("lowdata --sizes 3", "--sizes 3: at least 4"),
        ("e2e --sizes 50", "--sizes and e2e do not go together: it is for lowdata"),
        ("lowdata --urls x", "--urls and lowdata do not go together"),
        ("xsum_news --of e2e", "--of and xsum_news do not go together"),
    ],
)
def test_wrong_flags_are_one_line(argv, message, tmp_path):
    with pytest.raises(UserError) as caught:
        prepare_data.main([*argv.replace("SRC", str(DEMO)).split(), "--output_dir", str(tmp_path / "out")])
    assert message in str(caught.value)
    assert not list(tmp_path.rglob("*.txt"))


def test_lowdata_of_webnlg_draws_texts_marked_good(tmp_path):
    """Whole entries, triples and category included, with the drawn texts alone; in the file's order, none twice."""
    entries = []
    for n in range(12):
        texts = [{"comment": comment, "lex": f"text {n} {k}"} for k, comment in enumerate(("good", "bad", "good"))]
        triples = [{"subject": f"s{n}", "property": "p", "object": "o"}]
        entry = {"category": "City", "modifiedtripleset": triples, "lexicalisations": texts, "size": "1"}
        entries.append({str(n): entry})
    source = tmp_path / "webnlg"
    source.mkdir()
    for split in ("train", "dev"):
        (source / f"{split}.json").write_text(json.dumps({"entries": entries}))
    draw(source, tmp_path / "out", "--of", "webnlg", "--sizes", 20, "--samples", 1, 2)
    folder = tmp_path / "out" / "webnlg_lowdata"
    good = [record for record in read_records("webnlg", source / "train.json") if record.trainable]
    assert len(good) == 24
    one, two = (read_records("webnlg", folder / f"lowdata_20_{sample}_train.json") for sample in (1, 2))
    assert len(one) == len(two) == 20
    assert one != two
    assert one == [record for record in good if record in one]
    assert len(read_records("webnlg", folder / "lowdata_20_1_valid.json")) == 6
    with pytest.raises(UserError, match=r"train\.json: 24 examples, too few to sample 25"):
        draw(source, tmp_path / "out", "--of", "webnlg", "--sizes", 25, "--samples", 1)
