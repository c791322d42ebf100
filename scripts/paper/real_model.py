"""The paper's comparisons with a base model of the user's choice, sized for small machines, for reproduce.py.

python scripts/reproduce.py rates --size smollm2 --test_sources 100       # learning rates, chosen on dev
python scripts/reproduce.py lowdata --size smollm2 --test_sources 100     # then the others, with those rates

These tables contain none of the paper's scores, which are for GPT-2. Its hyper-parameters are used where they do not
depend on the model. Learning rates do, so they are searched: three per method, by dev loss with 100 E2E examples, and
with 500 for the two methods of the low-data table.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from paper import recipes
from paper.experiments import E2E, WEBNLG, Column, Experiment, Row
from paper.recipes import recipe
from prefixlib.system.errors import UserError

SIZES = {"smollm2": "smollm2-135m"}  # --size -> the base model's name
SHAPES = {"smollm2-135m": (30, 576, 134_515_008)}  # layers, width, parameters
STEPS = {  # the paper's largest numbers of steps for 50 to 500 examples; early stopping makes most runs shorter
    "prefix": {50: 200, 100: 200, 200: 200, 500: 400},
    "finetune": {50: 100, 100: 100, 200: 200, 500: 400},
}
RATES = {  # method -> learning rates to try
    "prefix": (3e-4, 1e-3, 3e-3),
    "finetune": (1e-5, 3e-5, 1e-4),
    "top2": (3e-5, 1e-4, 3e-4),
    "adapter-3": (3e-4, 1e-3, 3e-3),
    "adapter-0.1": (3e-4, 1e-3, 3e-3),
}
RATE_SIZES = (100, 500)  # E2E examples that rates are searched with; winners are runs of the low-data table as well
SMALL = RATE_SIZES[0]
BUDGETS = {"unseen": 1000, "length": 500, "placement": 500}  # default training examples (--budget_examples)
LENGTHS = (1, 5, 10, 20, 40)
EVALUATIONS, PATIENCE = 10, 3  # per run, and how many without a better dev loss end it
TOKEN = recipes.E2E_TOKEN
LOSS = (Column("loss", "loss", 3),)


@dataclass(frozen=True)
class Base:
    """The base model, and the command line's settings of the runs with it."""

    name: str  # its name for the launchers, in every row and in captions
    shape: tuple[int, int, int]  # layers, width, parameters: they decide the size of adapters
    budget: int | None = None  # --budget_examples
    test_sources: int | None = None
    rates: Mapping[str, float] = field(default_factory=dict)  # "method@examples" -> the rate that won there
    bf16: str = "yes"  # or "no"

    def rate(self, method: str, size: int) -> float:
        """The rate that won at the method's searched size nearest to `size` (by their ratio).

        Raises UserError if that search has not been run.
        """
        searched = nearest_search(method, size)
        if (name := f"{method}@{searched}") not in self.rates:
            raise UserError(f"no learning rate is chosen for {name} examples yet: run the experiment `rates` first")
        return self.rates[name]

    def decode(self) -> dict[str, object]:
        """Divide scores by the output's own length: the first implementation's rule, which adds the prompt's length,
        makes an empty output the best one for an uncertain model.
        """
        rule = {"length_normalization": "output"}
        return {"reference_loss": "yes", "bf16": self.bf16, "decode_limit": self.test_sources, **rule}


def precision() -> str:
    """The default of --bf16: yes if bfloat16 is fast on this machine."""
    from prefixlib.runs import record

    return "yes" if record.has_fast_bfloat16() else "no"


def searched_sizes(method: str) -> tuple[int, ...]:
    """The numbers of E2E examples that the method's rate is searched with."""
    return RATE_SIZES if method in STEPS else (SMALL,)  # the others are for WebNLG alone


def nearest_search(method: str, size: int) -> int:
    """The searched number of examples nearest to `size`."""
    return min(searched_sizes(method), key=lambda examples: max(examples / size, size / examples))


def shown(name: str) -> str:
    """The base model's name in tables, without this machine's folders."""
    return Path(name).name if Path(name).expanduser().exists() else name


def shape_of(name: str) -> tuple[int, int, int]:
    """Layers, width and parameters of a model, without its weights. Raises UserError if it cannot be loaded."""
    if name in SHAPES:
        return SHAPES[name]
    import torch  # here: the paper's tables and --size smollm2 need neither

    from prefixlib.base_model.load import AUTO_CLASSES, load_config, resolve_model_name

    config = load_config(resolve_model_name(name))
    with torch.device("meta"):
        model = AUTO_CLASSES["decoder-only"].from_config(config)
    return config.num_hidden_layers, config.hidden_size, model.num_parameters()


def method_flags(method: str, base: Base) -> dict[str, object]:
    """The launcher's flags for the tuning mode and the prefix's start."""
    if method == "prefix":
        return {"init_text": TOKEN, "mid_dim": 512}
    if method == "finetune":
        return {"tuning_mode": "finetune", "use_lowdata_token": "yes", "lowdata_token": TOKEN}
    if method == "top2":
        return {"tuning_mode": "finetune-top", "top_layers": 2}
    share = {"adapter-3": 0.03, "adapter-0.1": 0.001}[method]
    width = recipes.adapter_bottleneck(share, *base.shape)
    return {"tuning_mode": "adaptertune", "adapter_design": 1, "adapter_bottleneck": width}


NAMES = {
    "prefix": "prefix",
    "finetune": "fine-tune",
    "top2": "top-2 layers",
    "adapter-3": "adapter 3 %",
    "adapter-0.1": "adapter 0.1 %",
}


def _train(rate: float, steps: int, flags: Mapping[str, object]) -> dict[str, object]:
    """Evaluations at every tenth of the run, early stopping, the best checkpoint kept."""
    every = max(steps // EVALUATIONS, 1)
    schedule = {"max_steps": steps, "eval_steps": every, "save_steps": 50, "logging_steps": 10, "eval_batch_size": 32}
    stop = {"keep_best": "yes", "early_stopping_patience": PATIENCE}
    return recipe(rate, 5, 10, **schedule, **stop, **flags)


def _row(key: str, name: str, base: Base, size: int, train: Mapping[str, object], mode: str = "data2text", **more):
    group = {"data2text": "E2E", "webnlg": "WebNLG"}[mode]
    more = {"decode": base.decode(), **more}
    return Row(key, f"{name} ({base.name})", group, "gpt2", mode, train, best=True, size=size, **more)


def _steps(method: str, size: int) -> int:
    """Most steps at `size` E2E examples: fewer for methods that tune the model itself, as in the paper."""
    table = STEPS["prefix" if method.startswith(("prefix", "adapter")) else "finetune"]
    return table[size]


def _rate_row(base: Base, method: str, rate: float, size: int, **more) -> Row:
    """A run at a searched size: part of the search, and of the low-data table if its rate won."""
    flags = _train(rate, _steps(method, size), method_flags(method, base))
    key, name = f"e2e-{size}-{method}-lr{rate:g}", f"{NAMES[method]}, {size} examples, rate {rate:g}"
    return _row(key, name, base, size, flags, **more)


def rates(base: Base) -> Experiment:
    searches = [(method, size) for size in RATE_SIZES for method in RATES if size in searched_sizes(method)]
    rows = [_rate_row(base, method, rate, size, decoded=False) for method, size in searches for rate in RATES[method]]
    return Experiment(
        "rates",
        f"Learning rates for {base.name}: dev loss on E2E",
        {"E2E": (Column("dev loss", "dev loss", 3),)},
        tuple(rows),
        note="The lowest dev loss of a method chooses its rate. A prefix's loss is a sum per text, the others' a mean "
        "per token, so losses of different methods do not compare.",
        seeds=1,
        samples=1,
    )


def lowdata(base: Base) -> Experiment:
    rows = []
    for size in recipes.SIZES:
        for method in ("prefix", "finetune"):
            curve = (NAMES[method], size)
            rate = base.rate(method, size)
            if size in RATE_SIZES:
                row = _rate_row(base, method, rate, size, home="rates", curve=curve)
                rows.append(_renamed(row, f"{NAMES[method]}, {size} examples ({base.name})"))
                continue
            flags = _train(rate, _steps(method, size), method_flags(method, base))
            name = f"{NAMES[method]}, {size} examples"
            rows.append(_row(f"e2e-{size}-{method}", name, base, size, flags, curve=curve))
    return Experiment(
        "lowdata",
        f"Low data: E2E with {base.name}",
        {"E2E": E2E + LOSS},
        tuple(rows),
        note=f"A run stops when {PATIENCE} evaluations bring no better dev loss, or at the paper's number of steps. "
        "loss: mean per token of the first reference of every decoded input, in nats.",
        plot="score",
        xlabel="training examples",
        seeds=1,
        samples=2,
    )


def _renamed(row: Row, name: str, **more) -> Row:
    return replace(row, name=name, **more)


def unseen(base: Base) -> Experiment:
    """Table 1's WebNLG part: one budget of examples and steps for every method."""
    size = base.budget or BUDGETS["unseen"]
    steps = max(size // 5, 5)  # two passes
    rows = []
    for method in RATES:
        flags = method_flags(method, base)
        for name in ("init_text", "use_lowdata_token", "lowdata_token"):  # for low data only, as in the paper
            flags.pop(name, None)
        if method == "prefix":
            flags |= {"preseqlen": 5}
        train = _train(base.rate(method, size), steps, flags)
        rows.append(_row(f"webnlg-{size}-{method}", NAMES[method], base, size, train, "webnlg"))
    return Experiment(
        "unseen",
        f"Categories seen and unseen in training: WebNLG with {base.name}, {size} training examples",
        {"WebNLG": WEBNLG + LOSS},
        tuple(rows),
        note="Learning rates are those that `rates` chose on E2E with the nearest number of examples: "
        + ", ".join(f"{NAMES[method]} {nearest_search(method, size)}" for method in RATES)
        + ".",
        seeds=1,
        samples=1,
    )


def init(base: Base) -> Experiment:
    """Section 7.4: the start of the prefix, with few examples."""
    rate, steps = base.rate("prefix", SMALL), _steps("prefix", SMALL)
    starts: dict[str, tuple[str, dict[str, object]]] = {
        "random": ("random, uniform (0, 1)", {"preseqlen": 6, "mid_dim": 512, "init_random": "uniform"}),
        "elephant": ("random word, “elephant”", {"init_text": "elephant", "mid_dim": 512}),
        "banana": ("random word, “banana”", {"init_text": "banana", "mid_dim": 512}),
        "summarize": ("real word, “summarize”", {"init_text": "summarize", "mid_dim": 512}),
        "exact": (f"keys and values of “{TOKEN}”, no MLP", {"init_text": TOKEN, "init_shallow": "yes"}),
    }
    rows = [
        _row(f"e2e-{SMALL}-init-{key}", name, base, SMALL, _train(rate, steps, flags))
        for key, (name, flags) in starts.items()
    ]
    shared = _rate_row(base, "prefix", rate, SMALL, home="rates")
    rows.insert(4, _renamed(shared, f"task's words, “{TOKEN}” ({base.name})"))
    return Experiment(
        "init",
        f"Initialisation of the prefix with {SMALL} examples: E2E with {base.name}",
        {"E2E": E2E + LOSS},
        tuple(rows),
        note="A prefix that starts from a text is as long as the text has tokens.",
        plot="loss",
        seeds=1,
        samples=2,
    )


def length(base: Base) -> Experiment:
    size = base.budget or BUDGETS["length"]
    rows = [
        _row(
            *(f"e2e-{size}-p{p}", f"P {p}", base, size),
            _train(base.rate("prefix", size), _budget_steps(size), {"preseqlen": p, "mid_dim": 512}),
            curve=("prefix", p),
        )
        for p in LENGTHS
    ]
    title = f"Prefix length: E2E with {base.name}, {size} training examples"
    columns = {"E2E": E2E + LOSS}
    return Experiment("length", title, columns, tuple(rows), plot="score", xlabel="P", seeds=1, samples=1)


def placement(base: Base) -> Experiment:
    """Section 7.2: the place of the trained vectors."""
    size = base.budget or BUDGETS["placement"]
    kinds: dict[str, dict[str, object]] = {
        "embedding-only": {"prefix_mode": "embedding"},
        "infix": {"format_mode": "infix"},
        "prefix": {},
    }
    rows = [
        _row(
            *(f"e2e-{size}-{kind}", f"{kind}, P 10", base, size),
            _train(base.rate("prefix", size), _budget_steps(size), {"preseqlen": 10, "mid_dim": 512, **flags}),
        )
        for kind, flags in kinds.items()
    ]
    title = f"Embedding-only, infix, prefix: E2E with {base.name}, {size} training examples"
    return Experiment("placement", title, {"E2E": E2E + LOSS}, tuple(rows), seeds=1, samples=1)


def _budget_steps(size: int) -> int:
    """Steps as in low data: four passes at 500 examples, never more than the paper's 400 steps."""
    return min(max(4 * size // 10, 5), 400)


EXPERIMENTS: dict[str, Callable[[Base], Experiment]] = {
    "rates": rates,
    "lowdata": lowdata,
    "unseen": unseen,
    "init": init,
    "length": length,
    "placement": placement,
}


def build(name: str, base: Base) -> Experiment:
    """The experiment for this base. Raises UserError if it needs a learning rate that is not chosen yet."""
    return replace(EXPERIMENTS[name](base), own=asdict(base))


def rebuild(name: str, own: Mapping[str, Any]) -> Experiment:
    """The experiment of a results file, from its record of the base."""
    return build(name, Base(**{**own, "shape": tuple(own["shape"])}))


def chosen_rates(entries: Mapping[str, Mapping]) -> dict[str, float]:
    """ "method@examples" -> the rate with the lowest dev loss among the entries of `rates`."""
    found: dict[str, tuple[float, float]] = {}
    for entry in entries.values():
        run, rate = entry["row"].removeprefix("e2e-").rsplit("-lr", 1)
        size, method = run.split("-", 1)
        candidate = (entry["scores"]["dev loss"], float(rate))
        found[f"{method}@{size}"] = min(found.get(f"{method}@{size}", candidate), candidate)
    return {name: rate for name, (_, rate) in found.items()}


def caption(base: Base) -> str:
    """The note above each of these tables."""
    cut = f" Scores are over the first {base.test_sources} test inputs" if base.test_sources else ""
    if cut:
        cut += " (WebNLG: half of them from unseen categories)."
    settings = "not the paper's settings: nothing here compares with its numbers."
    beams = " Beams are compared by their score per generated token."
    arithmetic = "bfloat16" if base.bf16 == "yes" else "float32"
    return f"Base model: {base.name}, in {arithmetic}. These are {settings}{beams}{cut}"
