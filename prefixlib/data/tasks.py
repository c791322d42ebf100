"""One row per task: its files, reader, linearisation, lengths, decoding, metrics, folders and the paper's recipe.

    from prefixlib.data.tasks import find_task, read_records
    for record in read_records("webnlg", "data/webnlg_challenge_2017/train.json"): ...

To add a data set, add a reader to readers.py and a row here (standard library only). A task may have another name in
seq2seq/ than in gpt2/, as in the original: `e2e` is `data2text`, `cnn_dm` is `cnndm`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefixlib.data import conversations, formats, readers, tables
from prefixlib.data.readers import SEPARATOR, Group, Record, group_records
from prefixlib.data.tables import Columns
from prefixlib.system import places
from prefixlib.system.errors import UserError

SPLITS = ("train", "valid", "test")
SMALL_ADAPTERS = "adaptertune, 0.1 %"  # a second recipe of that tuning mode

# Both lists are from PPLM (Dathathri et al. 2020, Plug and Play Language Models, appendix): its 20 openings for
# topics, and eight of its fifteen for sentiment. The original used eight as well; which eight is not on record.
SENTIMENT_OPENINGS = (
    "The book", "The chicken", "The city", "The country",
    "The horse", "The lake", "The last time", "The movie",
)  # fmt: skip
TOPIC_OPENINGS = (
    "In summary", "This essay discusses", "Views on", "The connection", "Foundational to this is", "To review,",
    "In brief,", "An illustration of", "Furthermore,", "The central theme", "To conclude,", "The key aspect",
    "Prior to this", "Emphasised are", "To summarise", "The relationship", "More importantly,",
    "It has been shown", "The issue focused on", "In this essay",
)  # fmt: skip


@dataclass(frozen=True)
class InGPT2:
    """A task in gpt2/."""

    folder: str  # of its runs, named as in the original
    strategy: str = "beam"  # how it is decoded: beam, greedy or nucleus
    samples: int = 1  # outputs per input, if the strategy is sampling
    openings: tuple[str, ...] = ()  # forced first words of its outputs
    lengths: Mapping[str, int] = field(default_factory=dict)  # most tokens of a part, by flag; else the model decides
    max_new_tokens: int = 100
    num_beams: int = 5
    no_repeat_ngram_size: int = 0
    early_stopping: bool = False
    length_penalty: float = 1.0


@dataclass(frozen=True)
class InSeq2Seq:
    """A task in seq2seq/. Lengths of outputs are in tokens, the decoder's start token included."""

    name: str
    folder: str  # of its runs, named as in the original
    lengths: Mapping[str, int]  # most tokens of a part, by flag
    num_beams: int
    min_length: int
    max_length: int
    no_repeat_ngram_size: int = 3
    early_stopping: bool = True
    length_penalty: float = 1.0
    strategy: str = "beam"
    val_metric: str = "rouge2"  # chooses the best checkpoint: the original's score, or "loss"


@dataclass(frozen=True)
class Task:
    """One task. Its text is `{before}source{after}SEPARATOR{before}target{after}SEPARATOR`."""

    name: str
    read: Callable[..., Iterator[Record]]  # (path, blind); blind: files of inputs alone, all that decoding needs
    files: Mapping[str, str]  # split -> path under data/, the original's file names
    metrics: str = ""  # its row in prefixlib/metrics/tasks.py; empty: no reference-based metric
    prepare: str = ""  # the data set's name for scripts/prepare_data.py, "" if it has none
    linearise: Callable[[Any], str] | None = None  # data -> source, if an input can be data
    fields_of: Callable[[str], tuple[str, ...]] = lambda source: ()  # source -> its category words
    source_spaces: tuple[str, str] = (" ", " ")
    target_spaces: tuple[str, str] = (" ", " ")
    grouped: bool = True  # False: equal inputs are not merged, each has its own reference (classification)
    is_table: bool = False  # the input is data, not a text
    verbatim: bool = False  # texts are not changed: line breaks may be generated, nothing is stripped or cleaned
    example: str = "The text to read."  # an input, for the example in an export
    gpt2: InGPT2 | None = None
    seq2seq: InSeq2Seq | None = None
    # tree -> what is tuned -> flags: the paper's (its Tables 6 and 8) and those that suit the bundled models
    paper: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    demo_epoch: int | None = None  # --demo yes: small sets need more epochs, in every tuning mode


def _files(pattern: str, train: str = "train", valid: str = "valid", test: str = "test") -> dict[str, str]:
    return {"train": pattern.format(train), "valid": pattern.format(valid), "test": pattern.format(test)}


def _gpt2_lengths(source: int, train: int, valid: int) -> dict[str, int]:
    return {"max_source_length": source, "train_max_target_length": train, "val_max_target_length": valid}


def _lengths(source: int, train: int, valid: int, test: int) -> dict[str, int]:
    return {
        "max_source_length": source,
        "max_target_length": train,
        "val_max_target_length": valid,
        "test_max_target_length": test,
    }


def _recipe(learning_rate: float, epoch: int, bsz: int, **more: Any) -> dict[str, Any]:
    return {"learning_rate": learning_rate, "epoch": epoch, "bsz": bsz, **more}


def _gpt2_recipes(prefix, finetune, top, adapter, small_adapter) -> dict[str, Any]:
    """The paper's settings of GPT-2 on one task; adapters of 3 % (`adaptertune`) and 0.1 % of GPT-2 medium's size."""
    return {
        "prefixtune": {**prefix, "mid_dim": 512},
        "finetune": finetune,
        "finetune-top": {**top, "top_layers": 2},
        "adaptertune": {**adapter, "adapter_design": 1, "adapter_bottleneck": 215},
        SMALL_ADAPTERS: {**small_adapter, "adapter_design": 1, "adapter_bottleneck": 6},
    }


def _xsum(name: str, folder: str, source: int = 512) -> InSeq2Seq:
    """XSum, or a part of it. The original decoded every data set with these lengths."""
    return InSeq2Seq(name, folder, _lengths(source, 60, 60, 100), num_beams=6, min_length=11, max_length=62)


def _table(name: str, folder: str) -> InSeq2Seq:
    """A table: tables repeat names, and the paper's GPT-2 runs use 5 beams, no n-gram rule, no early stopping."""
    return InSeq2Seq(
        name,
        folder,
        _lengths(512, 142, 142, 142),
        num_beams=5,
        min_length=0,
        max_length=142,
        no_repeat_ngram_size=0,
        early_stopping=False,
    )


# BART's own decoding settings: n-gram rule 3, early stopping, and what its configuration lists for each kind of summary
# (task_specific_params, summarization_xsum and summarization_cnn). The paper's XSum: 6 beams, length penalty 0.8.
_XSUM_RECIPE = {"mid_dim": 800, "max_source_length": 512}
_NONE = ("", "")  # no spaces at all: source and target are tokenised, cut and joined around the separator one by one

ROWS = (
    Task(
        "data2text",
        readers.read_data2text,
        _files("e2e_data/src1_{}.txt"),
        metrics="e2e",
        prepare="e2e",
        linearise=readers.linearise_meaning,
        example="name : The Eagle | Type : pub",
        fields_of=readers.slots_of,
        is_table=True,
        gpt2=InGPT2("save_e2e_models_convcheck"),
        seq2seq=_table("e2e", "save_e2e_models"),
        paper={
            "gpt2": _gpt2_recipes(
                prefix=_recipe(8e-5, 5, 10, preseqlen=5),
                finetune=_recipe(5e-5, 5, 10),
                top=_recipe(5e-5, 5, 10),
                adapter=_recipe(5e-5, 5, 5),
                small_adapter=_recipe(8e-5, 10, 5),
            )
        },
    ),
    Task(
        "webnlg",
        readers.read_webnlg,
        _files("webnlg_challenge_2017/{}.json", valid="dev"),
        metrics="webnlg",
        prepare="webnlg",
        linearise=readers.linearise_webnlg,
        example=" | Aarhus_Airport : cityServed : Aarhus",
        fields_of=readers.relations_of,
        is_table=True,
        gpt2=InGPT2("webnlg_models"),
        seq2seq=_table("webnlg", "webnlg_models"),
        paper={
            "gpt2": _gpt2_recipes(
                prefix=_recipe(5e-5, 5, 5, preseqlen=5),
                finetune=_recipe(1e-5, 10, 6),
                top=_recipe(5e-5, 10, 9),
                adapter=_recipe(5e-5, 5, 5),
                small_adapter=_recipe(5e-5, 10, 5),
            )
        },
    ),
    Task(
        "triples",
        readers.read_dart,
        _files("dart/dart-v1.1.1-full-{}.json", valid="dev"),
        metrics="dart",
        prepare="dart",
        linearise=readers.linearise_dart,
        example="Aarhus_Airport : cityserved : Aarhus",
        fields_of=readers.relations_of,
        is_table=True,
        gpt2=InGPT2("triples_models"),
        seq2seq=_table("triples", "triples_models"),
        paper={
            "gpt2": _gpt2_recipes(
                prefix=_recipe(5e-5, 10, 5, preseqlen=10),
                finetune=_recipe(1e-5, 10, 6),
                top=_recipe(5e-5, 5, 5),
                adapter=_recipe(5e-5, 5, 5),
                small_adapter=_recipe(8e-5, 5, 5),
            )
        },
    ),
    Task(
        "xsum",
        readers.read_parallel,
        _files("xsum/{}.source", valid="val"),
        metrics="xsum",
        prepare="xsum",
        source_spaces=_NONE,
        target_spaces=_NONE,
        gpt2=InGPT2("xsum_models", lengths=_gpt2_lengths(512, 60, 60)),
        seq2seq=_xsum("xsum", "xsum_models", source=1024),
        paper={
            "seq2seq": {
                "prefixtune": _recipe(5e-5, 30, 14, preseqlen=100, **_XSUM_RECIPE, length_pen=0.8),
                # the paper quotes BART's authors here; these are its own settings for parts of XSum
                "finetune": _recipe(3e-5, 5, 18, max_source_length=512, length_pen=0.8),
            }
        },
    ),
    Task(
        "cnndm",
        readers.read_parallel,
        _files("cnn_dm/{}.source", valid="val"),
        metrics="cnn_dm",
        prepare="cnn_dm",
        source_spaces=_NONE,
        target_spaces=_NONE,
        gpt2=InGPT2("cnndm_models", lengths=_gpt2_lengths(512, 56, 142)),
        seq2seq=InSeq2Seq(
            "cnn_dm",
            "cnndm_models",
            _lengths(512, 56, 142, 142),
            num_beams=4,
            min_length=56,
            max_length=142,
            length_penalty=2.0,
        ),
        demo_epoch=40,
    ),
    Task(
        "xsum_news",
        readers.read_parallel,
        _files("xsum_news/{}.source", valid="val"),
        metrics="xsum",
        prepare="xsum_news",
        source_spaces=_NONE,
        target_spaces=_NONE,
        seq2seq=_xsum("xsum_news", "xsum_news_models"),
        paper={
            "seq2seq": {
                "prefixtune": _recipe(5e-5, 30, 36, preseqlen=80, **_XSUM_RECIPE, length_pen=0.8),
                "finetune": _recipe(3e-5, 5, 18, max_source_length=512, length_pen=0.8),
            }
        },
    ),
    Task(
        "xsum_news_sport",
        readers.read_parallel,
        _files("xsum_topic-news-sports/{}.source", valid="val"),
        metrics="xsum",
        prepare="xsum_news_sport",
        source_spaces=_NONE,
        target_spaces=_NONE,
        seq2seq=_xsum("xsum_news_sport", "xsum_news_sport_models"),
        paper={
            "seq2seq": {
                "prefixtune": _recipe(5e-5, 15, 36, preseqlen=40, **_XSUM_RECIPE, length_pen=0.8),
                "finetune": _recipe(3e-5, 5, 18, max_source_length=512, length_pen=0.8),
            }
        },
    ),
    Task(
        "writingPrompts",
        readers.read_writing_prompts,
        _files("writingPrompts/{}_small.txt"),
        gpt2=InGPT2("wp_models", "nucleus"),
        demo_epoch=30,
    ),
    # the label's own trailing space, if any, is the only space next to the separator
    Task(
        "sentiment",
        readers.labelled("|||", classify=False),
        _files("IMDB/{}.txt", valid="dev"),
        fields_of=lambda source: (source.strip(),),
        source_spaces=(" ", ""),
        target_spaces=_NONE,
        gpt2=InGPT2("sentiment_models", "nucleus", samples=3, openings=SENTIMENT_OPENINGS),
        demo_epoch=20,
    ),
    Task(
        "topic",
        readers.labelled("||", classify=False),
        _files("AG-news/{}1.tsv", valid="dev"),
        fields_of=lambda source: (source.strip(),),
        source_spaces=(" ", ""),
        target_spaces=_NONE,
        gpt2=InGPT2("topic_models", "nucleus", samples=3, openings=TOPIC_OPENINGS),
        demo_epoch=20,
    ),
    Task(
        "classify-sentiment",
        readers.labelled("|||", classify=True),
        _files("IMDB/{}.txt", valid="dev"),
        metrics="classify-sentiment",
        target_spaces=(" ", ""),
        grouped=False,
        gpt2=InGPT2("classification_models", "greedy"),
        demo_epoch=30,
    ),
    Task(
        "classify-topic",
        readers.labelled("||", classify=True),
        _files("AG-news/{}1.tsv", valid="dev"),
        metrics="classify-topic",
        target_spaces=(" ", ""),
        grouped=False,
        gpt2=InGPT2("classification_models", "greedy"),
        demo_epoch=8,
    ),
    # user data: columns of a table
    Task(
        "text",
        tables.read,
        _files("text/{}.jsonl"),
        metrics="text",
        linearise=conversations.as_chat,
        source_spaces=_NONE,
        target_spaces=_NONE,
        verbatim=True,
        gpt2=InGPT2("text_models"),
        seq2seq=InSeq2Seq(
            "text",
            "text_models",
            _lengths(1024, 512, 512, 512),
            num_beams=5,
            min_length=0,
            max_length=142,
            no_repeat_ngram_size=0,
            early_stopping=False,
            val_metric="loss",
        ),
    ),
)

# Values of --demo yes unless the command line sets others: a few settings tried by hand, no search. tree -> tuning
_DEMO_PREFIX = {"preseqlen": 10, "mid_dim": 256, "bsz": 16}
DEMO: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "gpt2": {
        "prefixtune": {**_DEMO_PREFIX, "epoch": 8, "learning_rate": 3e-3},
        "finetune": {"bsz": 16, "epoch": 5, "learning_rate": 5e-4},
        "finetune-top": {"top_layers": 2, "bsz": 16, "epoch": 8, "learning_rate": 1e-3},
        "adaptertune": {"adapter_bottleneck": 32, "bsz": 16, "epoch": 8, "learning_rate": 3e-3},
        "bothtune": {**_DEMO_PREFIX, "epoch": 5, "learning_rate": 5e-4},
    },
    "seq2seq": {
        "prefixtune": {**_DEMO_PREFIX, "epoch": 5, "learning_rate": 2e-3},
        "finetune": {"bsz": 16, "epoch": 5, "learning_rate": 5e-4},
        "finetune-top": {"top_layers": 2, "bsz": 16, "epoch": 5, "learning_rate": 1e-3},
        "adaptertune": {"adapter_bottleneck": 32, "bsz": 16, "epoch": 5, "learning_rate": 3e-3},
        "bothtune": {**_DEMO_PREFIX, "epoch": 5, "learning_rate": 5e-4},
    },
}

TASKS: Mapping[str, Task] = {row.name: row for row in ROWS}
GPT2_MODES = tuple(row.name for row in ROWS if row.gpt2)
OWN_DATA = tuple(row.name for row in ROWS if row.verbatim)
SEQ2SEQ_MODES = tuple(row.seq2seq.name for row in ROWS if row.seq2seq)
_BY_ANY_NAME = {**{row.seq2seq.name: row for row in ROWS if row.seq2seq}, **TASKS}


def find_task(mode: str) -> Task:
    """The row of a task, by its name in either tree; UserError that lists the names for any other."""
    if mode not in _BY_ANY_NAME:
        raise UserError(f"--mode {mode}: unknown; one of {', '.join(_BY_ANY_NAME)}")
    return _BY_ANY_NAME[mode]


def check_tree(mode: str | None, tree: str, where: str = "") -> None:
    """Raise UserError for a task that `tree`, "gpt2" or "seq2seq", does not have; `where` begins the message."""
    if mode is not None and getattr(find_task(mode), tree) is None:
        names = GPT2_MODES if tree == "gpt2" else SEQ2SEQ_MODES
        raise UserError(f"{where}--mode {mode}: not a task of {tree}/; one of {', '.join(names)}")


# ---- text --------------------------------------------------------------------------------------------------------


def prompt_text(mode: str, source: str, separator: str) -> str:
    """The prompt of training and decoding, e.g. `" SRC <|endoftext|>"`; UserError if the source holds `separator`."""
    before, after = find_task(mode).source_spaces
    return f"{before}{without(separator, source)}{after}{separator}"


def training_text(mode: str, source: str, target: str, separator: str) -> tuple[str, str]:
    """Prompt and continuation, whose concatenation is the original's training line.

    The loss counts the continuation alone: target and final separator (and the space before it, where there is one).
    """
    before, after = find_task(mode).target_spaces
    return prompt_text(mode, source, separator), f"{before}{without(separator, target)}{after}{separator}"


def without(separator: str, text: str) -> str:
    """The text. Raises UserError if it contains the separator."""
    if separator in text:
        start = text[:60] + ("…" if len(text) > 60 else "")
        raise UserError(f"{separator!r} separates source and target and must not occur in a text: {start!r}")
    return text


# today's tokenizers do not clean these; the published scores were computed after the cleaning
CLEAN_UP = (
    *((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'")),
    *((" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")),
)


def clean_up(text: str) -> str:
    """A decoded text as transformers 3.2 returned it, on one line.

    Spaces before punctuation and contractions are removed, newlines turned into spaces, both ends stripped.
    """
    for before, after in CLEAN_UP:
        text = text.replace(before, after)
    return " ".join(text.split("\n")).strip()


def as_group(mode: str, source: Any) -> Group:
    """An input without references, from its linearised text or from data that the task linearises.

    WebNLG and DART: (subject, relation, object) triples; E2E: a mapping or pairs of slot and value. Raises UserError
    for data where the task's inputs are texts, or of another shape.
    """
    task = find_task(mode)
    if not isinstance(source, str):
        if task.linearise is None:
            raise UserError(f"an input of mode {mode} is a text, not {source!r}")
        try:
            source = task.linearise(source)
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"an input of mode {mode} cannot be made from {source!r} ({error})") from error
    if not source.strip():
        raise UserError("an input is empty")
    if half := tables.HALF.search(source):
        raise UserError(f"an input holds half of a character ({half[0]!r}): {readers.short(str(source))}")
    return Group(source, (), "", task.fields_of(source))


# ---- files -------------------------------------------------------------------------------------------------------


def data_file(mode: str, split: str, data_dir: str | Path | None = None) -> Path:
    """The task's file for split train, valid or test.

    `data_dir` is the folder of all data sets (default: see `places.data_folder`) or the task's own folder.
    """
    files = find_task(mode).files
    if split not in files:
        raise UserError(f"split {split!r} of mode {mode}: expected one of {', '.join(files)}")
    folder = places.data_folder() if data_dir is None else Path(data_dir).expanduser()
    path, own = folder / files[split], folder / Path(files[split]).name
    return own if own.is_file() and not path.is_file() else path


def given_file(mode: str, given: str, split: str) -> Path:
    """The place that a flag names: a file, or for user data also a saved data set or one of the hub."""
    return formats.place(given, split) if find_task(mode).verbatim else Path(given).expanduser().resolve()


def is_there(mode: str, path: Path) -> bool:
    """Whether `path` can probably be read, without reading it."""
    return path.is_file() or (find_task(mode).verbatim and (path.is_dir() or formats.is_hub(path)))


def iter_records(mode: str, path: str | Path, blind: bool = False, columns: Columns | None = None) -> Iterator[Record]:
    """Yield the file's records in file order (text formats one line at a time, JSON read whole).

    blind: for decoding, which needs the inputs alone. columns: those to read, if the task's file is a table.

    Raises UserError for a missing or empty file, text not in UTF-8, a malformed line or entry, a separator in a text.
    """
    task, path = find_task(mode), Path(path)
    if not is_there(mode, path):
        raise UserError(f"{path}: no such file for mode {mode}; {where_to_get(mode)}")
    empty = True
    how: dict[str, Any] = {"blind": blind}
    if task.verbatim and columns:
        how["columns"] = columns
    for record in task.read(path, **how):
        empty = False
        yield record
    if empty:
        raise UserError(f"{path}: no examples in it; mode {mode} needs at least one")


def where_to_get(mode: str) -> str:
    """A remedy for a task's missing file."""
    name = find_task(mode).prepare
    where = "" if places.CHECKOUT else " in a clone of the repository"
    prepared = f"run `python scripts/prepare_data.py {name}`{where}, or " if name else ""
    own = "--train_file, --eval_file, --test_file; gen.py: --data_file"
    return f"{prepared}pass a file of your own ({own}) or its folder (--data_dir)"


def read_records(mode: str, path: str | Path, blind: bool = False, columns: Columns | None = None) -> list[Record]:
    """All records of a file, in file order; raises as iter_records."""
    return list(iter_records(mode, path, blind, columns))


def categories_of(rows: Iterable[Any]) -> list[str]:
    """The categories of records, groups or examples, sorted; [] if they have none."""
    return sorted({row.category for row in rows} - {""})


def training_categories(mode: str, data_dir: str | Path | None = None) -> list[str]:
    """The categories of the task's training file; [] if it has none or does not exist."""
    path = data_file(mode, "train", data_dir)
    return categories_of(iter_records(mode, path)) if is_there(mode, path) else []


def read_groups(mode: str, path: str | Path, blind: bool = False, columns: Columns | None = None) -> list[Group]:
    """The inputs of a file with their references, for decoding and scoring; raises as iter_records.

    Inputs are distinct, except where every line counts by itself: in classification, whose accuracy is over lines, and
    for inputs without references (`blind`), each of which gets its line of output.
    """
    task, records = find_task(mode), read_records(mode, path, blind, columns)
    if task.grouped and not (blind and not any(record.target.strip() for record in records)):
        return group_records(records, strip=not task.verbatim)
    return [group for record in records for group in group_records([record])]


def read_label_groups(mode: str, path: Path, openings: Iterable[str]) -> list[Group]:
    """Every label of a file, in alphabetical order, once per opening; a label is written as the file has it."""
    sources: dict[tuple[str, ...], str] = {}
    for record in iter_records(mode, path, blind=True):
        sources.setdefault(record.fields, record.source)
    return [Group(sources[fields], (), "", fields) for fields in sorted(sources) for _ in openings]


def read_openings(path: Path) -> tuple[str, ...]:
    """One opening a line. Raises UserError for a missing or empty file, or one that is not UTF-8 text."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise UserError(f"--openings {path}: no such file; one opening a line is expected") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--openings {path}: not UTF-8 text ({error.reason}); convert it to UTF-8") from None
    openings = tuple(line.strip() for line in lines if line.strip())
    if not openings:
        raise UserError(f"--openings {path}: no opening in it")
    for number, line in enumerate(lines, start=1):
        if SEPARATOR in line:
            raise UserError(f"{path}:{number}: {SEPARATOR!r} separates label and text; take it out of the opening")
    return openings
