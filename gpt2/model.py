"""The model object: made anew, started from a text, loaded from any checkpoint, saved, generating text.

    model = load("gpt2/webnlg_models/NAME")
    model.generate([" | Aarhus_Airport : cityServed : Aarhus"])

Legend: P prefix length, L layers, H key/value heads, D head size, E width of the word embeddings.
"""

import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpt2 import decoding
from gpt2.dataset import (
    Encoded,
    Format,
    TableToTextDataset,
    encode,
    encode_inputs,
    pad_sources,
    truncate_all,
)
from gpt2.flags import DEFAULT_MODEL, Decoding, Settings
from gpt2.frozen_lm import check_rows, evaluating, key_values, max_positions, shape_of, without_weights
from gpt2.prefix_lm import PrefixLM, mean_loss
from gpt2.train_control import FAMILY, Past, PrefixConfig, join_layers, make_prefix
from prefixlib import baselines, best, checkpoint, files, gguf_base, original, peft_format, record
from prefixlib.base_model import (
    check_fingerprint,
    check_tokenizer,
    choose_base,
    dropout_settings,
    fingerprint,
    load_config,
    load_model,
    load_tokenizer,
    resolve_model_name,
    save_whole,
)
from prefixlib.beam_search import Hypothesis, as_stop, as_texts, check_count, stream, text_pieces
from prefixlib.errors import UserError
from prefixlib.mixed import Prepared
from prefixlib.readers import Group, Record, read_text
from prefixlib.tasks import as_group, check_tree, find_task
from prefixlib.wording import Wording

logger = logging.getLogger(__name__)


@dataclass
class Model:
    """A language model with a trained prefix in front, or one that was tuned itself (then it has no prefix).

    task: what its training knew: mode, tuning_mode, categories, ...; base_record: the base model's name and revision.
    """

    lm: PrefixLM
    tokenizer: Any
    task: dict[str, Any] = field(default_factory=dict)
    base_record: dict[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> nn.Module:
        return self.lm.base

    @property
    def prefix(self) -> nn.Module | None:
        return self.lm.prefix

    @property
    def format(self) -> Format:
        """Which parts of an example stand in the text, and what the prefix is made of."""
        if self.prefix is None:
            return Format(word=self.task.get("lowdata_token", ""), wording=Wording.of(self.task))
        return Format(self.prefix.config.format_mode, self.prefix.config.optim_prefix, wording=Wording.of(self.task))

    @property
    def text_positions(self) -> int:
        """Positions for prompt and output: those that the prefix does not take."""
        return max_positions(self.base.config) - (self.prefix.config.preseqlen if self.prefix else 0)

    @property
    def source_limit(self) -> int | None:
        """Most tokens of a source: what the model was trained with, else its task's; None where there is no limit."""
        mode = self.task.get("mode")
        of_task = find_task(mode).gpt2.lengths.get("max_source_length") if mode else None
        return self.task.get("max_source_length") or of_task

    # ---- generating ----

    def generate(
        self,
        sources: Sequence[Any],
        *,
        strategy: str | None = None,
        num_beams: int = 5,
        max_new_tokens: int = 100,
        length_penalty: float = 1.0,
        top_p: float = 0.8,
        top_k: int = 0,
        temperature: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int = 42,
        batch_size: int = 32,
        num_return_sequences: int = 1,
        return_scores: bool = False,
        progress: bool = False,
    ) -> list[Any]:
        """Texts for `sources`, in their order, decoded as gen.py decodes the task's files.

        Args:
            sources: inputs as the task linearises them, or as data: for WebNLG and DART a list of (subject, relation,
                object) triples, for E2E a mapping of slots to values, for user data (mode text) the text alone,
                which is put into the template of the training, or a conversation as a list of messages.
            strategy: "beam", "greedy" or "nucleus"; default: the task's.
            num_beams, length_penalty: of beam search. top_p, top_k, temperature, seed: of nucleus sampling; temperature
                0 is greedy.
            stop: a text, or several, before the first of which an output ends.
            max_new_tokens: most tokens of an output. batch_size: sources decoded together; changes the speed only.
            num_return_sequences: outputs per source, at most num_beams with beams.
            return_scores: give (text, score) pairs, the score being the length-normalised log-probability of a beam,
                or the log-probability of a greedy or sampled text.

        Returns a text for each source (or a pair), or a list of them where num_return_sequences is above 1.
        Raises UserError for inputs of another shape than the task's and for values out of range, naming the flag.

        >>> load("CHECKPOINT").generate([[("Aarhus_Airport", "cityServed", "Aarhus")]])  # doctest: +SKIP
        ['Aarhus Airport serves the city of Aarhus.']
        """
        if isinstance(sources, str):
            raise UserError("generate() takes a list of sources, not one text")
        settings = Decoding(
            **{"strategy": strategy, "num_beams": num_beams, "length": max_new_tokens, "seed": seed, "top_p": top_p},
            **{"length_penalty": length_penalty, "temperature": temperature, "batch_size": batch_size},
            **{"top_k": top_k, "stop": as_stop(stop)},
            disable_tqdm=not progress,
        )
        chosen, _ = settings.strategy_for(self._task().name)
        check_count(num_return_sequences, chosen, num_beams)
        found = self.decode(self.encode(sources, settings), settings, num_return_sequences)
        return as_texts(found, self.to_text(settings), several=num_return_sequences > 1, scores=return_scores)

    def prepare(self, sources: Sequence[Any], count: int, *, max_new_tokens: int = 100, **how: Any) -> Prepared:
        """Sources ready to be decoded in a batch with other prefixes' (`mixed`); `how`: as in `generate`."""
        settings = Decoding(length=max_new_tokens, **{**how, "stop": as_stop(how.get("stop", ()))})
        strategy, _ = settings.strategy_for(self._task().name)
        check_count(count, strategy, settings.num_beams)
        rule = decoding.decoding_rule(settings, self.tokenizer, self._task().verbatim)
        return Prepared(self.encode(sources, settings), strategy, rule, self.to_text(settings))

    def stream(
        self,
        source: Any,
        *,
        strategy: str = "greedy",
        max_new_tokens: int = 100,
        top_p: float = 0.8,
        top_k: int = 0,
        temperature: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int = 42,
    ) -> Iterator[str]:
        """The text for one source, a piece at a time, as soon as the piece is certain; "greedy" or "nucleus".

        The pieces joined are what `generate` gives with the same settings. Raises UserError as `generate` does.

        >>> for text in load("CHECKPOINT").stream(" | Aarhus_Airport : cityServed : Aarhus"):  # doctest: +SKIP
        ...     print(text, end="", flush=True)
        """
        if strategy not in ("greedy", "nucleus"):
            raise UserError(f"stream() is greedy or nucleus, not {strategy!r}: beams are certain only at their end")
        settings = Decoding(
            **{"strategy": strategy, "length": max_new_tokens, "top_p": top_p, "top_k": top_k, "seed": seed},
            **{"temperature": temperature, "stop": as_stop(stop)},
        )
        chosen, _ = settings.strategy_for(self._task().name)
        (example,) = self.encode([source], settings)
        past = self.past([example])
        steps = decoding.CausalSteps(self.base, [example.prompt], past.layers, past.visible)
        rule = decoding.decoding_rule(settings, self.tokenizer, self._task().verbatim)
        tokens = stream(steps, example.prompt, rule, seed if chosen == "nucleus" else None)
        return text_pieces(tokens, self.to_text(settings), settings.stop, self._task().verbatim)

    def to_text(self, settings: Decoding) -> Callable[[Sequence[int]], str]:
        """What makes text of generated tokens: as the task wants it, up to the settings' `stop`."""
        return functools.partial(decoding.to_text, self.tokenizer, verbatim=self._task().verbatim, stop=settings.stop)

    def encode(self, sources: Sequence[Any], settings: Decoding) -> list[Encoded]:
        """Sources, as `generate` takes them, as model inputs; those that leave too little for the output are cut."""
        mode, wording = self._task().name, self.format.wording
        groups = [as_group(mode, wording.source(source)) for source in sources]
        return self.fit(self.encode_groups(groups, settings), settings)

    def encode_groups(self, groups: Sequence[Group], settings: Decoding) -> list[Encoded]:
        """The inputs of groups; of conversations, as many turns as leave room for the output."""
        rooms = [self._room(settings)] * len(groups)
        return encode_inputs(self._task().name, groups, self.tokenizer, self.format, self.source_limit, rooms)

    def _room(self, settings: Decoding) -> int:
        """Positions for a prompt. Raises UserError where an output leaves none."""
        limit = self.text_positions - settings.length
        if limit < 2:
            raise UserError(
                f"--length {settings.length}: the model has only {self.text_positions} positions for prompt and output"
            )
        return limit

    def fit(self, inputs: Sequence[Encoded], settings: Decoding) -> list[Encoded]:
        """The inputs, cut so that an output of `settings.length` tokens fits behind each of them."""
        limit = self._room(settings)
        fitted, lost = truncate_all(inputs, limit)
        cut = sum(map(bool, lost))
        if cut:
            logger.warning("%d of %d sources cut to %d tokens, so that the output fits", cut, len(inputs), limit)
        return fitted

    @torch.no_grad()
    def decode(self, inputs: Sequence[Encoded], settings: Decoding, count: int = 1) -> list[list[Hypothesis]]:
        """The `count` best hypotheses of every input, or as many samples; raises UserError for bad settings."""
        strategy, _ = settings.strategy_for(self._task().name)
        with evaluating(self.lm):
            own = self.prefix is not None and self.prefix.config.needs_source
            return decoding.decode_several(
                self.base,
                [example.prompt for example in inputs],
                decoding.decoding_rule(settings, self.tokenizer, self._task().verbatim),
                layers=None if own else self.past(inputs[:1]).layers,
                past=(lambda members: self.past([inputs[n] for n in members])) if own else None,
                strategy=strategy,
                count=count,
                batch_size=settings.batch_size,
                seed=settings.seed,
                progress=not settings.disable_tqdm,
            )

    @torch.no_grad()
    def past(self, inputs: Sequence[Encoded]) -> Past:
        """The prefix of each input: one row of keys and values for all, unless they depend on the source."""
        if self.prefix is None:
            return Past([])
        if not self.prefix.config.needs_source:
            return self.prefix.past(self.base, 1)
        batch = {name: ids.to(self.base.device) for name, ids in pad_sources(inputs).items()}
        return self.prefix.past(self.base, len(inputs), **batch)

    @torch.no_grad()
    def reference_loss(self, groups: Sequence[Group], batch_size: int = 32) -> float | None:
        """Mean negative log-likelihood per token, in nats, of every group's first reference and its end.

        Unlike the training losses, a sum per text behind a prefix and a mean over tokens in a tuned model, it can be
        compared between the two. None where no group has a reference.
        """
        groups = [group for group in groups if group.references]
        records = [Record(group.source, group.references[0], True, group.fields, "") for group in groups]
        if not records:
            return None
        form, mode = self.format, self._task().name
        examples = TableToTextDataset(
            mode, records, self.tokenizer, self.text_positions, form, self.source_limit
        ).examples
        return mean_loss(self.lm, examples, self.tokenizer.eos_token_id, batch_size)

    def _task(self):
        mode = self.task.get("mode")
        if mode is None:
            raise UserError("this model does not say what task it was trained for: load(..., mode=...)")
        return find_task(mode)

    # ---- saving ----

    def save(self, directory: Path | str, scores: Mapping[str, Any] | None = None) -> None:
        """Write what was trained: the prefix, the whole model in transformers' format with its tokenizer, or both.

        Of both, the model goes to DIRECTORY/model. `scores`: for a prefix's model card. Raises OSError if the disk does
        not take the files.
        """
        directory, base_record = Path(directory), self.base_record
        task = {**self.task, "separator": self.tokenizer.eos_token}  # for other tools: how its prompts end
        if self.prefix is None:
            self._save_base(directory)
            return
        if task.get("tuning_mode") == "bothtune":
            (directory / checkpoint.CONFIG).unlink(missing_ok=True)  # it describes another model than the new one
            directory.mkdir(parents=True, exist_ok=True)
            files.replace_directory(directory / checkpoint.OWN_MODEL, self._save_base)
            task = {**task, "tuned_from": task.get("tuned_from") or base_record["name"]}
            base_record = {"name": checkpoint.OWN_MODEL, "revision": None}
        save_prefix(directory, self.prefix, base_record, task, scores, base=self.base)

    def _save_base(self, directory: Path) -> None:
        save_whole(directory, self.base, self.tokenizer)
        checkpoint.save_task(directory, {**self.task, "base_model": self.base_record})

    def load_weights(self, directory: Path) -> None:
        """The counterpart of `save`."""
        best.load_weights(self, directory, FAMILY, load_prefix)

    @torch.no_grad()  # or what the prefix's network made here would be taken for the next step's
    def count_parameters(self) -> dict[str, int | None]:
        """Numbers that are trained; those of the model behind the prefix; those that decoding needs stored."""
        trainable = sum(p.numel() for p in self.lm.parameters() if p.requires_grad)
        base = sum(p.numel() for p in self.base.parameters())
        if self.prefix is None:
            return {"trainable": trainable, "base": None, "stored": base}
        tensors = self.prefix.stored(self.base) or self.prefix.state_dict()  # one made of the source needs its network
        stored = sum(tensor.numel() for tensor in tensors.values())
        own_base = base if self.task.get("tuning_mode") == "bothtune" else 0
        return {"trainable": trainable, "base": base, "stored": stored + own_base}


# ---- a new model -------------------------------------------------------------------------------------------------


def new(
    settings: Settings, *, resuming: bool = False, task: Mapping[str, Any] | None = None, texts: Sequence[str] = ()
) -> Model:
    """The model that a run trains: a base with a new prefix in front, or the base itself, whole, in part, or adapters.

    Just what the tuning mode trains requires gradients. A resumed run has its weights already, so its prefix does not
    start from a text again. The tokenizer must be able to write `texts`. Raises UserError for a base model that does
    not fit.
    """
    name = resolve_model_name(settings.model_name_or_path or DEFAULT_MODEL)
    hub = {"revision": settings.model_revision, "cache_dir": settings.cache_dir}
    tokenizer = load_tokenizer(name, **hub)
    base = _load_base(name, settings, hub)
    check_tokenizer(name, tokenizer, base, texts)
    revision = settings.model_revision or getattr(base.config, "_commit_hash", None)
    base_record = {"name": name, "revision": revision, "fingerprint": fingerprint(base, tokenizer)}
    base_record |= gguf_base.described(name)
    if settings.quantization:
        base_record["quantization"] = settings.quantization
    checkpointing, both = settings.gradient_checkpointing, settings.tuning_mode == "bothtune"
    prefix, train_base = None, True
    if settings.has_prefix:
        prefix = make_start(settings, base, tokenizer, resuming)
        train_base = both or settings.use_dropout or checkpointing
    else:
        check_rows(base)  # now, not when the result of the training is to be decoded
        if settings.tuning_mode == "finetune-top":
            baselines.train_top(base, settings.top_layers, embeddings=settings.top_embeddings)
        elif settings.tuning_mode == "adaptertune":
            baselines.insert(base, settings.adapter_design, settings.adapter_bottleneck)
            baselines.train_only_adapters(base)
    lm = PrefixLM(base, prefix, train_base=train_base, checkpointing=checkpointing, freeze=not both)
    return Model(lm, tokenizer, dict(task or settings.training_settings()), base_record)


def _load_base(name: str, settings: Settings, hub: Mapping[str, Any]) -> nn.Module:
    """The base model in the precision and with the dropout that the run wants."""
    frozen = settings.tuning_mode == "prefixtune"
    # frozen weights need no float32 master copy under bf16; weights that are trained do
    dtype = torch.bfloat16 if settings.bf16 and frozen else torch.float32
    dropout = {}
    if settings.use_custom_teacher_dropout:
        if not hasattr(load_config(name, **hub), "resid_pdrop"):
            raise UserError(f"--use_custom_teacher_dropout yes: {name} has no residual dropout (resid_pdrop) to set")
        dropout = {"resid_pdrop": settings.dropout}
    if frozen and settings.gradient_checkpointing and not settings.use_dropout:
        # layers are checkpointed in train mode only, so there the dropout has to be taken out of the model
        dropout = dict.fromkeys(dropout_settings(load_config(name, **hub)), 0.0)
    return load_model(name, FAMILY, **hub, dtype=dtype, quantization=settings.quantization, **dropout)


def prefix_settings(settings: Settings) -> dict[str, Any]:
    """The settings of PrefixConfig that the flags choose. P is the flag's: a text to start from has its own."""
    return {
        "preseqlen": settings.preseqlen if settings.optim_prefix else 0,
        "mid_dim": settings.mid_dim,
        "prefix_dropout": settings.dropout,
        "prefix_mode": settings.prefix_mode,
        "format_mode": settings.format_mode,
        "optim_prefix": settings.optim_prefix,
        "parametrize_emb": settings.parametrize_emb,
        "use_deep": settings.use_deep,
        "init_shallow": settings.init_shallow,
        "init_text": settings.start_text(),
    }


def check_same_prefix(settings: Settings, earlier: PrefixConfig, directory: Path | str) -> None:
    """Raise UserError naming both values if the flags ask for another prefix than the checkpoint in `directory` has."""
    given, known = prefix_settings(settings), earlier.as_dict()
    text, started = given.pop("init_text"), known.pop("init_text")
    if not settings.prefix_model_path and text != started:  # initialisation does not apply to a loaded prefix
        how = "did not start from a text" if started is None else f"started from the text {started!r}"
        raise UserError(f"{directory} {how}: --init_text (--init_shallow_word, --lowdata_token) says otherwise")
    if text is not None:
        del given["preseqlen"]  # it is the text's
    for values in (given, known):
        values["dropout"] = values.pop("prefix_dropout")
    checkpoint.check_agrees(given, known, directory)


def make_start(settings: Settings, base: nn.Module, tokenizer: Any, resuming: bool) -> nn.Module:
    """The prefix with the start that the flags ask for: random, from a text, or another checkpoint's weights.

    A resumed run has its weights already; it does not start again. Raises UserError for a model that it does not fit.
    """
    chosen, ids = prefix_settings(settings), None
    if chosen["init_text"] is not None:
        ids = text_ids(tokenizer, chosen["init_text"], max_positions(base.config) - 2)
        chosen["preseqlen"] = len(ids)
    config = PrefixConfig.for_model(base, **chosen)
    check_rows(base)
    if settings.prefix_model_path:
        earlier = load_prefix(Path(settings.prefix_model_path).expanduser())
        check_same_prefix(settings, earlier.config, settings.prefix_model_path)
        shape = {name: value for name, value in config.as_dict().items() if name.startswith(("n_", "head"))}
        checkpoint.check_agrees(shape, earlier.config.as_dict(), settings.prefix_model_path)
    prefix = make_prefix(config)
    if settings.prefix_model_path:
        prefix.load_state_dict(earlier.network)
    elif ids is not None and not resuming:
        logger.info("the prefix starts from a text of %d tokens, which is its length", len(ids))
        start_from_text(prefix, base, ids)
    elif settings.distill_context and not resuming:
        start_from_text(prefix, base, context_ids(settings, base, tokenizer)[: config.preseqlen])
    elif settings.init_random == "uniform" and not resuming:
        start_uniform(prefix)
    if settings.freeze_first:
        prefix.control_trans.register_hook(_without_first)
    return prefix


LEAST_BEHIND = 64  # positions that --distill_context has to leave for what stands behind its text


def context_ids(settings: Settings, base: nn.Module, tokenizer: Any) -> list[int]:
    """The tokens of --distill_context. Raises UserError unless they are more than the prefix, and fit the model."""
    path = Path(settings.distill_context).expanduser()
    if not path.is_file():
        raise UserError(f"--distill_context {path}: no such file")
    ids, positions = encode(tokenizer, [read_text(path)])[0], max_positions(base.config)
    if not 1 <= len(ids) <= positions - LEAST_BEHIND:
        raise UserError(
            f"--distill_context {path} has {len(ids)} tokens; the model takes 1 to {positions - LEAST_BEHIND}, "
            f"as {LEAST_BEHIND} of its {positions} positions are for what stands behind the text"
        )
    if len(ids) <= settings.preseqlen:
        raise UserError(
            f"--preseqlen {settings.preseqlen}: {path} has {len(ids)} tokens, and the prefix stands for more"
        )
    return ids


def _without_first(gradient: Tensor) -> Tensor:
    """The gradient of keys and values (P, 2*L*H*D), 0 at the first position."""
    return torch.cat([torch.zeros_like(gradient[:1]), gradient[1:]])


# ---- starting a prefix from a text (paper section 7.4) -----------------------------------------------------------

STEPS, LEARNING_RATE = 500, 1e-4  # the original's regression onto the activations of real words


def text_ids(tokenizer: Any, text: str, limit: int) -> list[int]:
    """The text's tokens, its first word with a leading space as inside a sentence. UserError unless 1 to `limit`."""
    ids = encode(tokenizer, [text if text[:1].isspace() else f" {text}"])[0] if text.strip() else []
    if not 1 <= len(ids) <= limit:
        raise UserError(f"the initial text {text[:40]!r} has {len(ids)} tokens; it needs 1 to {limit}")
    return ids


def start_from_text(prefix: nn.Module, base: nn.Module, ids: list[int]) -> list[float]:
    """Start the prefix at a text of P tokens; returns the losses of a regression, [] where none is needed.

    activation, no MLP (--init_shallow yes)     copied: the prefix starts as if the text stood in front, exactly
    activation, MLP                             the MLP is trained onto the text's keys and values for 500 steps
    embedding, --parametrize_emb Emb            copied: the trained embeddings start as the text's words
    embedding, MLP                              the MLP is trained onto the words' embeddings for 500 steps
    infix                                       the infix starts as if the text stood there, exactly (the MLP adds 0)
    """
    text = torch.tensor([ids], device=base.get_input_embeddings().weight.device)
    with torch.no_grad(), evaluating(base):
        words = base.get_input_embeddings()(text)[0].float()  # (P, E)
        states = join_layers(key_values(base, input_ids=text)).float()  # (P, 2*L*H*D), at positions 0..P-1
    config = prefix.config
    if config.prefix_mode == "embedding":
        if config.parametrize_emb == "Emb":
            return _copy(prefix.wte.weight, words)
        return _regress(prefix, prefix.embeddings, words)
    if config.format_mode == "infix":
        for added in [prefix.control_trans] if config.init_shallow else prefix.control_trans[-1].parameters():
            _copy(added, torch.zeros_like(added))
        return _copy(prefix.wte2.weight, words)
    return _copy(prefix.control_trans, states) if config.init_shallow else _regress(prefix, prefix.flat, states)


def start_uniform(prefix: nn.Module) -> None:
    """Draw what a random prefix is made of, its P vectors (without an MLP its keys and values), from [0, 1)."""
    drawn = [module.weight for module in prefix.modules() if isinstance(module, nn.Embedding)]
    for parameter in [*drawn, prefix.control_trans] if prefix.config.init_shallow else drawn:
        nn.init.uniform_(parameter)


def _copy(parameter: Tensor, values: Tensor) -> list[float]:
    with torch.no_grad():
        parameter.copy_(values)
    return []


def _regress(prefix: nn.Module, output, target: Tensor) -> list[float]:
    """The original's regression: Adam on the network, not on its P input vectors; mean squared error, dropout on."""
    optimizer = torch.optim.Adam(prefix.control_trans.parameters(), lr=LEARNING_RATE)
    target = target.to(prefix.wte.weight.device)
    losses, last_line = [], time.perf_counter()
    for step in range(STEPS):
        if time.perf_counter() - last_line > 3:  # seconds
            last_line = time.perf_counter()
            logger.info("training the prefix onto the initial text: step %d of %d", step, STEPS)
        loss = nn.functional.mse_loss(prefix.dropout(output()), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    prefix.zero_grad()
    logger.info(
        "prefix trained onto the initial text's %d tokens: loss %.4f -> %.4f", len(target), losses[0], losses[-1]
    )
    return losses


# ---- checkpoints -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedPrefix:
    """A prefix read from a checkpoint."""

    config: PrefixConfig
    base: dict[str, Any]  # {"name", "revision"}
    task: dict[str, Any]
    network: dict[str, Tensor]  # state dict of the prefix module
    stored: dict[str, Tensor]  # what decoding needs: see the module's `stored`

    @property
    def flat(self) -> Tensor:
        """Keys and values (P, 2*L*H*D)."""
        return self.stored["prefix"]

    def for_decoding(self) -> nn.Module:
        """A module that gives the same prefix, without the network wherever keys and values were stored."""
        if "prefix" not in self.stored:
            prefix = make_prefix(self.config)
            prefix.load_state_dict(self.network)
        else:
            shallow = {"prefix_mode": "activation", "init_shallow": True, "preseqlen": len(self.flat)}
            prefix = make_prefix(replace(self.config, **shallow))
            names = {"prefix": "control_trans", "wte2": "wte2.weight"}
            prefix.load_state_dict({names[name]: tensor for name, tensor in self.stored.items()})
        return prefix.eval().requires_grad_(False)


@torch.no_grad()
def save_prefix(
    directory: Path,
    prefix: nn.Module,
    base_record: Mapping[str, Any],
    task: Mapping[str, Any],
    scores: Mapping[str, Any] | None = None,
    *,
    base: nn.Module | None = None,
) -> None:
    """Write the network and what decoding needs of it; raises OSError if the disk does not take them.

    base: the base model, which an embedding prefix needs to be turned into keys and values.
    """
    checkpoint.save(
        directory,
        family=FAMILY,
        base=base_record,
        prefix=prefix.config.as_dict(),
        task=task,
        network=prefix.state_dict(),
        flat=prefix.stored(base),
        versions=record.versions(),
        scores=scores,
    )


def load_prefix(directory: Path | str) -> SavedPrefix:
    """Read a prefix of this package, of the original code or of PEFT. Raises UserError if it is none, or damaged."""
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise UserError(f"checkpoint {directory}: no such folder")
    if (directory / peft_format.CONFIG).is_file():
        return _load_peft(directory)
    if checkpoint.is_checkpoint(directory):
        read = checkpoint.load(directory, FAMILY)
        config = checkpoint.rebuild(PrefixConfig, read.prefix, directory / checkpoint.CONFIG, Settings)
        with checkpoint.odd_settings_refused(directory), torch.device("meta"):  # shapes alone
            network = {name: tensor.shape for name, tensor in make_prefix(config).state_dict().items()}
        checkpoint.check_tensors(read.network, network, directory / checkpoint.NETWORK)
        stored = {"prefix": (config.preseqlen, config.width)} if config.optim_prefix else {}
        if config.format_mode == "infix":
            stored["wte2"] = (config.preseqlen, config.n_embd)
        checkpoint.check_tensors(read.flat, stored, directory / checkpoint.FLAT)
        return SavedPrefix(config, read.base, read.task, read.network, read.flat)
    found = original.read_gpt2(directory)
    config = checkpoint.rebuild(PrefixConfig, found.settings, directory)
    prefix = make_prefix(config)
    original.load_network(prefix, found, directory, "GPT-2")
    # trained embeddings become keys and values only once their base model is there
    stored = {} if config.prefix_mode == "embedding" else prefix.stored(None)
    return SavedPrefix(config, found.base, found.task, found.network, stored)


def _load_peft(directory: Path) -> SavedPrefix:
    """An adapter of PEFT as keys and values without an MLP."""
    adapter = peft_format.read(directory)
    config = PrefixConfig(
        preseqlen=adapter.flat.shape[0],
        mid_dim=Settings.default("mid_dim"),  # unused, but a run that goes on from here must agree with it
        prefix_dropout=0.0,
        prefix_mode="activation",
        format_mode="cat",
        n_layer=adapter.layers,
        n_head=adapter.heads,
        head_dim=adapter.flat.shape[1] // (2 * adapter.layers * adapter.heads),
        n_embd=0,  # PEFT does not say it; the base model does
        init_shallow=True,
    )
    task = {"tuning_mode": "prefixtune", "imported_from": "peft", **checkpoint.load_task(directory)}
    return SavedPrefix(config, dict(adapter.base), task, {"control_trans": adapter.flat}, {"prefix": adapter.flat})


def load(
    directory: Path | str,
    *,
    mode: str | None = None,
    model_name_or_path: str | None = None,
    cache_dir: str | None = None,
    dtype: torch.dtype = torch.float32,
    allow_other_base: bool = False,
    quantization: str | None = None,
    attn_implementation: str | None = None,
) -> Model:
    """The trained model in `directory`, ready to generate, on a GPU if there is one.

    Args:
        directory: a prefix checkpoint, the folder of a model that was tuned itself (wholly, in its top layers, with
            adapters, or together with a prefix), a checkpoint of the original code, or an exported PEFT folder.
        mode: the task, where the checkpoint does not say it; another one than the checkpoint's is refused.
        model_name_or_path: the base model, where it is not where the checkpoint says.
        cache_dir: where hub files are kept. dtype: the precision of the base model; the prefix follows it.
        allow_other_base: decode with a base model of the same shape that is not the one trained on.
        quantization: of the base model, as --quantization; by default as in training.
        attn_implementation: "sdpa" or "eager"; by default what transformers chooses for the model.

    Raises UserError for a folder that is no checkpoint, a damaged file, or a base model that does not fit.

    >>> load("gpt2/webnlg_models/NAME").generate(["..."])  # doctest: +SKIP
    """
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise UserError(f"checkpoint {directory}: no such folder")
    check_tree(mode, "gpt2")
    holds_prefix = original.is_prefix(directory) or (directory / peft_format.CONFIG).is_file()
    tuned = None if holds_prefix else checkpoint.model_folder(directory)
    if tuned is not None:
        how = {"cache_dir": cache_dir, "dtype": dtype, "attn_implementation": attn_implementation}
        return _load_tuned(tuned, mode, model_name_or_path, **how)
    saved = load_prefix(directory)
    how = {"quantization": quantization, "attn_implementation": attn_implementation}
    base, tokenizer, name = load_base_of(saved, directory, model_name_or_path, cache_dir, dtype, **how)
    return attach(saved, base, tokenizer, name, directory, mode=mode, allow_other_base=allow_other_base)


def load_base_of(
    saved: SavedPrefix,
    directory: Path | str,
    name: str | None,
    cache_dir: str | None,
    dtype: torch.dtype,
    quantization: str | None = None,
    attn_implementation: str | None = None,
) -> tuple[nn.Module, Any, str]:
    """The base model that `saved` was trained on, or `name` in its place, on a GPU if there is one; tokenizer; name."""
    name, revision = choose_base(saved.base, name, directory)
    how = {"quantization": quantization or saved.base.get("quantization"), "attn_implementation": attn_implementation}
    base = load_model(name, FAMILY, revision=revision, cache_dir=cache_dir, dtype=dtype, **how)
    return _on_device(base), load_tokenizer(name, revision=revision, cache_dir=cache_dir), name


def attach(
    saved: SavedPrefix,
    base: nn.Module,
    tokenizer: Any,
    name: str,
    directory: Path | str,
    *,
    mode: str | None = None,
    allow_other_base: bool = False,
) -> Model:
    """A saved prefix in front of the base model `name`. Raises UserError if it was not trained for this one."""
    checkpoint.check_agrees({"mode": mode}, {"mode": saved.task.get("mode") or mode}, directory)
    check_tree(saved.task.get("mode") or mode, "gpt2", f"{directory}: ")
    check_fits(saved.config, shape_of(base), directory, name)
    saved.config.check_positions(base.config)
    if not allow_other_base:
        check_fingerprint(saved.base, base, tokenizer, name, directory)
    check_tokenizer(name, tokenizer, base, ())
    lm = PrefixLM(base, saved.for_decoding().to(base.device))
    base_record = checkpoint.own_model_base(saved.base, saved.task, directory)
    return Model(lm.eval(), tokenizer, {**saved.task, "mode": mode or saved.task.get("mode")}, base_record)


def check_fits(config: PrefixConfig, shape: Mapping[str, Any], directory: Path | str, name: str) -> None:
    """Raise UserError if a prefix was trained for a model of another shape than that of the model `name`."""
    known = config.as_dict()
    known["n_embd"] = config.n_embd or shape.get("n_embd")  # PEFT does not say it
    if any(shape.get(key) != known[key] for key in known if key.startswith(("n_", "head"))):
        raise UserError(f"the prefix in {directory} was trained for a model of another shape than {name}")


def shape_by_name(name: str, revision: str | None) -> dict[str, Any]:
    """The shape of the model `name`, from its config.json alone where it runs without weights; {} if it is no kin."""
    config = load_config(name, revision=revision)
    if config.is_encoder_decoder:
        return {}
    try:
        return shape_of(without_weights(config))
    except UserError:
        return shape_of(load_model(name, FAMILY, revision=revision))


def _load_tuned(directory: Path, mode: str | None, model_name: str | None, **how: Any) -> Model:
    """A model that was tuned itself, without a prefix; `how`: as in `load_model`."""
    if model_name is not None:
        raise UserError(f"--model_name_or_path {model_name} contradicts {directory}, which is a whole model itself")
    task = checkpoint.load_task(directory)
    if task.get("tuning_mode") == "bothtune":
        raise UserError(f"{directory} was tuned together with a prefix: pass {directory.parent}, which holds both")
    checkpoint.check_agrees({"mode": mode}, {"mode": task.get("mode") or mode}, directory)
    check_tree(task.get("mode"), "gpt2", f"{directory}: ")
    base = load_model(str(directory), FAMILY, **how)
    check_rows(base)
    tokenizer = load_tokenizer(str(directory), cache_dir=how["cache_dir"])
    lm = PrefixLM(base.requires_grad_(False), None)
    return Model(
        _on_device(lm), tokenizer, {**task, "mode": mode or task.get("mode")}, dict(task.get("base_model", {}))
    )


def _on_device(lm: nn.Module) -> nn.Module:
    if next(lm.parameters()).is_cuda:  # bitsandbytes' models are there already, and cannot be moved
        return lm.eval()
    return lm.to("cuda" if torch.cuda.is_available() else "cpu").eval()
