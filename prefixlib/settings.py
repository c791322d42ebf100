"""Settings as data: every flag is one field of a frozen dataclass, from which the parser is made (standard library).

    @dataclass(frozen=True)
    class Settings(Training):
        objective_mode: int = flag(1, "a prefix's loss ...", OBJECTIVE, choices=range(5))

A field's annotation is the flag's type; bool is spelled yes / no on the command line. `Training` holds the flags that
both trees have; each tree's flags.py adds its own and gives other defaults by declaring a field again.
"""

import argparse
import dataclasses
import difflib
import math
import shlex
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from prefixlib import config_file, places
from prefixlib.errors import UserError
from prefixlib.tables import Columns
from prefixlib.tasks import OWN_DATA
from prefixlib.wording import check_template

TUNING_MODES = ("prefixtune", "finetune", "finetune-top", "adaptertune", "bothtune")
WITH_PREFIX = ("prefixtune", "bothtune")
SAMPLING = ("top_p", "top_k", "temperature")  # how tokens are drawn
DECODE = ("valid", "test", "both", "none")
QUANTIZATIONS = ("no", "4bit", "8bit", "int8")

# Bounds of a search, in both trees: beyond them numbers overflow, no token is left, or memory runs out.
SEARCH_BOUNDS: Mapping[str, Mapping[str, float]] = {
    "num_beams": {"above": 0, "below": 1001},
    "length_penalty": {"above": -11, "below": 11},
    "top_p": {"low": 1e-6},
    "temperature": {"low": 1e-3, "below": 1001},
}

TASK = "task and data"
MODEL = "base model"
METHOD = "method"
START = "initialisation of the prefix (default: random; section 7.4)"
TRAINING = "training"
RECORDS = "evaluation, checkpoints, what happens afterwards"
RARE = "rarely needed"  # stands last in --help
USAGE = "%(prog)s [--FLAG VALUE ...]"
REPORTS = ("tensorboard", "wandb", "mlflow", "none")


def flag(
    default: Any,
    help: str,
    group: str,
    *,
    choices: Iterable[Any] | None = None,
    low: float | None = None,
    above: float | None = None,
    below: float | None = None,
    names: tuple[str, ...] = (),
    escapes: bool = False,
) -> Any:
    """A dataclass field that is a flag.

    low, above, below: the bounds of a number, the first included; every number must be finite. names: other spellings.
    escapes: the command line may write \\n and \\t for a line break and a tab, as it may for tuples.
    The flag of a tuple of texts may be given several times.
    """
    metadata = {"help": help, "group": group, "choices": choices and tuple(choices), "names": names, "escapes": escapes}
    return dataclasses.field(default=default, metadata={**metadata, "low": low, "above": above, "below": below})


def _guesses(word: str, known: Sequence[str]) -> list[str]:
    """The flag that an unknown one may stand for: one it begins, one of its initials, or one spelled nearly so."""
    begun = [flag for flag in known if flag.startswith(f"{word}_")]
    initials = [flag for flag in known if "--" + "".join(part[0] for part in flag[2:].split("_") if part) == word]
    return (begun or initials or difflib.get_close_matches(word, known, 1))[:1]


class _Help(argparse.RawDescriptionHelpFormatter):
    """The description as it is written; help that ends with the default, unless the text says it or there is none."""

    def _get_help_string(self, action: argparse.Action) -> str:
        said = "(default" in action.help or action.default in (None, (), argparse.SUPPRESS) or action.nargs == 0
        return action.help if said or action.required else f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose mistakes are one line with exit code 2, and which accepts no shortened flags."""

    def __init__(self, **kwargs):
        super().__init__(**{"allow_abbrev": False, "formatter_class": _Help, **kwargs})

    def format_help(self) -> str:
        """As argparse does it, the flags that are rarely needed last."""
        self._action_groups.sort(key=lambda group: group.title == RARE)
        return super().format_help()

    def parse_known_args(self, args=None, namespace=None):
        """As argparse does it, the flags of a --config file put in front."""
        words = list(sys.argv[1:] if args is None else args)
        takes_file = config_file.FLAG in self._option_string_actions
        return super().parse_known_args(config_file.expand(words, self) if takes_file else words, namespace)

    def error(self, message: str):
        self.exit(2, f"error: {message}{self._did_you_mean(message)} (see {self.prog} --help)\n")

    def _did_you_mean(self, message: str) -> str:
        """A guess for each unknown flag."""
        if not message.startswith("unrecognized arguments"):
            return ""
        unknown = [word.split("=")[0] for word in message.split() if word.startswith("--")]
        known = list(self._option_string_actions)
        guesses = [guess for word in unknown for guess in _guesses(word, known)]
        return f"; did you mean {', '.join(guesses)}?" if guesses else ""


@dataclass(frozen=True)
class Flags:
    """What every set of flags can do."""

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        """Add a flag for every field, in groups."""
        if config_file.FLAG not in parser._option_string_actions:
            parser.add_argument(
                config_file.FLAG,
                metavar="FILE",
                help="flags out of a file: FILE.yaml, or a run's settings.json, results.json or command.txt; the "
                "command line wins",
            )
        groups = {group.title: group for group in parser._action_groups}
        for field in fields(cls):
            about = field.metadata
            if about["group"] not in groups:
                groups[about["group"]] = parser.add_argument_group(about["group"])
            kind = _kind(field)
            options = {"type": kind, "choices": about["choices"], "default": field.default, "help": about["help"]}
            if kind is bool:
                choices = about["choices"] or (True, False)
                options |= {"type": str, "choices": tuple(map(spelled, choices)), "default": spelled(field.default)}
            if kind in (int, float) and not about["choices"]:
                options["metavar"] = "N"
            if kind is tuple:
                options |= {"action": _Collect, "type": unescaped}
            if about["escapes"]:
                options["type"] = unescaped
            groups[about["group"]].add_argument(f"--{field.name}", *about["names"], dest=field.name, **options)

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Self:
        """The settings that a parsed command line holds."""
        values = {field.name: getattr(args, field.name) for field in fields(cls)}
        switches = [field.name for field in fields(cls) if _kind(field) is bool]
        return cls(**values | {name: values[name] == "yes" if values[name] else None for name in switches})

    @classmethod
    def default(cls, name: str) -> Any:
        """What a setting is unless it is given."""
        return next(field.default for field in fields(cls) if field.name == name)

    def as_flags(self) -> dict[str, Any]:
        """The settings under their flags' names and in their spelling; those that are None are left out."""
        values = {field.name: spelled(getattr(self, field.name)) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def check_values(self) -> None:
        """Raise UserError for a value outside its choices or bounds, or of another type, naming the flag."""
        for field in fields(self):
            value, about, kind = getattr(self, field.name), field.metadata, _kind(field)
            if value is None:
                if field.default is not None:
                    raise UserError(f"--{field.name}: a value is missing")
                continue
            shown = f"--{field.name} {spelled(value)}"
            if kind in (int, float):
                if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
                    raise UserError(f"{shown}: must be a number" + " without a fraction" * (kind is int))
                wanted = out_of_bounds(value, about["low"], about["above"], about["below"])
                if wanted:
                    raise UserError(f"{shown}: must be {wanted}")
            elif kind is tuple:
                if not isinstance(value, tuple) or not all(isinstance(text, str) and text for text in value):
                    raise UserError(f"--{field.name} {value!r}: must be texts that are not empty")
            elif not isinstance(value, kind):
                raise UserError(f"{shown}: must be {'yes or no' if kind is bool else 'a text'}, not {value!r}")
            if about["choices"] and value not in about["choices"]:
                raise UserError(f"{shown}: one of {', '.join(str(spelled(choice)) for choice in about['choices'])}")

    def check_only_with(self, rules: Iterable["Only"]) -> None:
        """Refuse a flag that differs from its default where another one leaves it without effect.

        --preseqlen and --optim_prefix stand in published commands for every tuning mode, so no rule names them.
        """
        for rule in rules:
            other = getattr(self, rule.other)
            if getattr(self, rule.flag) != self.default(rule.flag) and other not in rule.values:
                shown = f"--{rule.other}" if other is None else f"--{rule.other} {spelled(other)}"
                refuse_together(f"no {shown}" if other is None else shown, f"--{rule.flag}", rule.why)


@dataclass(frozen=True)
class Only:
    """A flag that has an effect only together with certain values of another one."""

    flag: str
    other: str
    values: tuple[Any, ...]
    why: str


def _kind(field: dataclasses.Field) -> type:
    """The type of a flag's value, without the None of one that may be left out."""
    if isinstance(field.type, types.UnionType):
        return next(kind for kind in field.type.__args__ if kind is not types.NoneType)
    return tuple if isinstance(field.type, types.GenericAlias) else field.type


class _Collect(argparse.Action):
    """A flag that may be given several times; `append` would want its default to be a list."""

    def __call__(self, parser, namespace, value, option_string=None):
        known = getattr(namespace, self.dest)
        setattr(namespace, self.dest, (*(known if isinstance(known, tuple) else ()), value))


def unescaped(text: str) -> str:
    r"""A text in which \n and \t stand for a line break and a tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def out_of_bounds(
    value: float, low: float | None = None, above: float | None = None, below: float | None = None
) -> str | None:
    """What a number must be, where it is not: finite, at least `low`, above and below; None where it is all of that.

    Whole numbers have 31 bits unless `below` says otherwise.
    """
    if isinstance(value, int) and below is None and abs(value) >= 2**31:
        return "between -2147483648 and 2147483648"
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if (low is None or value >= low) and (above is None or value > above) and (below is None or value < below):
        return None
    bounds = (("at least", low), ("above", above), ("below", below))
    return " and ".join(f"{words} {bound}" for words, bound in bounds if bound is not None)


def add_number(group: Any, flag: str, kind: type = int, *, help: str, **about: Any) -> None:
    """Add a number to a parser that is not made from settings, with its bounds: low, above, below.

    Parsing raises UserError that names flag and value. `about` may hold what add_argument takes, too.
    """
    bounds = {name: about.pop(name) for name in ("low", "above", "below") if name in about}

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            wanted = "a number" + " without a fraction" * (kind is int)
        else:
            wanted = out_of_bounds(value, **bounds)
        if wanted:
            raise UserError(f"{flag} {text[:40]}: must be {wanted}")
        return value

    group.add_argument(flag, type=parse, metavar=about.pop("metavar", "N"), help=help, **about)


def add_yes_no(group: Any, flag: str, default: str | None, help: str) -> None:
    """Add a switch to a parser that is not made from settings."""
    group.add_argument(flag, choices=("yes", "no"), default=default, help=help)


def spelled(value: Any) -> Any:
    """A value as the command line writes it."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


def refuse_together(first: str, second: str, why: str) -> None:
    """Raise UserError for two flags that contradict each other."""
    raise UserError(f"{first} and {second} do not go together: {why}")


def text_or_file(flag: str, value: str) -> str:
    """The text that a flag gives, or for @FILE what the file holds without its last newline.

    Raises UserError if the file can't be read.
    """
    if not value.startswith("@"):
        return value
    path = Path(value[1:]).expanduser()
    try:
        return path.read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{flag} {value}: {path} cannot be read ({reason})") from error


def explicit_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> set[str]:
    """The names of the flags that argv itself gives, as opposed to those left at their defaults."""
    unset = object()
    blank = argparse.Namespace(**{action.dest: unset for action in parser._actions})
    parsed = parser.parse_args(argv, namespace=blank)
    return {name for name, value in vars(parsed).items() if value is not unset}


def choose_strategy(mode: str, given: str | None, usual: str, temperature: float, sampled: bool) -> str:
    """The strategy that is given, else the task's `usual` one.

    Temperature 0 is greedy. `sampled`: whether a flag of sampling is away from its default; then outputs for
    user data are sampled. Raises UserError for a temperature between 0 and the least that numbers allow.
    """
    least = SEARCH_BOUNDS["temperature"]["low"]
    if 0 < temperature < least:
        raise UserError(f"--temperature {temperature}: 0, which is greedy, or at least {least}")
    if given is None:
        given = "nucleus" if temperature == 0 or (sampled and mode in OWN_DATA) else usual
    return "greedy" if given == "nucleus" and temperature == 0 else given


def strategy_of(settings: Flags, mode: str, usual: str, beams: Sequence[str]) -> str:
    """The strategy of decoding settings. Raises UserError for a flag without effect; `beams`: those of beam search."""
    sampled = any(getattr(settings, name) != settings.default(name) for name in SAMPLING)
    strategy = choose_strategy(mode, settings.strategy, usual, settings.temperature, sampled)
    for name, owner in {**dict.fromkeys(SAMPLING, "nucleus"), **dict.fromkeys(beams, "beam")}.items():
        made_greedy = owner == "nucleus" and strategy == "greedy" and settings.temperature == 0
        if strategy != owner and getattr(settings, name) != settings.default(name) and not made_greedy:
            refuse_together(f"--strategy {strategy}", f"--{name}", f"it belongs to --strategy {owner}")
    return strategy


def decode_command(
    family: str,
    mode: str,
    directory: Path | str,
    *,
    tuned: bool = False,
    data_dir: str | None = None,
    test_file: str | None = None,
) -> str:
    """The command, as a line for a shell, that decodes the task's test file, or `test_file`, with a checkpoint.

    tuned: a model without a prefix. data_dir: where the task's files are, if not in the default folder.
    """
    if family == "decoder-only":
        program, words, flag = "gpt2/gen.py", [mode, "yes", "test", str(directory), "no"], "data_file"
    else:
        model = "finetune_model_path" if tuned else "prefix_model_path"
        program, flag = "seq2seq/train_bart.py", "test_file"
        words = ["--mode", mode, "--do_train", "no", f"--{model}", str(directory)]
    if test_file:
        words += [f"--{flag}", test_file]
    elif data_dir:
        words += ["--data_dir", data_dir]
    return f"{places.program(program)} {shlex.join(words)}"


# The settings of one tuning mode alone: its checkpoints hold them, and a resumed run must repeat them.
TUNING_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "finetune-top": ("top_layers", "top_embeddings"),
    "adaptertune": ("adapter_design", "adapter_bottleneck"),
}


LENGTH = ("epoch", "max_steps")  # the settings that a prolonged run may change
OF_THE_FOLDER = ("output_dir", "resume", "allow_other_data", "overwrite_output_dir")


@dataclass(frozen=True)
class Training(Flags):
    """The settings of a training run that both trees have."""

    mode: str = flag("", "the task, and so the file format", TASK)
    train_file: str | None = flag(None, "training file (default: the task's own under --data_dir)", TASK)
    eval_file: str | None = flag(None, "dev file", TASK)
    test_file: str | None = flag(None, "test file", TASK)
    data_dir: str | None = flag(
        None, "folder of all data sets (e2e_data/, xsum/, ...), or the task's own (default: data/)", TASK
    )
    source_column: str | None = flag(
        None,
        "mode text: the column of the sources; a.b is part b of column a (default: source, messages or conversations, "
        "or prompt with completion)",
        TASK,
    )
    target_column: str | None = flag(None, "mode text: the column of the targets (default: target)", TASK)
    source_template: str | None = flag(
        None,
        r'mode text: what is put around every source, e.g. "Summarise: {source}", or made of several columns, e.g. '
        r'"{instruction}\n{input}" (\n: a line break)',
        TASK,
        escapes=True,
    )
    quotes: bool | None = flag(
        None,
        "mode text: quotation marks of a .csv or .tsv file go around cells (yes) or are text (no) (default: what fits "
        "the file; an ambiguous one is refused)",
        TASK,
    )
    max_source_length: int | None = flag(None, "most tokens of a source (default: the task's)", RARE, low=1)
    val_max_target_length: int | None = flag(None, "most tokens of a dev text (default: the task's)", RARE, low=1)

    model_name_or_path: str | None = flag(None, "hub name or local folder", MODEL)
    model_revision: str | None = flag(None, "commit or tag of the hub model (default: its newest)", RARE)
    cache_dir: str | None = flag(None, "where hub files are kept (default: the hub library's own place)", RARE)

    quantization: str | None = flag(
        None,
        "the frozen model in fewer bits: 4bit, 8bit (bitsandbytes, on a GPU) or int8 (torchao); decoding does as "
        "training did unless told otherwise",
        MODEL,
        choices=QUANTIZATIONS,
    )
    tuning_mode: str = flag(
        "prefixtune",
        "what is trained: a prefix, the model, its top layers, adapters inside it, or prefix and model together",
        METHOD,
        choices=TUNING_MODES,
    )
    preseqlen: int = flag(10, "prefix length P; 5 to 10 is best for table-to-text, 200 for summaries", METHOD, above=0)
    mid_dim: int = flag(
        512, "width of the reparametrisation's hidden layer; the paper: 800 for summaries", METHOD, above=0
    )
    dropout: float = flag(0.0, "dropout on the prefix keys and values, 0 to 1", METHOD, low=0, below=1)
    optim_prefix: bool = flag(True, "a free prefix, the same for all inputs", METHOD)
    prefix_mode: str = flag("activation", "train keys and values in every layer", METHOD, choices=("activation",))
    format_mode: str = flag("cat", "what stands where: prefix, source, target", METHOD, choices=("cat",))
    use_deep: bool = flag(False, "three linear layers in the reparametrisation instead of two", RARE)
    use_dropout: bool = flag(False, "dropout inside the frozen model while the prefix is trained", RARE)
    prefix_model_path: str | None = flag(None, "start from the weights of this prefix checkpoint", METHOD)
    top_layers: int = flag(1, "finetune-top: how many of the (decoder's) last layers are trained", METHOD, low=0)
    top_embeddings: bool = flag(True, "finetune-top: train the word embeddings (tied to the head) too", METHOD)
    adapter_design: int = flag(
        1,
        "adaptertune: 1 one adapter per layer, with a LayerNorm; 2 one after each attention and after the MLP",
        METHOD,
        choices=(1, 2),
    )
    adapter_bottleneck: int = flag(100, "adaptertune: width inside an adapter", METHOD, above=0)

    init_text: str | None = flag(
        None,
        "start at the keys and values that this text (or @FILE, a text file) gives instead of at random; P becomes its "
        "number of tokens. With few data the start decides much: describe the task in words, or give a whole "
        "instruction. Without an MLP the prefix starts exactly there, else the MLP is trained onto it first (seconds)",
        START,
    )
    init_shallow: bool = flag(False, "train keys and values directly, without the MLP", START)
    init_shallow_word: str = flag("summarize", "the original's --init_text for --init_shallow yes (`no`: random)", RARE)
    use_lowdata_token: bool = flag(False, "the original's low-data runs: start from --lowdata_token", RARE)
    lowdata_token: str = flag("summarize", "the original's --init_text for the MLP", RARE)

    bsz: int = flag(10, "texts per step, over all processes, before accumulation", TRAINING, above=0)
    gradient_accumulation_steps: int = flag(
        1,
        "batches in one step, whose loss is the mean over all their tokens (or texts), as if they were one batch",
        TRAINING,
        above=0,
        names=("--gradient_accumulation_step",),
    )
    epoch: float = flag(5, "passes over the training set", TRAINING, above=0, below=2**31)
    max_steps: int = flag(-1, "stop after this many steps (-1: --epoch decides)", TRAINING, low=-1)
    learning_rate: float = flag(5e-5, "peak rate", TRAINING, above=0)
    warmup_steps: int = flag(0, "steps of linear warm-up; the original uses none", RARE, low=0)
    weight_decay: float = flag(0.0, "AdamW weight decay", TRAINING, low=0, below=1000)
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm (0: they are not)", TRAINING, low=0)
    seed: int = flag(101, "seed of initialisation, data order and dropout", TRAINING, low=0, below=2**32)
    bf16: bool = flag(False, "bfloat16 arithmetic; the trained weights stay float32", TRAINING)
    fp16: bool = flag(False, "float16 arithmetic with loss scaling; needs a GPU", TRAINING)
    gradient_checkpointing: bool = flag(False, "recompute activations: less memory, more time", TRAINING)
    shard_base: bool = flag(
        False,
        "spread the frozen model's layers over --num_processes: each keeps its part of every layer. For models that "
        "one GPU does not hold; slower",
        TRAINING,
    )

    output_dir: str | None = flag(None, "where checkpoints, logs, curves and results go", RECORDS)
    eval_steps: int = flag(0, "steps between dev evaluations (0: once per epoch)", RECORDS, low=0)
    save_steps: int = flag(0, "steps between resumable checkpoints (0: once per epoch)", RECORDS, low=0)
    logging_steps: int = flag(50, "steps between log lines", RECORDS, above=0)
    resume: bool = flag(
        False,
        "go on from the newest resumable checkpoint in the output folder; a finished run goes on with a larger --epoch "
        "or --max_steps",
        RECORDS,
    )
    allow_other_data: bool = flag(
        False,
        "resume: continue although the training or dev data are not those of the checkpoint; it is recorded",
        RECORDS,
    )
    overwrite_output_dir: bool = flag(False, "train into a folder that holds an earlier result", RECORDS)
    disable_tqdm: bool = flag(False, "no progress bars", RECORDS)
    report_to: str = flag(
        "tensorboard",
        "who else gets the curves: files in the output folder for TensorBoard, or Weights & Biases or MLflow, which "
        "take their own settings from the environment",
        RECORDS,
        choices=REPORTS,
    )
    decode: str | None = flag(
        None,
        "what is decoded and scored after training (default: mode text the test file if there is one, else the dev "
        "file; other modes both in gpt2/, none in seq2seq/)",
        RECORDS,
        choices=DECODE,
    )

    @property
    def columns(self) -> Columns:
        """Which columns of a table are read (mode text)."""
        return Columns(self.source_column, self.target_column, self.source_template or "", self.quotes)

    def splits_to_decode(self, has_test: bool, usual: tuple[str, ...]) -> tuple[str, ...]:
        """The files that are decoded after training: those of --decode, else the task's: `usual` for the paper's.

        Raises UserError where a test file is asked for and there is none.
        """
        if self.decode is None:
            if self.mode in OWN_DATA:
                return ("test",) if has_test else ("valid",)
            return usual
        if self.decode in ("test", "both") and not has_test:
            raise UserError(f"--decode {self.decode}: there is no test file; pass --test_file")
        return {"both": ("valid", "test"), "none": ()}.get(self.decode, (self.decode,))

    def check_conversations(self) -> None:
        """Raise UserError for flags that change the text of a source, where conversations have their own form."""
        for name in ("source_template", "use_lowdata_token"):
            if getattr(self, name):
                refuse_together(f"--{name}", "a column of messages", "the model's own chat template is used")

    def data_settings(self) -> dict[str, str]:
        """How the user's own pairs are read, for the checkpoint: decoding follows it, a resumed run must repeat it."""
        if self.mode not in OWN_DATA:
            return {}
        names = ("source_column", "target_column", "source_template")
        return {name: getattr(self, name) or "" for name in names}

    def of_the_run(self) -> dict[str, Any]:
        """The settings for --config: all but where the run is written and what happens to an earlier one there."""
        return {name: value for name, value in self.as_flags().items() if name not in OF_THE_FOLDER}

    @property
    def has_prefix(self) -> bool:
        """Whether the tuning mode trains a prefix."""
        return self.tuning_mode in WITH_PREFIX

    def start_text(self) -> str | None:
        """The text that the prefix starts from; None for a random start, or where there is no prefix to start.

        Raises UserError for a file that cannot be read.
        """
        if not self.has_prefix or not self.optim_prefix or self.prefix_model_path:
            return None
        if self.init_text is not None:
            return text_or_file("--init_text", self.init_text)
        if self.init_shallow:
            return None if self.init_shallow_word == "no" else self.init_shallow_word
        return self.lowdata_token if self.use_lowdata_token else None

    def decode_command(self, family: str, output: Path) -> str:
        """The command that decodes with the run's result; a test file of the user's own where the run has one."""
        test_file = self.test_file or ("YOUR_FILE" if self.train_file else None)
        how = {"tuned": not self.has_prefix, "data_dir": self.data_dir, "test_file": test_file}
        return decode_command(family, self.mode, output, **how)

    def tuning_settings(self) -> dict[str, Any]:
        """The settings of this run's tuning mode alone, in their flags' spelling."""
        return {name: spelled(getattr(self, name)) for name in TUNING_SETTINGS.get(self.tuning_mode, ())}

    def check_shared(self) -> None:
        """Raise UserError for values and combinations that make no sense in either tree, naming the flags."""
        self.check_values()
        if self.max_steps == 0:
            raise UserError("--max_steps 0: nothing would be trained; -1 leaves it to --epoch")
        if self.train_file and not self.eval_file:
            raise UserError("--train_file needs --eval_file, the dev file that goes with it")
        self.check_only_with(SHARED_RULES)
        check_template(self.source_template)
        for first, second, why in (
            ("bf16", "fp16", "one precision per run"),
            ("resume", "overwrite_output_dir", "resuming keeps what is there"),
            ("shard_base", "gradient_checkpointing", "a layer would be collected twice"),
        ):
            if getattr(self, first) and getattr(self, second):
                refuse_together(f"--{first} yes", f"--{second} yes", why)
        if self.resume and self.prefix_model_path:
            refuse_together(
                "--resume yes", "--prefix_model_path", "resuming takes the weights of the newest checkpoint"
            )
        self._check_one_start()

    def check_processes(self, processes: int) -> None:
        """Raise UserError where the model is to be spread over the processes of a run that has one alone."""
        if self.shard_base and processes == 1:
            raise UserError("--shard_base yes needs several processes: --num_processes 2 or more")

    def _check_one_start(self) -> None:
        """Only one initialisation may be given: another prefix's weights, or one text."""
        spellings = {
            "init_text": self.init_text is not None,
            "use_lowdata_token": self.use_lowdata_token,
            "init_shallow_word": self.init_shallow_word not in ("summarize", "no"),
        }
        given = [name for name, is_given in spellings.items() if is_given]
        if self.prefix_model_path and given:
            refuse_together("--prefix_model_path", f"--{given[0]}", "a prefix is initialised once")
        if self.init_text is not None and (len(given) > 1 or self.init_shallow_word != "summarize"):
            other = "use_lowdata_token" if self.use_lowdata_token else "init_shallow_word"
            refuse_together("--init_text", f"--{other}", "both name the text to start from")


_NO_LAYERS, _NO_ADAPTERS, _NO_MLP = "the others train no chosen layers", "there are no adapters", "there is no MLP"
TABLE_RULES = tuple(
    Only(name, "mode", OWN_DATA, "the task's files have no columns to choose from")
    for name in ("source_column", "target_column", "source_template", "quotes")
)
SHARED_RULES = (
    *TABLE_RULES,
    *(
        Only(name, "tuning_mode", WITH_PREFIX, "it changes prefixes only")
        for name in ("use_deep", "mid_dim", "init_text", "init_shallow", "prefix_model_path")
    ),
    Only("allow_other_data", "resume", (True,), "only a resumed run compares its data with earlier ones"),
    Only("quantization", "tuning_mode", ("prefixtune",), "weights that are trained keep all their bits"),
    Only("shard_base", "tuning_mode", ("prefixtune",), "only a frozen model is spread"),
    Only("shard_base", "quantization", (None, "no"), "weights in few bits are not spread"),
    Only("use_dropout", "tuning_mode", ("prefixtune",), "it is the dropout of the frozen model"),
    Only("top_layers", "tuning_mode", ("finetune-top",), _NO_LAYERS),
    Only("top_embeddings", "tuning_mode", ("finetune-top",), _NO_LAYERS),
    Only("adapter_design", "tuning_mode", ("adaptertune",), _NO_ADAPTERS),
    Only("adapter_bottleneck", "tuning_mode", ("adaptertune",), _NO_ADAPTERS),
    Only("use_deep", "init_shallow", (False,), _NO_MLP),
    Only("mid_dim", "init_shallow", (False,), _NO_MLP),
    Only("use_lowdata_token", "init_shallow", (False,), "without an MLP, --init_shallow_word names the text"),
    Only("init_shallow_word", "init_shallow", (True,), "it starts keys and values without an MLP"),
    Only("lowdata_token", "use_lowdata_token", (True,), "it is used nowhere else"),
)
