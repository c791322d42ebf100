"""Parts of a prepared data set: low-data samples, and XSum's articles by topic. Used by scripts/prepare_data.py."""

import itertools
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prefixlib.data.tasks import iter_records
from prefixlib.system.errors import UserError
from prepare.convert import HUB_NAMES, find

log = logging.getLogger("prepare_data")

DEV_SHARE = 0.3  # of the training examples, as in the paper's low-data sets
SAMPLED = {  # set -> mode, file of a split in its folder, endings that belong together
    "e2e": ("data2text", "src1_{}.txt", {"train": "train", "valid": "valid"}, ("txt",)),
    "webnlg": ("webnlg", "{}.json", {"train": "train", "valid": "dev"}, ("json",)),
    "xsum": ("xsum", "{}.source", {"train": "train", "valid": "val"}, ("source", "target")),
}


def draw_lowdata(of: str, source: Path, size: int, sample: int, folder: Path) -> list[Path]:
    """Write lowdata_SIZE_SAMPLE_{train,valid} into `folder`: `size` training lines and 0.3 x as many dev lines.

    Lines are sampled without replacement and keep the file's order. A line is one (input, text) pair, so only some
    texts of an input may be in the sample. In WebNLG's JSON, texts marked good are sampled. The sample depends on its
    size and number alone. Raises UserError for a missing or malformed file, or one that is too small.
    """
    mode, pattern, splits, endings = SAMPLED[of]
    made = []
    for split, name in splits.items():
        path = source / pattern.format(name)
        records = iter_records(mode, path)  # also checks every line
        total = sum(1 for record in records if endings != ("json",) or (record.trainable and record.target.strip()))
        wanted = size if split == "train" else round(DEV_SHARE * size)
        if wanted > total:
            raise UserError(f"{path}: {total:,} examples, too few to sample {wanted:,}")
        chosen = set(random.Random(f"{size}-{sample}-{split}").sample(range(total), wanted))
        for ending in endings:
            target = folder / f"lowdata_{size}_{sample}_{split}.{ending}"
            if ending == "json":
                _copy_webnlg(path, chosen, target)
                made.append(target)
                continue
            with open(target, "w", encoding="utf-8", newline="\n") as file:
                for number, line in enumerate(_full_lines(path.with_suffix(f".{ending}"))):
                    if number in chosen:
                        file.write(line + "\n")
            made.append(target)
    return made


def _copy_webnlg(path: Path, chosen: set[int], target: Path) -> None:
    """Write a WebNLG file's entries with the `chosen` texts: indices into all texts marked good, in file order."""
    numbers, kept = itertools.count(), []
    for numbered in json.loads(path.read_text(encoding="utf-8-sig"))["entries"]:
        for key, entry in numbered.items():
            good = [text for text in entry["lexicalisations"] if text.get("comment") == "good" and text["lex"].strip()]
            texts = [text for text in good if next(numbers) in chosen]
            if texts:
                kept.append({key: {**entry, "lexicalisations": texts}})
    target.write_text(json.dumps({"entries": kept}, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _full_lines(path: Path) -> Iterator[str]:
    """The lines that are not blank, without their newlines."""
    with open(path, encoding="utf-8-sig") as lines:
        for line in lines:
            if line.strip():
                yield line.removesuffix("\n")


# ---- XSum by topic -----------------------------------------------------------------------------------------------

WITHIN_NEWS = frozenset({"world", "uk", "business"})  # trained on in the paper; its test set is the rest of the news


@dataclass(frozen=True)
class TopicSplit:
    """The topics of training (and validation) and those of testing; None: every news topic."""

    folder: str  # under data/, where seq2seq looks for it
    train: frozenset[str] | None
    test: frozenset[str] | None

    def wants(self, split: str, topic: str) -> bool:
        """Whether an article of this topic is in the split."""
        if split == "test":
            if self.test is not None:
                return topic in self.test
            return topic != "sport" and topic not in (self.train or ())
        return topic in self.train if self.train is not None else topic != "sport"


TOPIC_SPLITS = {
    "xsum_news": TopicSplit("xsum_news", WITHIN_NEWS, None),
    "xsum_news_sport": TopicSplit("xsum_topic-news-sports", None, frozenset({"sport"})),
}


def topic_of(text: str) -> str:
    """A BBC address's topic (".../news/world-europe-123" -> world, ".../sport/football/1" -> sport), or a plain topic.

    "" for an address without one.
    """
    text = text.strip().lower()
    if "/" not in text:
        return {"sports": "sport"}.get(text, text)
    if re.search(r"/sport\d?/", text):
        return "sport"
    # news/uk-wales-1, news/science-environment-1; before 2010: 1/hi/business/1.stm or 2/hi/uk_news/1.stm
    found = re.search(r"/news/([a-z]+)", text) or re.search(r"/hi/(?:english/)?([a-z]+)", text)
    return found[1] if found else ""


def split_by_topic(name: str, source: Path, urls: Path | None, folder: Path) -> list[Path]:
    """Write {train,val,test}.source and .target of the split into `folder`; articles without a topic are left out.

    Raises UserError if topics are missing, do not fit the articles, or leave a split empty.
    """
    rule, by_id = TOPIC_SPLITS[name], read_urls(urls) if urls else {}
    made = []
    for split, written in (("train", "train"), ("valid", "val"), ("test", "test")):
        kept, unknown = 0, 0
        topics: Counter[str] = Counter()
        targets = [folder / f"{written}.{ending}" for ending in ("source", "target")]
        with (
            open(targets[0], "w", encoding="utf-8", newline="\n") as sources,
            open(targets[1], "w", encoding="utf-8", newline="\n") as summaries,
        ):
            for document, summary, topic in articles(source, split, by_id):
                unknown += not topic
                topics[topic or "unknown"] += 1
                if topic and rule.wants(split, topic):
                    kept += 1
                    sources.write(document + "\n")
                    summaries.write(summary + "\n")
        common = ", ".join(f"{topic} {count:,}" for topic, count in topics.most_common(8))
        log.info("%s %s: %s of %s articles (%s)", name, split, f"{kept:,}", f"{topics.total():,}", common)
        if unknown:
            log.warning("%s %s: %s articles without a topic left out", name, split, f"{unknown:,}")
        if not kept:
            raise UserError(f"{source}: no article of {split} is in {name}; topics found: {common}")
        made += targets
    return made


def read_urls(path: Path) -> dict[str, str]:
    """{"id": ..., "url" or "topic": ...} lines -> topic by id. Raises UserError naming the line."""
    topics = {}
    for number, row in _json_lines(path):
        text = row.get("url", row.get("topic"))
        if not isinstance(text, str) or "id" not in row:
            raise UserError(f'{path}:{number}: expected {{"id": ..., "url": ...}}, found {json.dumps(row)[:60]}')
        topics[str(row["id"])] = topic_of(text)
    return topics


def _json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with open(path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not JSON: {error.msg}") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: expected an object a line, found {str(row)[:60]}")
            yield number, row


def articles(source: Path, split: str, by_id: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yield (document, summary, topic) of a split: the hub's rows, or X.source with X.target and a file of topics.

    That file is X.url or X.topic beside X.source (an address or a topic a line), or X.id with --urls.
    """
    rows = find(source, *(f"{name}.jsonl" for name in HUB_NAMES[split]))
    if rows:
        for number, row in _json_lines(rows):
            document, summary = (row.get(name) for name in ("document", "summary"))
            if not isinstance(document, str) or not isinstance(summary, str):
                raise UserError(f"{rows}:{number}: expected the texts document and summary, found {', '.join(row)}")
            texts = [re.sub(r"\s*[\r\n]+\s*", " ", text).strip() for text in (document, summary)]
            if all(texts):
                own = topic_of(str(row.get("url") or row.get("topic") or ""))
                yield texts[0], texts[1], own or by_id.get(str(row.get("id")), "")
        return
    path = find(source, *(f"{name}.source" for name in HUB_NAMES[split]))
    if not path:
        raise UserError(f"--source {source}: no {split} split: X.source with X.target, or the hub's rows as X.jsonl")
    labels = _labels_beside(path, by_id)
    records = list(iter_records("xsum", path))
    if len(labels) != len(records):
        raise UserError(f"{path}: {len(records):,} articles but {len(labels):,} topics beside it: one a line")
    for record, topic in zip(records, labels, strict=True):
        yield record.source, record.target, topic


def _labels_beside(path: Path, by_id: dict[str, str]) -> Sequence[str]:
    for ending in ("url", "topic", "id"):
        beside = path.with_suffix(f".{ending}")
        if beside.is_file():
            lines = beside.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
            return [by_id.get(line.strip(), "") if ending == "id" else topic_of(line) for line in lines]
    raise UserError(
        f"{path}: topics are missing: put {path.stem}.url or {path.stem}.topic beside it (an address or a topic a "
        f"line), or {path.stem}.id and pass --urls"
    )
