"""The settings of a training run that both trees have, and which of them go together (standard library only)."""

import hashlib
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from prefixlib.data.tables import Columns
from prefixlib.data.tasks import OWN_DATA, data_file, given_file, is_there
from prefixlib.data.wording import check_template
from prefixlib.methods.table import FROZEN_BASE, METHODS, WITH_PREFIX
from prefixlib.settings.commands import decode_command
from prefixlib.settings.flags import (
    DECODE,
    METHOD,
    MODEL,
    QUANTIZATIONS,
    RARE,
    RECORDS,
    REPORTS,
    START,
    TASK,
    TRAINING,
    Flags,
    Only,
    flag,
    refuse_together,
    spelled,
    text_or_file,
)
from prefixlib.system.errors import UserError

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
        choices=tuple(METHODS),
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

    def file(self, split: str) -> Path:
        """The file of split train, valid or test: the flag's, else the task's under --data_dir."""
        given = {"train": self.train_file, "valid": self.eval_file, "test": self.test_file}[split]
        return given_file(self.mode, given, split) if given else data_file(self.mode, split, self.data_dir)

    @property
    def has_test(self) -> bool:
        """Whether there is a test file. The standard one does not belong to the user's own training file."""
        return bool(self.test_file) or (not self.train_file and is_there(self.mode, self.file("test")))

    def output_folder(self) -> Path:
        """The folder of the run. Raises UserError without --output_dir."""
        if not self.output_dir:
            raise UserError("--output_dir is missing: where checkpoints, logs, curves and results go")
        return Path(self.output_dir).expanduser().resolve()

    def steps(self, examples: int) -> int:
        """Optimiser steps of the run on so many examples, as the loop counts them."""
        batches = math.ceil(examples / self.bsz)
        steps = math.ceil(self.epoch * math.ceil(batches / self.gradient_accumulation_steps))
        return min(steps, self.max_steps) if self.max_steps > 0 else steps

    def run_length(self) -> dict[str, Any]:
        """The settings that a prolonged run may change."""
        return {name: getattr(self, name) for name in LENGTH}

    @property
    def texts_per_step(self) -> int:
        """Texts in one optimiser step."""
        return self.bsz * self.gradient_accumulation_steps

    @property
    def title(self) -> str:
        """The title of the run's plots."""
        return f"{self.mode}, {self.tuning_mode}"

    def name_start(self) -> str:
        """The start of the folder name that the original made of the settings."""
        return (
            f"{self.mode}{self.tuning_mode}_{spelled(self.optim_prefix)[0]}_{self.preseqlen}_{self.prefix_mode[:3]}"
            f"_{self.format_mode[:3]}_b={self.texts_per_step}"
        )

    def short_name(self, notes: str | None) -> str:
        """A run's folder: task, what is tuned, notes, seed, and a digest of the settings that differ from the defaults.

        Of files and folders the digest takes the name alone, so that it is the same on every machine. Settings that
        only say how long the run is, or what it writes and where, do not count: a run is resumed in its folder with
        more epochs.
        """
        apart = {field.name for field in fields(self) if field.metadata["group"] == RECORDS}
        apart |= {"data_dir", "cache_dir", "num_workers", "skip_decode", *LENGTH}
        chosen = [
            (name, Path(value).name if isinstance(value, str) else value)
            for name, value in sorted(self.as_flags().items())
            if name not in apart and value != spelled(self.default(name))
        ]
        digest = hashlib.sha256(repr(chosen).encode()).hexdigest()[:6]
        return "-".join(filter(None, (self.mode, self.tuning_mode, notes, f"s{self.seed}", digest)))

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
        return METHODS[self.tuning_mode].prefix

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

    def tuning_label(self) -> str | None:
        """What the original appended to a run's notes for its tuning mode; None if nothing."""
        notes = METHODS[self.tuning_mode].notes
        return notes(vars(self)) if notes else None

    def tuning_settings(self) -> dict[str, Any]:
        """The settings of this run's tuning mode alone, in their flags' spelling."""
        return {name: spelled(getattr(self, name)) for name in METHODS[self.tuning_mode].settings}

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


_NO_MLP = "there is no MLP"
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
    Only("quantization", "tuning_mode", FROZEN_BASE, "weights that are trained keep all their bits"),
    Only("shard_base", "tuning_mode", FROZEN_BASE, "only a frozen model is spread"),
    Only("shard_base", "quantization", (None, "no"), "weights in few bits are not spread"),
    Only("use_dropout", "tuning_mode", FROZEN_BASE, "it is the dropout of the frozen model"),
    *(
        Only(name, "tuning_mode", (mode,), method.refusal)
        for mode, method in METHODS.items()
        for name in method.settings
    ),
    Only("use_deep", "init_shallow", (False,), _NO_MLP),
    Only("mid_dim", "init_shallow", (False,), _NO_MLP),
    Only("use_lowdata_token", "init_shallow", (False,), "without an MLP, --init_shallow_word names the text"),
    Only("init_shallow_word", "init_shallow", (True,), "it starts keys and values without an MLP"),
    Only("lowdata_token", "use_lowdata_token", (True,), "it is used nowhere else"),
)
