"""The flags that the launcher and run_language_modeling.py both understand, defined once (standard library only)."""

import argparse

from prefixlib.errors import UserError
from prefixlib.launch import add_yes_no, refuse_together
from prefixlib.readers import MODES

TUNING_MODES = ("prefixtune", "finetune")
MODES_NOW = ("data2text", "webnlg", "triples")
LATER_TUNING_MODES = ("finetune-top", "adaptertune", "bothtune")


def add_task_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("task and data")
    group.add_argument("--mode", default="data2text", choices=tuple(MODES), help="the task, and so the file format")
    group.add_argument("--train_file", help="training file (default: the mode's own under --data_dir)")
    group.add_argument("--eval_file", help="dev file: loss while training, decoded as `valid` afterwards")
    group.add_argument("--test_file", help="test file, decoded as `test` after training where it exists")
    group.add_argument("--data_dir", help="folder with e2e_data/, webnlg_challenge_2017/, dart/ (default: data/)")


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
        choices=TUNING_MODES + LATER_TUNING_MODES,
        help="what is trained: a prefix, or all of the model",
    )
    group.add_argument("--preseqlen", type=int, default=10, help="prefix length P; 5 to 10 is best for table-to-text")
    group.add_argument("--mid_dim", type=int, default=512, help="width of the reparametrisation's hidden layer")
    group.add_argument("--dropout", type=float, default=0.0, help="dropout on the prefix keys and values, 0 to 1")
    add_yes_no(group, "--optim_prefix", "yes", "a free prefix; `no` (computed from the source) is not there yet")
    group.add_argument(
        "--prefix_mode", default="activation", choices=("activation", "embedding"), help="what the prefix is made of"
    )
    group.add_argument(
        "--format_mode",
        default="cat",
        choices=("cat", "peek", "nopeek", "infix"),
        help="where the source stands; cat: after the prefix, before the target (peek is its other name)",
    )
    add_yes_no(group, "--init_shallow", "no", "train keys and values directly, without the MLP (not there yet)")
    group.add_argument(
        "--objective_mode",
        type=int,
        default=1,
        choices=range(5),
        help="prefixtune's loss: 0 mean over tokens; else per text, then averaged: 1 sum, 2 by padded length, "
        "3 by the longest target, 4 by text length",
    )
    add_yes_no(group, "--use_dropout", "no", "dropout inside the frozen model while the prefix is trained")
    group.add_argument("--prefix_model_path", help="start from the weights of this prefix checkpoint")


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
    for add in (add_task_flags, add_model_flags, add_method_flags, add_training_flags, add_bookkeeping_flags):
        add(parser)


def check(args: argparse.Namespace) -> None:
    """Raise UserError for values that make no sense, alone or together, naming the flags."""
    later = {
        "--tuning_mode": (args.tuning_mode, TUNING_MODES),
        "--mode": (args.mode, MODES_NOW),
        "--prefix_mode": (args.prefix_mode, ("activation",)),
        "--format_mode": (args.format_mode, ("cat", "peek")),
        "--optim_prefix": (args.optim_prefix, ("yes",)),
        "--init_shallow": (args.init_shallow, ("no",)),
    }
    for flag, (value, available) in later.items():
        if value not in available:
            raise UserError(f"{flag} {value} is not available in this version; {' or '.join(available)} is")
    positive = ("preseqlen", "mid_dim", "bsz", "gradient_accumulation_steps", "epoch", "learning_rate", "batch_size")
    for name in positive:
        if getattr(args, name) <= 0:
            raise UserError(f"--{name} {getattr(args, name)}: must be above 0")
    if not 0 <= args.dropout < 1:
        raise UserError(f"--dropout {args.dropout}: must be at least 0 and below 1")
    if args.train_file and not args.eval_file:
        raise UserError("--train_file needs --eval_file, the dev file that goes with it")
    if args.tuning_mode == "finetune":
        _refuse_with_finetune(args)
    for first, second, why in (
        ("bf16", "fp16", "one precision per run"),
        ("resume", "overwrite_output_dir", "resuming keeps what is there"),
    ):
        if getattr(args, first) == "yes" and getattr(args, second) == "yes":
            refuse_together(f"--{first} yes", f"--{second} yes", why)
    if args.resume == "yes" and args.prefix_model_path:
        refuse_together("--resume yes", "--prefix_model_path", "resuming takes the weights of the newest checkpoint")


def _refuse_with_finetune(args: argparse.Namespace) -> None:
    """Flags that only a prefix heeds (--preseqlen and --optim_prefix stand in published commands, so they pass)."""
    only_prefix = {
        "--dropout": args.dropout > 0,
        "--use_dropout yes": args.use_dropout == "yes",
        "--objective_mode": args.objective_mode not in (0, 1),
        "--prefix_model_path": bool(args.prefix_model_path),
    }
    for flag, given in only_prefix.items():
        if given:
            refuse_together("--tuning_mode finetune", flag, "it changes prefixes only")
