"""The settings of this tree: its flags, its defaults, which of them go together (standard library only).

    settings = Settings(mode="xsum", preseqlen=200, mid_dim=800, output_dir="runs/xsum")

A field is a flag of train_bart.py, train_e2e.py and finetune.py. Those that gpt2/ shares are in
prefixlib/settings/training.py.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from prefixlib.data.tasks import SEQ2SEQ_MODES, InSeq2Seq, find_task
from prefixlib.methods.table import WITH_PREFIX
from prefixlib.settings.flags import (
    DECODING,
    METHOD,
    RARE,
    RECORDS,
    SEARCH_BOUNDS,
    TASK,
    TRAINING,
    Only,
    flag,
    refuse_together,
    spelled,
)
from prefixlib.settings.search import Search, SearchFlags
from prefixlib.settings.training import TABLE_RULES, Training
from prefixlib.system.errors import UserError

DEFAULT_MODEL = "bart-large"


@dataclass(frozen=True)
class Settings(Training, SearchFlags):
    """A training run, or with do_train=False the decoding of a checkpoint."""

    HELP: ClassVar[Mapping[str, str]] = {"prefix_model_path": "prefix checkpoint to decode, or to start training from"}

    mode: str = flag("", "the task: its data, lengths and decoding", TASK, choices=SEQ2SEQ_MODES)
    max_target_length: int | None = flag(
        None, "most tokens of a training text, special tokens included (default: the task's)", RARE, low=1
    )
    test_max_target_length: int | None = flag(
        None, "most tokens of a test text in the original's average ROUGE (default: the task's)", RARE, low=1
    )
    n_train: int = flag(-1, "use the first N training examples (-1: all)", TASK, low=-1)
    n_val: int = flag(500, "use the first N dev examples (-1: all)", TASK, low=-1)
    n_test: int = flag(
        -1,
        "decode the first N examples of the test file, or of the file that --decode says (-1: all)",
        TASK,
        low=-1,
        names=("--limit", "--decode_limit"),
    )

    preseqlen: int = flag(5, "prefix length P; 200 is best for summarisation", METHOD, above=0)
    optim_prefix: bool = flag(True, "always yes: a free prefix", METHOD, choices=(True,))
    use_dropout: bool = flag(True, "dropout inside the frozen model while the prefix is trained", RARE)
    use_encoder_prefix: bool = flag(True, "prefix at the encoder's self-attention; `no` for ablations", METHOD)
    use_cross_prefix: bool = flag(True, "prefix at the cross-attention; `no` for ablations", METHOD)
    use_self_prefix: bool = flag(True, "prefix at the decoder's self-attention; `no` for ablations", METHOD)
    finetune_model_path: str | None = flag(
        None, "model to decode that was tuned itself: whole, in part, with adapters", METHOD
    )

    do_train: bool = flag(True, "train; `no` decodes and scores --prefix_model_path or --finetune_model_path", TRAINING)
    group_by_length: bool = flag(
        False, "batches of sources of similar length: less padding, faster; `no` as published", TRAINING
    )
    epoch: int = flag(5, "passes over the training set", TRAINING, above=0)
    lr_scheduler: str = flag(
        "linear", "course of the rate to the end", TRAINING, choices=("linear", "cosine", "constant")
    )
    max_grad_norm: float = flag(0.0, "gradients are clipped to this norm (0: they are not)", TRAINING, low=0)
    label_smoothing: float = flag(0.0, "smoothing of the training loss, 0 to 1", TRAINING, low=0, below=1)
    num_workers: int = flag(2, "processes that tokenise (0: the training process does)", RARE, low=0)

    save_steps: int = flag(500, "steps between resumable checkpoints", RECORDS, above=0)
    val_metric: str | None = flag(
        None,
        "what the best checkpoint is best in; a tie goes to the lower loss (default: text loss; else rouge2)",
        RECORDS,
        choices=("rouge2", "loss"),
    )
    early_stopping_patience: int = flag(-1, "stop after N validations without a better one (-1: no)", RECORDS, low=-1)

    min_length: int | None = flag(None, "fewest tokens, the start token included", DECODING, low=0)
    max_length: int | None = flag(
        None, "most tokens, the start token included", DECODING, low=2, names=("--eval_max_gen_length",)
    )
    max_new_tokens: int | None = flag(None, "--max_length without the start token", DECODING, above=0)
    no_repeat_ngram_size: int | None = flag(None, "no n-gram of this size occurs twice (0: no rule)", DECODING, low=0)
    early_stopping: bool | None = flag(None, "stop a search at its first full set of outputs", DECODING)
    length_pen: float | None = flag(
        None,
        "above 1 favours long outputs",
        DECODING,
        **SEARCH_BOUNDS["length_penalty"],
        names=("--length_penalty",),
    )
    force_bos: bool = flag(False, "make <s> the first token by force; training teaches it anyway", RARE)
    allow_other_base: bool = flag(
        False, "decode with a base model of the same shape that is not the one trained on", DECODING
    )
    eval_batch_size: int = flag(10, "texts decoded together; changes speed only", DECODING, above=0)

    @property
    def task(self) -> InSeq2Seq:
        """The task's row."""
        return find_task(self.mode).seq2seq

    @property
    def best_in(self) -> str:
        """What the best checkpoint is best in: the flag's, else the task's."""
        return self.val_metric or self.task.val_metric

    @property
    def checkpoint(self) -> Path:
        """The checkpoint to decode."""
        return Path(self.prefix_model_path or self.finetune_model_path).expanduser()

    @property
    def brings_its_model(self) -> bool:
        """Whether a checkpoint is decoded that holds a tuned model: a demo's base model is not needed."""
        if self.do_train:
            return False
        tuned_with_prefix = self.prefix_model_path and (self.checkpoint / "model").is_dir()
        return bool(self.finetune_model_path or tuned_with_prefix)

    def long_name(self, notes: str | None) -> str:
        """The folder name that the original made of the settings: a label, nothing is read out of it."""
        name = (
            f"{self.name_start()}-e={self.epoch}_d={self.dropout}_l={self.label_smoothing}_lr={self.learning_rate}"
            f"_w={self.weight_decay}_s={self.seed}_d={spelled(self.use_deep)[0]}_m={self.mid_dim}"
        )
        return "_".join(filter(None, (name, notes, self.tuning_label())))

    @property
    def start(self) -> str:
        """The name of the prefix's start in building.STARTS."""
        if self.prefix_model_path:
            return "checkpoint"
        return "random" if self.start_text() is None else "text"

    def prefix_settings(self) -> dict[str, Any]:
        """The settings of PrefixConfig that the flags choose. P is the flag's: a text to start from has its own."""
        names = ("preseqlen", "mid_dim", "use_deep", "init_shallow")
        sites = ("use_encoder_prefix", "use_cross_prefix", "use_self_prefix")
        return {"prefix_dropout": self.dropout, **{name: getattr(self, name) for name in (*names, *sites)}}

    @property
    def dtype(self) -> str:
        """The name of the precision in which a checkpoint is decoded."""
        return "float16" if self.fp16 else "bfloat16" if self.bf16 else "float32"

    def decoded_after_training(self) -> tuple[str, ...]:
        """The splits that are decoded. Raises UserError where a test file is asked for and there is none."""
        return self.splits_to_decode(self.has_test, usual=())

    def first(self, split: str) -> int:
        """How many examples of a split are used, -1 for all."""
        return {"train": self.n_train, "valid": self.n_val, "test": self.n_test}[split]

    def first_decoded(self, split: str) -> int:
        """How many examples of a split are decoded, -1 for all."""
        return self.n_test if self.n_test > 0 else self.first(split)

    def files_to_decode(self, splits: Iterable[str]) -> dict[str, tuple[Path, int]]:
        """The file of each split, and how many of its examples are decoded."""
        return {split: (self.file(split), self.first_decoded(split)) for split in splits}

    def lengths(self, positions: int) -> dict[str, int]:
        """Most tokens of each kind of text, by flag: the flag's, else the task's as far as the model has positions.

        Raises UserError for a flag above the model's `positions`.
        """
        lengths = {}
        for name, usual in self.task.lengths.items():
            given = getattr(self, name)
            if given is not None and given > positions:
                raise UserError(f"--{name} {given}: the model has {positions} positions")
            lengths[name] = min(given or usual, positions)
        return lengths

    def search(self, seed: int = 42) -> Search:
        """What these flags say of the search."""
        longest = self.max_length - 1 if self.max_length is not None else self.max_new_tokens
        fewest = self.task.min_length if self.min_length is None and longest is not None else self.min_length
        return Search.of(
            self,
            max_new_tokens=longest,
            min_length=fewest,
            length_penalty=self.length_pen,
            seed=seed,
            batch_size=self.eval_batch_size,
        )

    def strategy_now(self) -> str:
        """How tokens are chosen. Raises UserError for a flag that has no effect on that."""
        return self.search().chosen_strategy(self.mode, self.task.strategy)

    def check(self) -> None:
        """Raise UserError for values that make no sense, alone or together, naming the flags."""
        if not self.mode:
            raise UserError(f"the following arguments are required: --mode (one of {', '.join(SEQ2SEQ_MODES)})")
        for name in ("n_train", "n_val", "n_test", "early_stopping_patience"):
            if getattr(self, name) == 0:
                raise UserError(f"--{name} 0: must be at least 1, or -1")
        if self.max_length is not None and self.max_new_tokens is not None:
            refuse_together("--max_length", "--max_new_tokens", "they say the same")
        if self.prefix_model_path and self.finetune_model_path:
            refuse_together("--prefix_model_path", "--finetune_model_path", "one checkpoint at a time")
        if not self.do_train:
            self._check_decoding()
            return
        self.check_shared()
        self.strategy_now()
        self.check_only_with(RULES)
        if self.finetune_model_path:
            raise UserError("--finetune_model_path is for --do_train no; to train on from it, --model_name_or_path DIR")

    def _check_decoding(self) -> None:
        """The method's flags are not checked here but against the checkpoint, as far as they are given."""
        if not (self.prefix_model_path or self.finetune_model_path):
            raise UserError("--do_train no decodes a checkpoint: pass --prefix_model_path or --finetune_model_path")
        self.check_values()
        self.strategy_now()
        self.check_only_with(TABLE_RULES)
        for name in ("resume", "allow_other_data", "overwrite_output_dir"):
            if getattr(self, name):
                refuse_together("--do_train no", f"--{name} yes", "nothing is trained")
        if self.init_text is not None:
            refuse_together("--do_train no", "--init_text", "nothing is trained")
        if self.bf16 and self.fp16:
            refuse_together("--bf16 yes", "--fp16 yes", "one precision per run")


RULES = tuple(
    Only(name, "tuning_mode", WITH_PREFIX, "it changes prefixes only")
    for name in ("dropout", "use_lowdata_token", "use_encoder_prefix", "use_cross_prefix", "use_self_prefix")
)
