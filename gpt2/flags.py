"""The flags that the launcher and run_language_modeling.py both understand, defined once (standard library only)."""

import argparse
from dataclasses import dataclass

from prefixlib.errors import UserError
from prefixlib.launch import Parser, add_tuning_flags, add_yes_no, refuse_together
from prefixlib.readers import MODES

TUNING_MODES = ("prefixtune", "finetune", "finetune-top", "adaptertune", "bothtune")
WITH_PREFIX = ("prefixtune", "bothtune")
CLASSIFY = ("classify-sentiment", "classify-topic")
SUMMARIES = ("xsum", "cnndm")


PART_LIMITS = {  # most tokens of a document and its summary, beside the separators: the original's
    "xsum": {"max_source_length": 512, "train_max_target_length": 60, "val_max_target_length": 60},
    "cnndm": {"max_source_length": 512, "train_max_target_length": 56, "val_max_target_length": 142},
}


def add_task_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("task and data")
    group.add_argument("--mode", default="data2text", choices=tuple(MODES), help="the task, and so the file format")
    group.add_argument("--train_file", help="training file (default: the mode's own under --data_dir)")
    group.add_argument("--eval_file", help="dev file: loss while training, decoded as `valid` afterwards")
    group.add_argument("--test_file", help="test file, decoded as `test` after training where it exists")
    group.add_argument("--data_dir", help="folder with e2e_data/, webnlg_challenge_2017/, dart/ (default: data/)")
    for name, what in (
        ("max_source_length", "document, in training and decoding"),
        ("train_max_target_length", "training summary"),
        ("val_max_target_length", "dev summary"),
    ):
        default = ", ".join(f"{mode} {limits[name]}" for mode, limits in PART_LIMITS.items())
        group.add_argument(f"--{name}", type=int, help=f"most tokens of a {what} (default: {default})")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("base model")
    group.add_argument(
        "--model_name_or_path",
        help="hub name or local folder (default: gpt2-medium, or gpt2-large if the notes say large)",
    )
    group.add_argument("--model_revision", help="commit or tag of the hub model (default: its newest)")
    group.add_argument("--cache_dir", help="where hub files are kept (default: the hub library's own place)")


def add_method_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("method")
    group.add_argument(
        "--tuning_mode",
        default="prefixtune",
        choices=TUNING_MODES,
        help="what is trained: a prefix, the model, its top layers, adapters inside it, or prefix and model together",
    )
    group.add_argument("--preseqlen", type=int, default=10, help="prefix length P; 5 to 10 is best for table-to-text")
    group.add_argument("--mid_dim", type=int, default=512, help="width of the reparametrisation's hidden layer")
    group.add_argument("--dropout", type=float, default=0.0, help="dropout on the prefix keys and values, 0 to 1")
    add_yes_no(
        group, "--optim_prefix", "yes", "a free prefix, the same for all inputs; `no`: made of the source's words"
    )
    group.add_argument(
        "--prefix_mode",
        default="activation",
        choices=("activation", "embedding"),
        help="train keys and values in every layer, or input embeddings alone (section 7.2)",
    )
    group.add_argument(
        "--parametrize_emb", default="MLP", choices=("MLP", "Emb"), help="prefix_mode embedding: through an MLP or not"
    )
    group.add_argument(
        "--format_mode",
        default="cat",
        choices=("cat", "peek", "nopeek", "infix"),
        help="what stands where; cat (peek is its other name): prefix, source, target; infix: source, prefix, target; "
        "nopeek: the source is left out",
    )
    add_yes_no(group, "--use_deep", "no", "three linear layers in the reparametrisation instead of two")
    add_yes_no(group, "--use_dropout", "no", "dropout inside the frozen model while the prefix is trained")
    group.add_argument("--prefix_model_path", help="start from the weights of this prefix checkpoint")
    add_tuning_flags(group)


def add_initialisation_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("initialisation of the prefix (default: random; section 7.4)")
    group.add_argument(
        "--init_text",
        help="start at what this text gives (or @FILE, a text file) instead of at random; P becomes its number of "
        "tokens. With few data the start decides much: describe the task in words, or give a whole instruction. With "
        "--init_shallow yes, with --parametrize_emb Emb and with infix it starts exactly there, else the MLP is "
        "trained onto it first (seconds)",
    )
    group.add_argument(
        "--init_random",
        default="normal",
        choices=("normal", "uniform"),
        help="where a random start is drawn from: N(0, 1), as in the original's code, or uniform (0, 1), as in the "
        "paper's comparison of initialisations",
    )
    add_yes_no(group, "--init_shallow", "no", "train keys and values directly, without the MLP")
    group.add_argument(
        "--init_shallow_word", default="summarize", help="the original's --init_text for --init_shallow (`no`: random)"
    )
    add_yes_no(group, "--use_lowdata_token", "no", "the original's low-data runs: start from --lowdata_token")
    group.add_argument(
        "--lowdata_token",
        default="summarize",
        help="the original's --init_text for the MLP; with --tuning_mode finetune it is put before every source",
    )


def add_objective_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("objective")
    group.add_argument(
        "--objective_mode",
        type=int,
        default=1,
        choices=range(5),
        help="a prefix's loss: 0 mean over tokens; else per text, then averaged: 1 sum, 2 by padded length, "
        "3 by the longest target, 4 by text length",
    )
    add_yes_no(group, "--distill", "no", "match the fine-tuned model in --finetuned_model_path instead of the texts")
    group.add_argument("--finetuned_model_path", help="distill: the teacher, a fine-tuned model's folder")
    group.add_argument(
        "--matching_objective",
        default="kl",
        choices=("kl", "logits"),
        help="distill: KL divergence from the teacher's distribution, or distance from its logits",
    )
    group.add_argument(
        "--matching_positions",
        default="all",
        choices=("all", "text", "target"),
        help="distill: where: everywhere, padding included, as the original; all but padding; at scored tokens",
    )
    add_yes_no(group, "--use_custom_teacher_dropout", "no", "finetune: --dropout is the model's own residual dropout")


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--bsz", type=int, default=10, help="texts per step, over all processes, before accumulation")
    group.add_argument(
        "--gradient_accumulation_steps",
        "--gradient_accumulation_step",
        type=int,
        default=1,
        help="batches whose gradients are averaged into one step",
    )
    group.add_argument("--epoch", type=float, default=5, help="passes over the training set")
    group.add_argument(
        "--max_steps", type=int, default=-1, help="stop after this many steps (default: --epoch decides)"
    )
    group.add_argument("--learning_rate", type=float, default=5e-5, help="peak rate, decaying linearly to 0")
    group.add_argument("--warmup_steps", type=int, default=0, help="steps of linear warm-up; the original uses none")
    group.add_argument("--weight_decay", type=float, default=0.0, help="AdamW weight decay")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to this norm")
    group.add_argument("--seed", type=int, default=101, help="seed of initialisation, data order and dropout")
    add_yes_no(group, "--bf16", "no", "bfloat16 arithmetic; the trained weights stay float32")
    add_yes_no(group, "--fp16", "no", "float16 arithmetic with loss scaling; needs a GPU")
    add_yes_no(group, "--gradient_checkpointing", "no", "recompute activations: less memory, more time")


def add_bookkeeping_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation, checkpoints, what happens afterwards")
    group.add_argument("--eval_steps", type=int, default=0, help="steps between dev evaluations (0: once per epoch)")
    group.add_argument(
        "--eval_batch_size", type=int, default=0, help="dev texts evaluated together; changes speed only (0: --bsz)"
    )
    group.add_argument(
        "--early_stopping_patience", type=int, default=-1, help="stop after N evaluations without a better one (-1: no)"
    )
    group.add_argument("--save_steps", type=int, default=0, help="steps between resumable checkpoints (0: per epoch)")
    group.add_argument("--logging_steps", type=int, default=50, help="steps between log lines")
    add_yes_no(group, "--keep_best", "no", "keep the checkpoint with the lowest dev loss in OUTPUT/best")
    add_yes_no(group, "--resume", "no", "go on from the newest checkpoint in the output folder")
    add_yes_no(group, "--overwrite_output_dir", "no", "train into a folder that holds an earlier result")
    add_yes_no(group, "--skip_decode", "no", "stop after training instead of decoding and scoring valid and test")
    group.add_argument("--batch_size", type=int, default=32, help="sentences decoded together")
    add_yes_no(group, "--disable_tqdm", "no", "no progress bars")


def add_all(parser: argparse.ArgumentParser) -> None:
    """Every flag above, in the order of the help text."""
    for add in (
        add_task_flags,
        add_model_flags,
        add_method_flags,
        add_initialisation_flags,
        add_objective_flags,
        add_training_flags,
        add_bookkeeping_flags,
    ):
        add(parser)


@dataclass(frozen=True)
class Only:
    """A flag that changes something only together with certain values of another one."""

    flag: str
    other: str
    values: tuple[str, ...]
    why: str


ONLY_WITH = (
    *(
        Only(name, "tuning_mode", WITH_PREFIX, "it changes prefixes only")
        for name in (
            *("objective_mode", "use_deep", "mid_dim", "prefix_mode", "format_mode", "parametrize_emb"),
            *("init_text", "init_random", "init_shallow", "prefix_model_path"),
        )
    ),
    Only("use_dropout", "tuning_mode", ("prefixtune",), "it is the dropout of the frozen model"),
    Only("distill", "tuning_mode", ("prefixtune",), "a prefix is what learns from the teacher"),
    Only("use_lowdata_token", "tuning_mode", (*WITH_PREFIX, "finetune"), "there is nothing for the token to start"),
    Only("top_layers", "tuning_mode", ("finetune-top",), "the others train no chosen layers"),
    Only("top_embeddings", "tuning_mode", ("finetune-top",), "the others train no chosen layers"),
    Only("adapter_design", "tuning_mode", ("adaptertune",), "there are no adapters"),
    Only("adapter_bottleneck", "tuning_mode", ("adaptertune",), "there are no adapters"),
    Only("use_custom_teacher_dropout", "tuning_mode", ("finetune",), "it shapes the training of a teacher"),
    Only("parametrize_emb", "prefix_mode", ("embedding",), "it says how embeddings are made"),
    Only("init_shallow", "prefix_mode", ("activation",), "embeddings have --parametrize_emb Emb"),
    Only("use_deep", "prefix_mode", ("activation",), "the deep network makes keys and values"),
    Only("format_mode", "prefix_mode", ("activation",), "embeddings stand in front"),
    Only("prefix_mode", "optim_prefix", ("yes",), "a prefix made of words is keys and values"),
    Only("mid_dim", "parametrize_emb", ("MLP",), "there is no MLP"),
    Only("use_deep", "init_shallow", ("no",), "there is no MLP"),
    Only("mid_dim", "init_shallow", ("no",), "there is no MLP"),
    Only("use_lowdata_token", "init_shallow", ("no",), "without an MLP, --init_shallow_word names the text"),
    Only("init_shallow_word", "init_shallow", ("yes",), "it starts keys and values without an MLP"),
    Only("lowdata_token", "use_lowdata_token", ("yes",), "it is used nowhere else"),
    Only("init_shallow", "optim_prefix", ("yes",), "a prefix made of words needs its MLP"),
    Only("init_text", "optim_prefix", ("yes",), "such a prefix is made of the source's words"),
    Only("init_random", "optim_prefix", ("yes",), "such a prefix is made of the source's words"),
    Only("init_random", "use_lowdata_token", ("no",), "the prefix starts from the token"),
    Only("use_lowdata_token", "optim_prefix", ("yes",), "such a prefix is made of the source's words"),
    Only("finetuned_model_path", "distill", ("yes",), "it is the teacher"),
    Only("matching_objective", "distill", ("yes",), "it is how the teacher is matched"),
    Only("matching_positions", "distill", ("yes",), "it is where the teacher is matched"),
    Only("distill", "optim_prefix", ("yes",), "a prefix made of the source is trained on texts"),
    Only("distill", "format_mode", ("cat", "peek"), "the teacher reads what the student reads, source included"),
    *(
        Only(name, "mode", SUMMARIES, "other texts are cut to the model's positions only")
        for name in PART_LIMITS["xsum"]
    ),
)


def check(args: argparse.Namespace) -> None:
    """Raise UserError for values that make no sense, alone or together, naming the flags."""
    positive = ("preseqlen", "mid_dim", "bsz", "gradient_accumulation_steps", "epoch", "learning_rate", "batch_size")
    for name in (*positive, "adapter_bottleneck"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name} {getattr(args, name)}: must be above 0")
    if args.top_layers < 0:
        raise UserError(f"--top_layers {args.top_layers}: must be at least 0 (the final norm and the embeddings alone)")
    if not 0 <= args.dropout < 1:
        raise UserError(f"--dropout {args.dropout}: must be at least 0 and below 1")
    for name in PART_LIMITS["xsum"]:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.eval_batch_size < 0:
        raise UserError(f"--eval_batch_size {args.eval_batch_size}: must be above 0, or 0 for --bsz")
    if args.early_stopping_patience < -1 or args.early_stopping_patience == 0:
        raise UserError(
            f"--early_stopping_patience {args.early_stopping_patience}: at least 1 evaluation, or -1 for no"
        )
    if args.train_file and not args.eval_file:
        raise UserError("--train_file needs --eval_file, the dev file that goes with it")
    if args.distill == "yes" and not args.finetuned_model_path:
        raise UserError("--distill yes needs --finetuned_model_path, the fine-tuned model to learn from")
    _check_together(args)
    for first, second, why in (
        ("bf16", "fp16", "one precision per run"),
        ("resume", "overwrite_output_dir", "resuming keeps what is there"),
    ):
        if getattr(args, first) == "yes" and getattr(args, second) == "yes":
            refuse_together(f"--{first} yes", f"--{second} yes", why)
    if args.resume == "yes" and args.prefix_model_path:
        refuse_together("--resume yes", "--prefix_model_path", "resuming takes the weights of the newest checkpoint")


def fill_limits(args: argparse.Namespace) -> None:
    """Give the part limits that were left open their mode's value; they stay None where the mode has none."""
    for name, value in PART_LIMITS.get(args.mode, {}).items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def _check_together(args: argparse.Namespace) -> None:
    """Refuse flags that differ from their defaults where nothing would heed them.

    --preseqlen and --optim_prefix stand in published commands for every tuning mode, so they pass.
    """
    blank = Parser(add_help=False)
    add_all(blank)
    for rule in ONLY_WITH:
        value, other = getattr(args, rule.flag), getattr(args, rule.other)
        if value != blank.get_default(rule.flag) and other not in rule.values:
            refuse_together(f"--{rule.other} {other}", f"--{rule.flag}", rule.why)
    if args.dropout > 0 and args.tuning_mode not in WITH_PREFIX and args.use_custom_teacher_dropout == "no":
        refuse_together(f"--tuning_mode {args.tuning_mode}", "--dropout", "it changes prefixes only")
    if args.optim_prefix == "no" and args.format_mode == "infix" and args.tuning_mode in WITH_PREFIX:
        refuse_together(
            "--optim_prefix no", "--format_mode infix", "an infix is trained, not made of the source's words"
        )
    if args.prefix_model_path:
        texts = {"init_text": args.init_text, "use_lowdata_token": args.use_lowdata_token == "yes"}
        texts["init_shallow_word"] = args.init_shallow_word not in ("summarize", "no")
        for name in (name for name, given in texts.items() if given):
            refuse_together("--prefix_model_path", f"--{name}", "a prefix starts once")
    if args.init_random != "normal":
        words = args.init_shallow == "yes" and args.init_shallow_word != "no"
        for flag, given in (("init_text", args.init_text), ("prefix_model_path", args.prefix_model_path),
                            ("init_shallow_word", words)):  # fmt: skip
            if given:
                refuse_together(f"--{flag}", f"--init_random {args.init_random}", "a prefix starts once")
    if args.init_text and (args.use_lowdata_token == "yes" or args.init_shallow_word != "summarize"):
        other = "--use_lowdata_token" if args.use_lowdata_token == "yes" else "--init_shallow_word"
        refuse_together("--init_text", other, "both name the text to start from")
