"""The modes, and the flags that the launchers and finetune.py both understand, defined once (standard library only)."""

import argparse
from dataclasses import dataclass

from prefixlib.errors import UserError
from prefixlib.launch import add_tuning_flags, add_yes_no, refuse_together

TUNING_MODES = ("prefixtune", "finetune", "finetune-top", "adaptertune", "bothtune")
WITH_PREFIX = ("prefixtune", "bothtune")
SITES = ("encoder", "cross", "self")


@dataclass(frozen=True)
class Decoding:
    """How a mode's outputs are searched for; lengths in tokens, the decoder's start token included."""

    num_beams: int
    min_length: int
    max_length: int
    no_repeat_ngram_size: int = 3
    early_stopping: bool = True
    length_pen: float = 1.0


# BART's own settings: n-gram rule 3, early stopping, and what its configuration lists for each kind of summary
# (task_specific_params, summarization_xsum and summarization_cnn).
XSUM = Decoding(num_beams=6, min_length=11, max_length=62)  # the original's lengths, for every data set
CNN_DM = Decoding(num_beams=4, min_length=56, max_length=142, length_pen=2.0)
# Tables repeat names, and the paper's GPT-2 runs use 5 beams, no n-gram rule, no early stopping.
TABLE = Decoding(num_beams=5, min_length=0, max_length=142, no_repeat_ngram_size=0, early_stopping=False)


@dataclass(frozen=True)
class Mode:
    """One task: where its data lie, where it is cut, how it is decoded."""

    folder: str  # of the outputs, as in the original
    data: str  # folder under data/ with {train,val,test}.source|.target; for a table mode, its name in the readers
    lengths: tuple[int, int, int, int]  # tokens kept of: source, training, validation and test target
    decoding: Decoding
    is_table: bool = False


MODES = {
    "xsum": Mode("xsum_models", "xsum", (1024, 60, 60, 100), XSUM),
    "cnn_dm": Mode("cnndm_models", "cnn_dm", (512, 56, 142, 142), CNN_DM),
    "xsum_news": Mode("xsum_news_models", "xsum_news", (512, 60, 60, 100), XSUM),
    "xsum_news_sport": Mode("xsum_news_sport_models", "xsum_topic-news-sports", (512, 60, 60, 100), XSUM),
    "e2e": Mode("save_e2e_models", "data2text", (512, 142, 142, 142), TABLE, is_table=True),
    "webnlg": Mode("webnlg_models", "webnlg", (512, 142, 142, 142), TABLE, is_table=True),
    "triples": Mode("triples_models", "triples", (512, 142, 142, 142), TABLE, is_table=True),
}
LENGTHS = ("max_source_length", "max_target_length", "val_max_target_length", "test_max_target_length")


def add_task_flags(parser: argparse.ArgumentParser, modes: tuple[str, ...]) -> None:
    group = parser.add_argument_group("task and data")
    group.add_argument("--mode", required=True, choices=modes, help="the task: its data, lengths and decoding")
    group.add_argument("--data_dir", help="folder with {train,val,test}.source and .target (default: data/SET)")
    for split, purpose in (("train", "trained on"), ("eval", "for validation"), ("test", "decoded")):
        group.add_argument(f"--{split}_file", help=f"the file {purpose}: X.source beside X.target, or the table's own")
    for name in LENGTHS:
        group.add_argument(f"--{name}", type=int, help="tokens kept, special tokens included (default: the mode's)")
    group.add_argument("--n_train", type=int, default=-1, help="use the first N training examples (-1: all)")
    group.add_argument("--n_val", type=int, default=500, help="use the first N validation examples (-1: all)")
    group.add_argument("--n_test", type=int, default=-1, help="decode the first N test examples (-1: all)")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("base model")
    group.add_argument("--model_name_or_path", help="hub name or local folder (default: bart-large)")
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
    group.add_argument("--preseqlen", type=int, default=5, help="prefix length P; 200 is best for summarisation")
    group.add_argument("--mid_dim", type=int, default=512, help="width of the reparametrisation; 800 in the paper")
    add_yes_no(group, "--use_deep", "no", "three linear layers in the reparametrisation instead of two")
    group.add_argument("--dropout", type=float, default=0.0, help="dropout on the prefix keys and values, 0 to 1")
    for site in SITES:
        add_yes_no(group, f"--use_{site}_prefix", "yes", f"prefix at the {site} attention; `no` for ablations")
    add_yes_no(group, "--init_shallow", "no", "train keys and values directly, without the MLP")
    group.add_argument(
        "--init_shallow_word", default="summarize", help="with --init_shallow yes: start at this text's (`no`: random)"
    )
    group.add_argument(
        "--init_text",
        help="start at the keys and values that this text gives (or @FILE, a text file): copied with --init_shallow "
        "yes, else the MLPs are trained onto them; P becomes its number of tokens. Decides much where data are few",
    )
    add_yes_no(group, "--use_lowdata_token", "no", "start the MLP at the keys and values of --lowdata_token")
    group.add_argument("--lowdata_token", default="summarize", help="the text that --use_lowdata_token yes starts from")
    add_yes_no(group, "--use_dropout", "yes", "dropout inside the frozen model while the prefix is trained")
    group.add_argument("--prefix_model_path", help="prefix checkpoint to decode, or to start training from")
    group.add_argument("--finetune_model_path", help="model to decode that was tuned itself: whole, in part, adapters")
    add_tuning_flags(group)
    group.add_argument("--optim_prefix", default="yes", choices=("yes",), help="always yes: a free prefix")
    group.add_argument("--prefix_mode", default="activation", choices=("activation",), help="always activation")
    group.add_argument(
        "--format_mode", default="cat", choices=("cat",), help="always cat: the encoder reads the source"
    )


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    add_yes_no(
        group, "--do_train", "yes", "train; `no` decodes and scores --prefix_model_path or --finetune_model_path"
    )
    group.add_argument("--bsz", type=int, default=10, help="texts per step, over all processes, before accumulation")
    group.add_argument(
        "--gradient_accumulation_steps",
        "--gradient_accumulation_step",
        type=int,
        default=1,
        help="batches whose gradients are averaged into one step",
    )
    add_yes_no(
        group,
        "--group_by_length",
        "no",
        "batches of sources of similar length: less padding, faster; `no` as published",
    )
    group.add_argument("--epoch", type=int, default=5, help="passes over the training set")
    group.add_argument("--max_steps", type=int, default=-1, help="stop after this many steps (-1: --epoch decides)")
    group.add_argument("--learning_rate", type=float, default=5e-5, help="peak rate")
    group.add_argument(
        "--lr_scheduler", default="linear", choices=("linear", "cosine", "constant"), help="its course to the end"
    )
    group.add_argument("--warmup_steps", type=int, default=0, help="steps of linear warm-up; the original uses none")
    group.add_argument("--weight_decay", type=float, default=0.0, help="AdamW weight decay")
    group.add_argument("--max_grad_norm", type=float, default=0.0, help="clip gradients to this norm (0: do not)")
    group.add_argument("--label_smoothing", type=float, default=0.0, help="smoothing of the training loss, 0 to 1")
    group.add_argument("--seed", type=int, default=101, help="seed of initialisation, data order and dropout")
    add_yes_no(group, "--bf16", "no", "bfloat16 arithmetic; the trained weights stay float32")
    add_yes_no(group, "--fp16", "no", "float16 arithmetic with loss scaling; needs a GPU")
    add_yes_no(group, "--gradient_checkpointing", "no", "recompute activations: less memory, more time")
    group.add_argument("--num_workers", type=int, default=2, help="processes that tokenise (0: none beside this one)")


def add_bookkeeping_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("validation and checkpoints")
    group.add_argument("--eval_steps", type=int, default=0, help="steps between validations (0: once per epoch)")
    group.add_argument("--save_steps", type=int, default=500, help="steps between resumable checkpoints")
    group.add_argument("--logging_steps", type=int, default=50, help="steps between log lines")
    group.add_argument(
        "--val_metric", default="rouge2", choices=("rouge2", "loss"), help="what the best checkpoint has"
    )
    group.add_argument(
        "--early_stopping_patience", type=int, default=-1, help="stop after N validations without a better one (-1: no)"
    )
    add_yes_no(group, "--resume", "no", "go on from the last resumable checkpoint in the output folder")
    add_yes_no(group, "--overwrite_output_dir", "no", "train into a folder that holds an earlier result")
    add_yes_no(group, "--disable_tqdm", "no", "no progress bars")


def add_decoding_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("decoding (lengths count the start token; default: the mode's)")
    group.add_argument("--num_beams", "--eval_beams", type=int, help="beams")
    group.add_argument("--min_length", type=int, help="fewest tokens")
    group.add_argument("--max_length", "--eval_max_gen_length", type=int, help="most tokens")
    group.add_argument("--no_repeat_ngram_size", type=int, help="no n-gram of this size occurs twice (0: no rule)")
    group.add_argument("--early_stopping", choices=("yes", "no"), help="stop a search at its first full set of outputs")
    group.add_argument("--length_pen", "--length_penalty", type=float, help="above 1 favours long outputs")
    add_yes_no(group, "--force_bos", "no", "make <s> the first token by force; training teaches it anyway")
    group.add_argument("--eval_batch_size", type=int, default=10, help="texts decoded together; changes speed only")


def add_all(parser: argparse.ArgumentParser, modes: tuple[str, ...] = tuple(MODES)) -> None:
    """Every flag above, in the order of the help text."""
    add_task_flags(parser, modes)
    for add in (add_model_flags, add_method_flags, add_training_flags, add_bookkeeping_flags, add_decoding_flags):
        add(parser)


def check(args: argparse.Namespace, given: set[str]) -> None:
    """Raise UserError for values that make no sense, alone or together, naming the flags. `given`: set by the user."""
    positive = ["preseqlen", "mid_dim", "bsz", "gradient_accumulation_steps", "epoch", "learning_rate", "save_steps"]
    positive += ["adapter_bottleneck", "logging_steps", "eval_batch_size", "num_beams", "max_length", *LENGTHS]
    for name in positive:
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise UserError(f"--{name} {getattr(args, name)}: must be above 0")
    if args.top_layers < 0:
        raise UserError(f"--top_layers {args.top_layers}: must be at least 0 (the embeddings alone)")
    for name in ("dropout", "label_smoothing"):
        if not 0 <= getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 0 and below 1")
    for first, second, why in (
        ("bf16", "fp16", "one precision per run"),
        ("resume", "overwrite_output_dir", "resuming keeps what is there"),
        ("init_shallow", "use_lowdata_token", "without the MLP, --init_shallow_word names the text to start from"),
    ):
        if getattr(args, first) == "yes" and getattr(args, second) == "yes":
            refuse_together(f"--{first} yes", f"--{second} yes", why)
    if args.prefix_model_path and args.finetune_model_path:
        refuse_together("--prefix_model_path", "--finetune_model_path", "one checkpoint at a time")
    _check_method(args, given)
    if args.do_train == "no":
        _check_decoding_run(args)
    elif args.resume == "yes" and args.prefix_model_path:
        refuse_together("--resume yes", "--prefix_model_path", "resuming takes the weights of the last checkpoint")
    elif args.finetune_model_path:
        raise UserError("--finetune_model_path is for --do_train no; to train on from it, --model_name_or_path DIR")
    elif args.train_file and not args.eval_file:
        raise UserError("--train_file needs --eval_file, the validation file that goes with it")


def unheeded(args: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """The method's flags that mean nothing in this run -> the flag that makes them so, and why."""
    found: dict[str, tuple[str, str]] = {}
    mode = f"--tuning_mode {args.tuning_mode}"
    decodes_prefix = args.do_train == "no" and args.prefix_model_path  # its settings are checked against what is told
    if args.tuning_mode not in WITH_PREFIX and not decodes_prefix:
        names = (
            "mid_dim",
            "use_deep",
            "dropout",
            "init_shallow",
            "use_lowdata_token",
            "init_text",
            "prefix_model_path",
        )
        for name in (*names, *(f"use_{site}_prefix" for site in SITES)):
            found[name] = mode, "it changes prefixes only"
    if args.tuning_mode != "prefixtune" and not decodes_prefix:
        found["use_dropout"] = mode, "it is the dropout of a frozen model"
    if args.do_train == "yes" and args.tuning_mode != "finetune-top":
        found |= dict.fromkeys(("top_layers", "top_embeddings"), (mode, "the others train no chosen layers"))
    if args.do_train == "yes" and args.tuning_mode != "adaptertune":
        found |= dict.fromkeys(("adapter_design", "adapter_bottleneck"), (mode, "there are no adapters"))
    if args.init_text is not None:
        both = "--init_text", "both name the text to start from"
        found |= dict.fromkeys(("init_shallow_word", "use_lowdata_token", "lowdata_token"), both)
    elif args.init_shallow == "no":
        found["init_shallow_word"] = "--init_shallow no", "the word starts keys and values without the MLP"
    if args.use_lowdata_token == "no":
        found["lowdata_token"] = "--use_lowdata_token no", "the token starts the MLP"
    if args.init_shallow == "yes":
        found |= dict.fromkeys(("mid_dim", "use_deep"), ("--init_shallow yes", "there is no MLP"))
    return found


def _check_method(args: argparse.Namespace, given: set[str]) -> None:
    """Refuse flags of the method that nothing would heed."""
    for name, (other, why) in sorted(unheeded(args).items()):
        if name in given:
            refuse_together(other, f"--{name}", why)
    if args.finetune_model_path and "tuning_mode" in given and args.tuning_mode in WITH_PREFIX:
        refuse_together(f"--tuning_mode {args.tuning_mode}", "--finetune_model_path", "it is a model without a prefix")
    if args.init_text is not None:
        if args.prefix_model_path:
            refuse_together("--prefix_model_path", "--init_text", "a prefix starts once")
        if args.do_train == "no":
            refuse_together("--do_train no", "--init_text", "nothing is trained")


def _check_decoding_run(args: argparse.Namespace) -> None:
    if not (args.prefix_model_path or args.finetune_model_path):
        raise UserError("--do_train no decodes a checkpoint: pass --prefix_model_path or --finetune_model_path")
    for name in ("resume", "overwrite_output_dir"):
        if getattr(args, name) == "yes":
            refuse_together("--do_train no", f"--{name} yes", "nothing is trained")
