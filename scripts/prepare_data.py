"""Put a data set under data/ in the original's file names, from its public source or from files you have:

python scripts/prepare_data.py webnlg
python scripts/prepare_data.py e2e --source ~/Downloads/e2e-dataset
python scripts/prepare_data.py webnlg --source ~/Downloads/release_v3.0/en --lang en
python scripts/prepare_data.py lowdata --sizes 50 100            # samples of a prepared set
python scripts/prepare_data.py xsum_news --urls ids_and_urls.jsonl

Every file is made in a scratch folder, read back with training's reader and counted, and only then moved to its place.
"""

import argparse
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from prefixlib.data.tasks import data_file, iter_records
from prefixlib.settings.flags import Parser, add_number
from prefixlib.system.errors import UserError, one_line_errors
from prefixlib.system.places import data_folder
from prepare.convert import convert_dart, convert_documents, convert_e2e, convert_webnlg
from prepare.sources import BY_HAND, Fetcher, from_archive, from_files, from_hub, unpack
from prepare.subsets import SAMPLED, TOPIC_SPLITS, draw_lowdata, split_by_topic
from prepare.webnlg_xml import LANGUAGE

log = logging.getLogger("prepare_data")
ARCHIVES = (".zip", ".tar", ".gz", ".tgz")


@dataclass(frozen=True)
class DataSet:
    """One data set: its reader, its source, and the way its files are made."""

    mode: str  # the task that reads it and names its files
    texts: dict[str, int]  # split -> texts (summaries) as published
    fetch: Fetcher
    convert: Callable[..., Path | None]  # see prepare/convert.py
    wanted: str  # what a --source folder may hold


E2E = "https://raw.githubusercontent.com/tuetschek/e2e-dataset/master/"
WEBNLG = (
    "https://gitlab.com/shimorina/webnlg-dataset/-/archive/master/webnlg-dataset-master.zip?path=webnlg_challenge_2017"
)
DART = "https://raw.githubusercontent.com/Yale-LILY/dart/master/data/v1.1.1/"
DOCUMENTS = (
    "{train,val,test}.source with .target, or the hub's rows as {train,validation,test}.json, .jsonl or .parquet"
)

DATASETS = {
    "e2e": DataSet(
        "data2text",
        {"train": 42061, "valid": 4672, "test": 4693},
        from_files(E2E, "trainset.csv", "devset.csv", "testset_w_refs.csv"),
        convert_e2e,
        "trainset.csv, devset.csv, testset_w_refs.csv (columns mr and ref), or src1_{train,valid,test}.txt; or "
        "the cleaned train-fixed.no-ol.csv, devel-fixed.no-ol.csv, test-fixed.csv",
    ),
    "webnlg": DataSet(
        "webnlg",
        {"train": 18102, "valid": 2268, "test": 4928},
        from_archive(WEBNLG),
        convert_webnlg,
        "folders train, dev, test with the 2017 challenge's XML, testdata_with_lex.xml, or {train,dev,test}.json",
    ),
    "dart": DataSet(
        "triples",
        {"train": 62659, "valid": 6980, "test": 12552},
        from_files(DART, *(f"dart-v1.1.1-full-{split}.json" for split in ("train", "dev", "test"))),
        convert_dart,
        "dart-v1.1.1-full-{train,dev,test}.json",
    ),
    "xsum": DataSet(
        "xsum",
        {"train": 204045, "valid": 11332, "test": 11334},
        from_hub("EdinburghNLP/xsum"),
        convert_documents,
        DOCUMENTS,
    ),
    "cnn_dm": DataSet(
        "cnndm",
        {"train": 287113, "valid": 13368, "test": 11490},
        from_hub("abisee/cnn_dailymail", "3.0.0"),
        convert_documents,
        DOCUMENTS,
    ),
}


def open_source(source: Path, scratch: Path) -> Path:
    """The folder to look in: the source folder itself, an unpacked archive, or a folder that holds the one file."""
    if source.is_dir():
        return source
    if not source.exists():
        raise UserError(f"--source {source}: no such file or folder")
    if source.suffix in ARCHIVES:
        return unpack(source, scratch)
    (scratch / source.name).symlink_to(source.resolve())
    return scratch


def count_texts(mode: str, path: Path) -> int:
    """Read the file as training will; returns the number of its texts. Raises UserError as the readers do."""
    records = tqdm(iter_records(mode, path), desc=f"checking {path.name}", unit=" texts", disable=None)
    return sum(bool(record.target.strip()) for record in records)


def make_splits(name: str, source: Path | None, scratch: Path, output_dir: Path, lang: str) -> list[tuple[Path, Path]]:
    """Make the set's files under scratch and check them; returns (file made, its place) pairs. Raises UserError.

    The public source must give every split with its published number of texts. Your own files may be any splits, and
    another number is a warning.
    """
    dataset = DATASETS[name]
    (scratch / "source").mkdir()
    folder = dataset.fetch(scratch / "source") if source is None else open_source(source, scratch / "source")
    made = []
    for split, published in dataset.texts.items():
        target, place = (data_file(dataset.mode, split, root) for root in (scratch / "made", output_dir))
        target.parent.mkdir(parents=True, exist_ok=True)
        how = {"lang": lang} if dataset.convert is convert_webnlg else {}
        ready = dataset.convert(folder, split, target, **how)
        if ready is None:
            continue
        count = count_texts(dataset.mode, ready)
        if count != published:
            message = f"{place}: {count:,} texts, where the published {split} split has {published:,}"
            if source is None:
                raise UserError(f"{message}; nothing was written; {BY_HAND}")
            log.warning("%s", message)
        else:
            log.info("%s: %s texts", place, f"{count:,}")
        for suffix in {target.suffix, target.suffix.replace("source", "target")}:
            if ready != target:
                shutil.copyfile(ready.with_suffix(suffix), target.with_suffix(suffix))
            made.append((target.with_suffix(suffix), place.with_suffix(suffix)))
    splits = {place.stem for _, place in made}
    if not made or (source is None and len(splits) < len(dataset.texts)):
        origin = f"--source {source}" if source else "the public source"
        raise UserError(f"{origin}: found {', '.join(sorted(splits)) or 'none'} of: {dataset.wanted}")
    return made


def prepare(name: str, source: Path | None, output_dir: Path, lang: str = LANGUAGE) -> list[Path]:
    """Make, check and move in the set's files; returns their places. An interrupted run leaves the earlier files."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=output_dir) as folder:
        scratch = Path(folder)
        try:
            made = make_splits(name, source, scratch, output_dir, lang)
        except UserError as error:  # name the user's files, not the scratch copies
            origin = (
                (source.parent if source.suffix in (".csv", ".txt", ".json", ".jsonl", ".xml", ".parquet") else source)
                if source
                else name
            )
            message = str(error).replace(str(scratch / "source"), str(origin))
            raise UserError(message.replace(str(scratch / "made"), str(output_dir))) from None
        for file, place in made:
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
    return [place for _, place in made]


def prepare_subset(args: argparse.Namespace) -> list[Path]:
    """Make low-data samples, or split XSum by topic, and move the files in when all are made; returns their places."""
    output_dir = args.output_dir
    prepared = {"e2e": "e2e_data", "webnlg": "webnlg_challenge_2017", "xsum": "xsum"}
    lowdata = args.dataset == "lowdata"
    source = args.source or data_folder() / prepared[args.of if lowdata else "xsum"]
    folder = f"{args.of}_lowdata" if lowdata else TOPIC_SPLITS[args.dataset].folder
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=output_dir) as scratch:
        if lowdata:
            made = []
            for size in args.sizes:
                for sample in args.samples:
                    made += draw_lowdata(args.of, source, size, sample, Path(scratch))
                log.info("%s: %d examples, samples %s", output_dir / folder, size, " ".join(map(str, args.samples)))
        else:
            made = split_by_topic(args.dataset, source, args.urls, Path(scratch))
        places = [output_dir / folder / file.name for file in made]
        for file, place in zip(made, places, strict=True):
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
    return places


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Command line -> settings. Raises UserError for flags of another set."""
    parser = Parser(description="Put a data set under data/ in the original's file names.")
    parser.add_argument(
        "dataset",
        choices=(*DATASETS, "lowdata", *TOPIC_SPLITS),
        help="which set; sizes, licences and sources: data/README.md. lowdata, xsum_news and xsum_news_sport are "
        "parts of a set that is there already",
    )
    parser.add_argument(
        "--source",
        type=Path,
        help="a folder, archive or file you have, instead of the public source; any of the splits will do. Parts: the "
        "folder of the whole set (default: data/e2e_data, data/xsum)",
    )
    parser.add_argument(
        "--output_dir", type=Path, default=data_folder(), help="where the set's folder goes (default: data)"
    )
    parser.add_argument("--of", choices=tuple(SAMPLED), help="lowdata: of which set (default: e2e)")
    add_number(parser, "--sizes", nargs="+", help="lowdata: training examples (default: 50 100 200 500)")
    add_number(parser, "--samples", above=0, nargs="+", help="lowdata: numbers of the samples (default: 1 2 3 4 5)")
    parser.add_argument("--lang", help="webnlg: the language of the texts, of which release 3.0 has two (default: en)")
    parser.add_argument("--urls", type=Path, help='xsum_news, xsum_news_sport: lines {"id": ..., "url": ...}')
    args = parser.parse_args(argv)
    for name, default in (("of", "e2e"), ("sizes", [50, 100, 200, 500]), ("samples", [1, 2, 3, 4, 5])):
        if getattr(args, name) is not None and args.dataset != "lowdata":
            raise UserError(f"--{name} and {args.dataset} do not go together: it is for lowdata")
        setattr(args, name, getattr(args, name) or default)
    if args.lang is not None and args.dataset != "webnlg":
        raise UserError(f"--lang and {args.dataset} do not go together: it is for webnlg")
    if args.urls and args.dataset not in TOPIC_SPLITS:
        raise UserError(f"--urls and {args.dataset} do not go together: it is for {' and '.join(TOPIC_SPLITS)}")
    if min(args.sizes) < 4:
        raise UserError(f"--sizes {min(args.sizes)}: at least 4, so that 0.3 x 4 = 1 is for the dev set")
    args.source = args.source and args.source.expanduser()
    args.urls = args.urls and args.urls.expanduser()
    return args


def main(argv: list[str]) -> None:
    """Prepare one data set."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.dataset in DATASETS:
        prepare(args.dataset, args.source, args.output_dir, args.lang or LANGUAGE)
    else:
        prepare_subset(args)


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
