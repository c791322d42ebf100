"""The flags of this tree: `Settings` of a training run, `Decoding` of a decoding run (standard library only)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from prefixlib.data.tables import Columns
from prefixlib.data.tasks import GPT2_MODES, OWN_DATA, TASKS, find_task
from prefixlib.methods.table import WITH_PREFIX
from prefixlib.settings.flags import (
    DECODING,
    METHOD,
    QUANTIZATIONS,
    RARE,
    RECORDS,
    SEARCH_BOUNDS,
    TASK,
    Only,
    flag,
    refuse_together,
    spelled,
)
from prefixlib.settings.search import Search, SearchFlags
from prefixlib.settings.training import Training
from prefixlib.system.errors import UserError

DEFAULT_MODEL = "gpt2-medium"
OBJECTIVE = "objective"
LENGTHS = ("max_source_length", "train_max_target_length", "val_max_target_length")


def _help_of_length(name: str, of: str) -> str:
    """The help of a flag for the most tokens of a part of the text, which summaries alone limit."""
    rows = [row for row in TASKS.values() if row.gpt2 and row.gpt2.lengths]
    return f"most tokens of a {of} (default: {', '.join(f'{row.name} {row.gpt2.lengths[name]}' for row in rows)})"


@dataclass(frozen=True)
class Settings(Training):
    """A training run. Every field is a flag of train_e2e.py; bool is yes / no there."""

    HELP: ClassVar[Mapping[str, str]] = {
        "eval_file": "dev file: loss while training, decoded as `valid` afterwards",
        "test_file": "test file, decoded as `test` after training where it exists",
        "max_source_length": _help_of_length("max_source_length", "source"),
        "val_max_target_length": _help_of_length("val_max_target_length", "dev summary"),
        "model_name_or_path": f"hub name or local folder (default: {DEFAULT_MODEL}, or gpt2-large if the notes say "
        "large)",
        "preseqlen": "prefix length P; 5 to 10 is best for table-to-text",
        "mid_dim": "width of the reparametrisation's hidden layer",
        "optim_prefix": "a free prefix, the same for all inputs; `no`: made of the source's words",
        "lowdata_token": "the original's --init_text for the MLP; with --tuning_mode finetune it is put in front of "
        "every source",
        "learning_rate": "peak rate, decaying linearly to 0",
    }

    mode: str = flag("data2text", "the task, and so the file format", TASK, choices=GPT2_MODES)
    train_max_target_length: int | None = flag(
        None, _help_of_length("train_max_target_length", "training summary"), RARE, low=1
    )
    prefix_mode: str = flag(
        "activation",
        "train keys and values in every layer, or input embeddings alone (section 7.2)",
        METHOD,
        choices=("activation", "embedding"),
    )
    parametrize_emb: str = flag("MLP", "prefix_mode embedding: through an MLP or not", RARE, choices=("MLP", "Emb"))
    format_mode: str = flag(
        "cat",
        "what stands where; cat (peek is its other name): prefix, source, target; infix: source, prefix, target; "
        "nopeek: the source is left out",
        METHOD,
        choices=("cat", "peek", "nopeek", "infix"),
    )
    init_random: str = flag(
        "normal",
        "where a random start is drawn from: N(0, 1), as in the original's code, or uniform (0, 1), as in the paper's "
        "comparison of initialisations",
        RARE,
        choices=("normal", "uniform"),
    )
    objective_mode: int = flag(
        1,
        "a prefix's loss: 0 mean over tokens; else per text, then averaged: 1 sum, 2 by padded length, "
        "3 by the longest target, 4 by text length",
        OBJECTIVE,
        choices=range(5),
    )
    distill: bool = flag(False, "match the fine-tuned model in --finetuned_model_path instead of the texts", OBJECTIVE)
    finetuned_model_path: str | None = flag(None, "distill: the teacher, a fine-tuned model's folder", OBJECTIVE)
    matching_objective: str = flag(
        "kl",
        "distill: KL divergence from the teacher's distribution, or distance from its logits",
        OBJECTIVE,
        choices=("kl", "logits"),
    )
    matching_positions: str = flag(
        "all",
        "distill: where: everywhere, padding included, as the original; all but padding; at scored tokens",
        RARE,
        choices=("all", "text", "target"),
    )
    distill_context: str | None = flag(
        None,
        "a text file: train the prefix so that the model behind it does what it does with the whole text in front, on "
        "the training texts or on --context_samples; the prefix starts from the text's first P tokens",
        OBJECTIVE,
    )
    context_samples: int = flag(
        0,
        "distill_context: train on N texts, and evaluate on N/5 more, that the model itself writes with the text in "
        "front (0: on the training file's)",
        OBJECTIVE,
        low=0,
    )
    matching_top_k: int = flag(
        0, "distillation by kl: only over the teacher's K most probable tokens (0: all)", OBJECTIVE, low=0
    )
    freeze_first: bool = flag(
        False, "distill_context: the first position keeps the keys and values it starts from", OBJECTIVE
    )
    use_custom_teacher_dropout: bool = flag(False, "finetune: --dropout is the model's own residual dropout", RARE)
    eval_batch_size: int = flag(0, "dev texts evaluated together; changes the speed only (0: --bsz)", RECORDS, low=0)
    early_stopping_patience: int = flag(
        -1, "stop after N evaluations without a lower dev loss (-1: never)", RECORDS, low=-1
    )
    keep_best: bool = flag(
        False, "keep the checkpoint with the lowest dev loss in OUTPUT/best and decode it; early stopping does", RECORDS
    )
    skip_decode: bool = flag(False, "the same as --decode none", RARE)
    decode_limit: int | None = flag(
        None,
        "decode only the first N inputs of a file; with seen and unseen categories (WebNLG), the first N/2 of each",
        RECORDS,
        low=1,
    )
    max_new_tokens: int = flag(100, "most tokens of an output in the decoding after training", RECORDS, above=0)
    batch_size: int = flag(32, "sentences decoded together", RECORDS, above=0)

    def check(self) -> None:
        """Raise UserError for values that make no sense, alone or together, naming the flags."""
        self.check_shared()
        if self.distill and not self.finetuned_model_path:
            raise UserError("--distill yes needs --finetuned_model_path, the fine-tuned model to learn from")
        if self.skip_decode and self.decode not in (None, "none"):
            refuse_together("--skip_decode yes", f"--decode {self.decode}", "it says that nothing is decoded")
        if self.early_stopping_patience == 0:
            raise UserError("--early_stopping_patience 0: at least 1 evaluation, or -1 for never")
        self.check_only_with(RULES)
        for name in () if self.distill or self.distill_context else MATCHING:
            if getattr(self, name) != self.default(name):
                refuse_together("--distill no", f"--{name}", "it is how the teacher is matched")
        for name in () if self.distill_context else ("context_samples", "freeze_first"):
            if getattr(self, name):
                raise UserError(f"--{name} {spelled(getattr(self, name))} needs --distill_context FILE")
        for name in ("distill", "init_text", "prefix_model_path") if self.distill_context else ():
            if getattr(self, name):
                refuse_together("--distill_context", f"--{name}", "the text is the teacher's and the prefix's start")
        if self.init_random != "normal":
            word = self.init_shallow and self.init_shallow_word != "no"
            starts = {
                "init_text": self.init_text,
                "prefix_model_path": self.prefix_model_path,
                "init_shallow_word": word,
            }
            for name, given in starts.items():
                if given:
                    refuse_together(f"--{name}", f"--init_random {self.init_random}", "a prefix is initialised once")
        if self.dropout > 0 and not self.has_prefix and not self.use_custom_teacher_dropout:
            refuse_together(f"--tuning_mode {self.tuning_mode}", "--dropout", "it changes prefixes only")
        if not self.optim_prefix and self.format_mode == "infix" and self.has_prefix:
            refuse_together(
                "--optim_prefix no", "--format_mode infix", "an infix is trained, not made of the source's words"
            )

    @property
    def keeps_best(self) -> bool:
        """Whether the checkpoint with the lowest dev loss is kept: --keep_best, or early stopping, which goes by it."""
        return self.keep_best or self.early_stopping_patience > 0

    def lengths(self) -> dict[str, int | None]:
        """Most tokens of each part of the text: the flag's, else the task's; None where only the model limits it."""
        of_task = find_task(self.mode).gpt2.lengths
        return {name: getattr(self, name) or of_task.get(name) for name in LENGTHS}

    def steps(self, examples: int) -> int:
        """Optimiser steps of the run, as the loop counts them: --max_steps may exceed --epoch."""
        return self.max_steps if self.max_steps > 0 else super().steps(examples)

    def long_name(self, notes: str | None) -> str:
        """The folder name that the original made of the settings: a label, nothing is read out of it."""
        name = (
            f"{self.name_start()}-e={self.epoch:g}_d={self.dropout}_u={spelled(self.use_dropout)}"
            f"_lr={self.learning_rate}_w={self.weight_decay}_s={self.seed}_r=n_m={self.mid_dim}"
        )
        teacher = f"uctd={spelled(self.use_custom_teacher_dropout)}" if self.tuning_mode == "finetune" else None
        student = f"distill_o={self.matching_objective}" if self.distill else None
        parts = (name, notes, self.tuning_label(), teacher, f"o={self.objective_mode}", student)
        return "_".join(filter(None, parts))

    def decoded_after_training(self) -> tuple[str, ...]:
        """The splits that are decoded. Raises UserError where a test file is asked for and there is none."""
        return () if self.skip_decode else self.splits_to_decode(self.has_test, ("valid", "test"))

    @property
    def matching(self) -> tuple[str, str, int]:
        """How a teacher is matched: the objective, where, and over how many tokens."""
        return self.matching_objective, self.matching_positions, self.matching_top_k

    def decoding(self) -> "Decoding":
        """The flags of the decoding after training."""
        return Decoding(
            batch_size=self.batch_size,
            length=self.max_new_tokens,
            decode_limit=self.decode_limit,
            disable_tqdm=self.disable_tqdm,
            data_dir=self.data_dir,
        )

    @property
    def start(self) -> str:
        """The name of the prefix's start in building.STARTS."""
        if self.prefix_model_path:
            return "checkpoint"
        if self.distill_context:
            return "context"
        if self.start_text() is not None:
            return "text"
        return "uniform" if self.init_random == "uniform" else "random"

    @property
    def start_path(self) -> Path | None:
        """The checkpoint or the text file that the prefix starts from, where it starts from one."""
        path = self.prefix_model_path or self.distill_context
        return Path(path).expanduser() if path else None

    def start_text(self) -> str | None:
        """The text that the prefix starts from; None where it starts at random, or from --distill_context."""
        return None if self.distill_context else super().start_text()

    def prefix_settings(self) -> dict[str, Any]:
        """The settings of PrefixConfig that the flags choose. P is the flag's: a text to start from has its own."""
        names = ("mid_dim", "prefix_mode", "format_mode", "optim_prefix", "parametrize_emb", "use_deep", "init_shallow")
        chosen = {"preseqlen": self.preseqlen if self.optim_prefix else 0, "prefix_dropout": self.dropout}
        return {**chosen, **{name: getattr(self, name) for name in names}, "init_text": self.start_text()}

    def source_word(self) -> str:
        """What is put in front of every source: the original's low-data fine-tuning."""
        return self.lowdata_token if self.tuning_mode == "finetune" and self.use_lowdata_token else ""

    def training_settings(self) -> dict[str, Any]:
        """What shapes the weights, by flag: a resumed run must repeat it. The prefix has a config of its own."""
        values = {**self.as_flags(), **self.lengths()}
        for name in ("finetuned_model_path", "distill_context"):
            if values.get(name):  # resolved: a resumed run may be started from another folder
                values[name] = str(Path(values[name]).expanduser().resolve())
        kept = {name: values[name] for name in TRAINING_SETTINGS if values.get(name) is not None}
        return kept | self.data_settings() | self.tuning_settings()


TRAINING_SETTINGS = (
    *("mode", "tuning_mode", "objective_mode", "use_dropout", "bsz", "gradient_accumulation_steps", "epoch"),
    *("max_steps", "early_stopping_patience", "learning_rate", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("dropout", "seed", "bf16", "fp16", "quantization"),
    *LENGTHS,
    *("distill", "finetuned_model_path", "distill_context", "context_samples", "freeze_first"),
    *("matching_objective", "matching_positions", "matching_top_k", "use_custom_teacher_dropout"),
)
MATCHING = ("matching_objective", "matching_positions", "matching_top_k")

_CUT = tuple(row.name for row in TASKS.values() if row.gpt2 and (row.gpt2.lengths or row.verbatim))
_OF_SOURCE = "such a prefix is made of the source's words"
RULES = (
    *(
        Only(name, "tuning_mode", WITH_PREFIX, "it changes prefixes only")
        for name in ("objective_mode", "prefix_mode", "format_mode", "parametrize_emb", "init_random")
    ),
    Only("distill", "tuning_mode", ("prefixtune",), "a prefix is what learns from the teacher"),
    Only("use_lowdata_token", "tuning_mode", (*WITH_PREFIX, "finetune"), "there is nothing for the token to start"),
    Only("use_custom_teacher_dropout", "tuning_mode", ("finetune",), "it shapes the training of a teacher"),
    Only("parametrize_emb", "prefix_mode", ("embedding",), "it says how embeddings are made"),
    Only("init_shallow", "prefix_mode", ("activation",), "embeddings have --parametrize_emb Emb"),
    Only("use_deep", "prefix_mode", ("activation",), "the deep network makes keys and values"),
    Only("format_mode", "prefix_mode", ("activation",), "embeddings stand in front"),
    Only("prefix_mode", "optim_prefix", (True,), "a prefix made of words is keys and values"),
    Only("mid_dim", "parametrize_emb", ("MLP",), "there is no MLP"),
    Only("init_shallow", "optim_prefix", (True,), "a prefix made of words needs its MLP"),
    Only("init_text", "optim_prefix", (True,), _OF_SOURCE),
    Only("use_lowdata_token", "optim_prefix", (True,), _OF_SOURCE),
    Only("init_random", "optim_prefix", (True,), _OF_SOURCE),
    Only("init_random", "use_lowdata_token", (False,), "the prefix starts from the token"),
    Only("finetuned_model_path", "distill", (True,), "it is the teacher"),
    Only("matching_top_k", "matching_objective", ("kl",), "distances of logits are over the whole vocabulary"),
    Only("freeze_first", "init_shallow", (True,), "behind an MLP every position moves with the others"),
    Only("shard_base", "prefix_mode", ("activation",), "embeddings become keys and values in one process"),
    Only("distill_context", "tuning_mode", ("prefixtune",), "a prefix is what learns from the text"),
    Only("distill_context", "optim_prefix", (True,), "a prefix made of the source has nothing to learn"),
    Only("distill_context", "prefix_mode", ("activation",), "it starts from the text's keys and values"),
    Only("distill_context", "format_mode", ("cat", "peek"), "the teacher reads what the student reads"),
    Only("distill", "optim_prefix", (True,), "a prefix made of the source is trained on texts"),
    Only("distill", "format_mode", ("cat", "peek"), "the teacher reads what the student reads, source included"),
    *(Only(name, "mode", _CUT, "other texts are cut to the model's positions only") for name in LENGTHS),
)


@dataclass(frozen=True)
class Decoding(SearchFlags):
    """How texts are decoded. Every field is a flag of run_generation.py, which gen.py passes on."""

    data_file: str | None = flag(None, "the file to decode (default: the task's SPLIT file under --data_dir)", DECODING)
    source_column: str | None = flag(
        None, "mode text: the column of the sources (default: the one trained on)", DECODING
    )
    target_column: str | None = flag(
        None, "mode text: the column of the targets (default: the one trained on)", DECODING
    )
    quotes: bool | None = flag(
        None,
        "mode text: quotation marks of a .csv or .tsv file go around cells (yes) or are text (no) (default: what fits)",
        DECODING,
    )
    data_dir: str | None = flag(None, "folder of all data sets, or the task's own (default: data/)", DECODING)
    decode_limit: int | None = flag(
        None,
        "only the first N inputs of the file; with seen and unseen categories (WebNLG), the first N/2 of each",
        DECODING,
        low=1,
        names=("--limit",),
    )
    reference_loss: bool = flag(
        False, "also the mean loss per token of each decoded input's first reference, `loss`", DECODING
    )
    output_dir: str | None = flag(None, "where the outputs go (default: into the checkpoint's folder)", DECODING)
    model_name_or_path: str | None = flag(None, "base model, where the checkpoint's own is not to be found", DECODING)
    allow_other_base: bool = flag(
        False, "decode with a base model of the same shape that is not the one trained on", DECODING
    )
    cache_dir: str | None = flag(None, "where hub files are kept", RARE)
    samples: int | None = flag(
        None, "outputs per prompt, drawn one by one (default: sentiment, topic 3; else 1)", RARE, low=1
    )
    openings: str | None = flag(
        None, "sentiment, topic: file of what texts begin with, one a line (default: PPLM's)", RARE
    )
    length: int = flag(100, "most tokens to generate", DECODING, above=0, names=("--max_new_tokens",))
    length_penalty: float | None = flag(
        None, "above 1 favours long outputs (default: 1)", DECODING, **SEARCH_BOUNDS["length_penalty"]
    )
    length_normalization: str = flag(
        "prompt+output",
        "what a beam's score is divided by: the original's rule, or that of transformers today",
        RARE,
        choices=("prompt+output", "output"),
    )
    seed: int = flag(42, "seed of nucleus sampling", DECODING, low=0)
    batch_size: int = flag(32, "sentences decoded together; changes speed only", DECODING, above=0)
    bf16: bool = flag(False, "the frozen model in bfloat16", DECODING)
    quantization: str | None = flag(
        None,
        "the frozen model in fewer bits, as in training (default: as it was trained)",
        DECODING,
        choices=QUANTIZATIONS,
    )
    attn_implementation: str | None = flag(
        None,
        "how attention is computed: sdpa, torch's kernels, or eager, step by step (default: transformers' choice)",
        RARE,
        choices=("sdpa", "eager"),
    )
    disable_tqdm: bool = flag(False, "no progress bar", DECODING)

    def columns(self, task: Mapping[str, Any]) -> Columns:
        """Which columns of a table are read: the flags', else those that the checkpoint was trained on."""
        return Columns.of(task, self.source_column, self.target_column, self.quotes)

    def search(self) -> Search:
        """What these flags say of the search."""
        return Search.of(self, max_new_tokens=self.length)

    def strategy_for(self, mode: str) -> tuple[str, int]:
        """The strategy and the outputs per prompt: the flags', else the task's.

        Raises UserError for values that make no sense, and for flags that have no effect under the strategy.
        """
        self.check_values()
        task = find_task(mode).gpt2
        strategy = self.search().chosen_strategy(mode, task.strategy)
        samples = self.samples or (task.samples if strategy == "nucleus" else 1)
        if samples > 1 and strategy != "nucleus":
            refuse_together(f"--strategy {strategy}", f"--samples {samples}", "every sample would be the same")
        if self.openings and not task.openings:
            refuse_together(f"--mode {mode}", "--openings", "its outputs are not begun for it")
        if mode not in OWN_DATA and (self.source_column or self.target_column or self.quotes is not None):
            refuse_together(f"--mode {mode}", "--source_column, --target_column, --quotes", "its files have no columns")
        return strategy, samples
