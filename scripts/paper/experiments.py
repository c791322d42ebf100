"""The paper's tables and figures as data: rows, how each is trained and decoded, and the paper's own scores.

reproduce.py runs them; recipes.py holds the hyper-parameters and the paper's numbers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from paper import recipes
from paper.recipes import DEV, PREFIX, TABLE1, XSUM_DEV, XSUM_PREFIX, Numbers, recipe
from prefixlib.system.errors import UserError


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, and its name among the scores of a run."""

    heading: str
    score: str
    digits: int = 1


@dataclass(frozen=True)
class Row:
    """One row of a table, and the recipe of its runs. Flags are the launchers' own, without their dashes."""

    key: str  # its name in --rows, and of the run's folder
    name: str  # its name in the table
    group: str  # the part of the table that contains it
    tree: str  # gpt2 or seq2seq
    mode: str
    train: Mapping[str, object]
    decode: Mapping[str, object] = field(default_factory=dict)
    paper: Numbers = ()  # the paper's scores in the order of the group's columns; shorter, or None, if it has none
    dev: Numbers = ()  # its dev scores: quoted, as runs decode the test set
    source: str = "paper"  # the origin of these scores
    decoded: bool = True  # False: only its dev loss is needed
    best: bool = False  # decode the checkpoint with the best dev score, not the last
    size: int = 0  # training examples of a low-data run, 0: the whole set
    on_request: bool = False  # runs only if --rows names it
    in_demo: bool = True
    home: str = ""  # the experiment whose run this row shares, "" for its own
    curve: tuple[str, float] = ("", 0.0)  # plot: the curve's name and the row's place on the x axis

    @property
    def tuning_mode(self) -> str:
        return str(self.train.get("tuning_mode", "prefixtune"))


@dataclass(frozen=True)
class Experiment:
    """One table: its rows, the columns of each of its parts, its plot, and how often the paper repeats a run."""

    name: str
    title: str
    columns: Mapping[str, tuple[Column, ...]]
    rows: tuple[Row, ...]
    note: str = ""
    plot: str = ""  # "score" against the rows' x, or "loss" against the step; "" for none
    xlabel: str = ""
    seeds: int = 3
    samples: int = 0  # low-data sets sampled per size
    own: Mapping[str, object] = field(default_factory=dict)  # real_model.py: the base model and its settings


E2E = tuple(Column(n, n, d) for n, d in (("BLEU", 1), ("NIST", 2), ("METEOR", 1), ("ROUGE-L", 1), ("CIDEr", 2)))
WEBNLG = tuple(
    Column(f"{metric} {part}", f"{metric} {part}", digits)
    for metric, digits in (("BLEU", 1), ("METEOR", 2), ("TER", 2))
    for part in ("seen", "unseen", "all")
)
UNSEEN = WEBNLG[1::3]
DART = (
    *(Column("BLEU", "BLEU"), Column("METEOR", "METEOR", 2), Column("TER", "TER", 2)),
    *(Column(name, name, 2) for name in ("MoverScore", "BERTScore", "BLEURT")),
)
ROUGE = tuple(Column(f"ROUGE-{kind}", f"ROUGE-{kind}", 2) for kind in ("1", "2", "L"))
TASKS = {"E2E": ("data2text", E2E), "WebNLG": ("webnlg", WEBNLG), "DART": ("triples", DART)}

# ---- the tables --------------------------------------------------------------------------------------------------


def gpt2(size: str) -> str:
    return "the demo's GPT-2" if size == "demo" else f"GPT-2 {size}"


def _table1_row(size: str, task: str, method: str) -> Row:
    name, flags = recipes.METHODS[method]
    key = f"{task.lower()}-{method}"
    paper, dev = (numbers[_paper_size(size), task, method] for numbers in (TABLE1, DEV))
    if task == "WebNLG":  # one score per metric, of all segments
        dev = tuple(number for score in dev for number in (None, None, score))
    return Row(key, name, task, "gpt2", TASKS[task][0], flags(task, size), paper=paper, dev=dev)


def _paper_size(size: str) -> str:
    """The demo has the rows of GPT-2 medium."""
    return "medium" if size == "demo" else size


def table1(size: str) -> Experiment:
    return Experiment(
        "table1",
        f"Table-to-text, {gpt2(size)}: test scores",
        {task: columns for task, (_, columns) in TASKS.items()},
        tuple(_table1_row(size, task, method) for of_size, task, method in TABLE1 if of_size == _paper_size(size)),
    )


def _xsum(key: str, name: str, train: Mapping[str, object], group: str = "XSum", mode: str = "xsum", **more) -> Row:
    return Row(key, name, group, "seq2seq", mode, train, more.pop("decode", recipes.XSUM_DECODE), best=True, **more)


def _table2_rows() -> tuple[Row, ...]:
    return (
        _xsum(
            "xsum-finetune",
            "fine-tune",
            recipes.XSUM_FINETUNE,
            paper=(45.14, 22.27, 37.25),
            source="BART's authors, in the paper",
        ),
        _xsum("xsum-prefix-2", "prefix 2 %", XSUM_PREFIX, paper=(43.80, 20.93, 36.05), dev=XSUM_DEV["2 %"]),
        # 73,728 parameters per position (12 layers, 3 sites): P 5 is 0.09 % of BART-large's 406 million
        _xsum(
            *("xsum-prefix-0.1", "prefix 0.1 %", {**XSUM_PREFIX, "preseqlen": 5}),
            paper=(42.92, 20.03, 35.05),
            dev=XSUM_DEV["0.1 %"],
        ),
    )


def table2(size: str) -> Experiment:
    return Experiment("table2", "Summarisation, BART-large: XSum test scores", {"XSum": ROUGE}, _table2_rows())


def xsum(size: str) -> Experiment:
    readme = recipe(5e-5, 30, 16, preseqlen=200, mid_dim=800, gradient_accumulation_steps=3, fp16="yes")
    paper_flags = replace(_table2_rows()[1], name="paper's flags (P 100)", home="table2", dev=())
    return Experiment(
        "xsum",
        "XSum with BART-large: the paper's flags and those of the original README",
        {"XSum": ROUGE},
        (
            paper_flags,
            # He et al. 2022 trained l = 200: the nearest published figure
            _xsum(
                *("xsum-readme", "README's flags (P 200)", {**readme, "max_source_length": 1024}),
                decode={"num_beams": 6, "length_pen": 1.0},
                paper=(43.40, 20.46, 35.51),
                source="He et al. 2022, l = 200",
            ),
        ),
    )


def extrapolation(size: str) -> Experiment:
    within, across = "XSum within news", "XSum news to sports"
    sport = "xsum_news_sport"
    tuned = recipes.paper("xsum_news", "finetune", "seq2seq")
    rows = (
        _xsum("news-finetune", "fine-tune", tuned, within, "xsum_news", paper=(39.20, 16.35, 31.15), in_demo=False),
        _xsum(
            *("news-prefix", "prefix", recipes.paper("xsum_news", "prefixtune", "seq2seq"), within, "xsum_news"),
            paper=(39.41, 16.87, 31.47),
            in_demo=False,
        ),
        _xsum("sports-finetune", "fine-tune", tuned, across, sport, paper=(38.15, 15.51, 30.26), in_demo=False),
        _xsum(
            *("sports-prefix", "prefix", recipes.paper(sport, "prefixtune", "seq2seq"), across, sport),
            paper=(39.23, 16.74, 31.51),
            in_demo=False,
        ),
    )
    shared = [
        _table1_row(size, "WebNLG", method)
        for of_size, task, method in TABLE1
        if (of_size, task) == (_paper_size(size), "WebNLG")
    ]
    unseen = "WebNLG, unseen categories"
    rows += tuple(replace(row, group=unseen, home="table1", paper=row.paper[1::3], dev=()) for row in shared)
    return Experiment(
        "extrapolation",
        f"Topics unseen in training: BART-large, {gpt2(size)}",
        {within: ROUGE, across: ROUGE, unseen: UNSEEN},
        rows,
    )


def _low(key: str, name: str, size: int, train: Mapping[str, object], **more) -> Row:
    train = {**recipes.LOW, "max_steps": recipes.SIZES[size], **train}
    return Row(key, name, "E2E", "gpt2", "data2text", train, best=True, size=size, **more)


def lowdata(size: str) -> Experiment:
    rows: list[Row] = []
    token = {"use_lowdata_token": "yes", "lowdata_token": recipes.E2E_TOKEN}
    for n in recipes.SIZES:
        tuned = {"tuning_mode": "finetune", "max_steps": recipes.FINETUNE_SIZES[n], **token}
        for key, train in (("finetune", tuned), ("prefix", {"mid_dim": 512, **token})):
            label = "fine-tune" if key == "finetune" else "prefix"
            # the demo's dev set has fewer than 0.3 x 500 examples
            rows.append(_low(f"e2e-{n}-{key}", f"{label}, {n} examples", n, train, curve=(label, n), in_demo=n < 500))
    for n in recipes.SUMMARY_EPOCHS:
        low = {"warmup_steps": 100, "max_source_length": 512}
        more = {"size": n, "on_request": True, "in_demo": False}
        start = {"use_lowdata_token": "yes", "lowdata_token": recipes.XSUM_TOKEN, "mid_dim": 800}
        prefix = recipe(5e-5, recipes.SUMMARY_EPOCHS[n], recipes.SUMMARY_BSZ, **start)
        tuned = recipe(
            *(5e-5, recipes.SUMMARY_FINETUNE_EPOCHS[n], recipes.SUMMARY_FINETUNE_BSZ), tuning_mode="finetune"
        )
        for label, key, train in (("fine-tune", "finetune", tuned), ("prefix", "prefix", prefix)):
            rows.append(_xsum(f"xsum-{n}-{key}", f"{label}, {n} examples", {**low, **train}, curve=(label, n), **more))
    return Experiment(
        "lowdata",
        f"Low data: E2E with {gpt2(size)}; XSum with BART-large on request",
        {"E2E": E2E, "XSum": ROUGE},
        tuple(rows),
        note="The paper: prefix-tuning is better than fine-tuning by 2.9 BLEU on average over the four sizes.",
        plot="score",
        xlabel="training examples",
        seeds=2,
        samples=5,
    )


def length(size: str) -> Experiment:
    rows = [
        Row(
            *(f"e2e-p{p}", f"P {p}", "E2E", "gpt2", "data2text", {**PREFIX["E2E"], "preseqlen": p}),
            paper=(bleu,) if size == "medium" else (),
            source="public re-run",
            curve=("prefix", p),
        )
        for p, bleu in recipes.LENGTHS.items()
    ]
    rows += [
        _xsum(f"xsum-p{p}", f"P {p}", {**XSUM_PREFIX, "preseqlen": p}, curve=("prefix", p), on_request=True)
        for p in (1, 10, 50, 100, 200, 300)
    ]
    columns = {"E2E": E2E, "XSum": ROUGE}
    title = f"Prefix length: E2E with {gpt2(size)}; XSum with BART-large on request"
    note = "The paper: best at about 10 for table-to-text, 200 for summarisation."
    return Experiment("length", title, columns, tuple(rows), note, plot="score", xlabel="prefix length P")


def _ablation(name: str, title: str, label: str, flags: dict[str, object], bleu: tuple[float, ...], size: str):
    rows = [
        Row(
            *(f"e2e-{name}-p{p}", f"{label}, P {p}", "E2E", "gpt2", "data2text"),
            {**PREFIX["E2E"], **flags, "preseqlen": p},
            paper=(score,) if size == "medium" else (),
            curve=(label, p),
        )
        for p, score in zip((1, 10, 20), bleu, strict=True)
    ]
    rows.append(replace(_table1_row(size, "E2E", "prefix"), name="prefix, P 5 (table1)", home="table1", dev=()))
    return Experiment(name, title, {"E2E": E2E}, tuple(rows))


def embedding_only(size: str) -> Experiment:
    flags: dict[str, object] = {"prefix_mode": "embedding"}
    title = f"Embedding-only prefixes: E2E with {gpt2(size)}"
    return _ablation("embedding-only", title, "embedding-only", flags, (48.1, 62.2, 61.9), size)


def infix(size: str) -> Experiment:
    flags: dict[str, object] = {"format_mode": "infix"}
    return _ablation("infix", f"Infix-tuning: E2E with {gpt2(size)}", "infix", flags, (67.9, 67.2, 66.7), size)


def init(size: str) -> Experiment:
    random = {"preseqlen": 6, "mid_dim": 512, "init_random": "uniform"}
    rows = [_low("random", "random, uniform (0, 1), P 6", recipes.INIT_SIZE, random)]
    for word in recipes.WORDS:
        start = {"mid_dim": 512, "use_lowdata_token": "yes", "lowdata_token": word}
        rows.append(_low(word.strip(":"), f"“{word}”", recipes.INIT_SIZE, start))
    title = f"Initialisation of the prefix with {recipes.INIT_SIZE} examples: E2E with {gpt2(size)}"
    note = "A prefix that starts from a word is as long as the word has tokens."
    return Experiment("init", title, {"E2E": E2E}, tuple(rows), note, plot="loss", seeds=2, samples=5)


EXPERIMENTS: dict[str, Callable[[str], Experiment]] = {
    "table1": table1,
    "table2": table2,
    "xsum": xsum,
    "lowdata": lowdata,
    "extrapolation": extrapolation,
    "length": length,
    "embedding-only": embedding_only,
    "infix": infix,
    "init": init,
}
ONE_SIZE = ("table2", "xsum")  # BART-large alone


def build(name: str, size: str = "medium") -> Experiment:
    """The experiment for GPT-2 medium, large or demo (without paper scores). Raises UserError for other sizes."""
    if size == "large" and name in ONE_SIZE:
        raise UserError(f"--size {size} and {name} do not go together: {name} is about BART-large alone")
    experiment = EXPERIMENTS[name](size)
    if size != "demo":
        return experiment
    rows = tuple(replace(row, paper=(), dev=()) for row in experiment.rows if row.in_demo)
    columns = {group: columns for group, columns in experiment.columns.items() if any(r.group == group for r in rows)}
    title = experiment.title.replace("BART-large", "the demo's BART")
    return replace(experiment, rows=rows, columns=columns, title=f"Demo: {title}")
