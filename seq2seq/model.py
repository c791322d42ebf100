"""The model object: made anew, started from a text, loaded from any checkpoint, saved, generating text.

    model = load("seq2seq/xsum_models/NAME")
    model.generate(["The document to summarise."])

Legend: P prefix length, L layers, H heads, D head size.
"""

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from prefixlib import attention, baselines, best, checkpoint, files, original, record
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
from prefixlib.beam_search import DecodingRule, Hypothesis, as_stop, as_texts, check_count, stream, text_pieces
from prefixlib.errors import UserError
from prefixlib.mixed import Prepared
from prefixlib.settings import choose_strategy, spelled
from prefixlib.tasks import SEQ2SEQ_MODES, InSeq2Seq, as_group, check_tree, find_task
from prefixlib.wording import Wording
from seq2seq import decoding
from seq2seq.flags import DEFAULT_MODEL, STRATEGIES, Settings
from seq2seq.frozen_lm import install, key_values_of_text, max_positions, shape_of
from seq2seq.prefix_lm import PrefixLM
from seq2seq.prefixTuning import BRANCHES, FAMILY, PrefixConfig, PrefixTuning
from seq2seq.utils import encode_sources

logger = logging.getLogger(__name__)

TOP_P, TEMPERATURE, SEED = 0.8, 1.0, 42  # of sampling
OF_ONE_STRATEGY = (
    *(("num_beams", "beam", None), ("length_pen", "beam", None)),
    *(("top_p", "nucleus", TOP_P), ("top_k", "nucleus", 0), ("temperature", "nucleus", TEMPERATURE)),
)


@dataclass
class Model:
    """An encoder-decoder with a trained prefix, or one that was tuned itself (then it has no prefix).

    task: what its training knew: mode, tuning_mode, max_source_length, ...; base_record: {"name", "revision"} of the
    base model.
    """

    lm: PrefixLM
    tokenizer: Any
    task: dict[str, Any]
    base_record: dict[str, Any]

    @property
    def base(self) -> nn.Module:
        return self.lm.base

    @property
    def prefix(self) -> PrefixTuning | None:
        return self.lm.prefix

    @property
    def source_limit(self) -> int:
        """Most tokens of a source: as many as in training, else the task's; no more than the model has positions."""
        limit = self.task.get("max_source_length") or self._row.lengths["max_source_length"]
        return min(limit, max_positions(self.base.config))

    @property
    def wording(self) -> Wording:
        """What the model reads of a source."""
        return Wording.of(self.task)

    @property
    def _row(self) -> InSeq2Seq:
        mode = self.task.get("mode")
        if mode is None:
            raise UserError(f"the model does not say its task: load(..., mode=...), one of {', '.join(SEQ2SEQ_MODES)}")
        return find_task(mode).seq2seq

    # ---- generating ----

    def generate(
        self,
        sources: Sequence[Any],
        *,
        strategy: str | None = None,
        num_beams: int | None = None,
        min_length: int | None = None,
        max_new_tokens: int | None = None,
        length_penalty: float | None = None,
        top_p: float = TOP_P,
        top_k: int = 0,
        temperature: float = TEMPERATURE,
        stop: str | Sequence[str] = (),
        seed: int = SEED,
        batch_size: int = 10,
        num_return_sequences: int = 1,
        return_scores: bool = False,
        progress: bool = False,
    ) -> list[Any]:
        """Texts for `sources`, in their order, decoded as the command line decodes the task's test file.

        Args:
            sources: texts (documents, or tables as the task linearises them), or data: for WebNLG and DART a list of
                (subject, relation, object) triples, for E2E a mapping of slots to values, for user data (mode text)
                the text alone, which is put into the template of the training, or a list of messages.
            strategy: "beam", "greedy" or "nucleus"; default: beam.
            num_beams, length_penalty: of beam search; default: the task's.
            top_p, top_k, temperature, seed: of nucleus sampling; temperature 0 is greedy.
            stop: a text, or several, before the first of which an output ends.
            min_length: fewest tokens of an output, the decoder's start token included; default: the task's.
            max_new_tokens: most tokens of an output; default: the task's.
            batch_size: sources decoded together; changes the speed only.
            num_return_sequences: outputs per source, at most num_beams with beams.
            return_scores: give (text, score) pairs, the score being the length-normalised log-probability of a beam,
                or the log-probability of a greedy or sampled text.

        Returns a text for each source (or a pair), or a list of them where num_return_sequences is above 1. Sources
        longer than `source_limit` are cut, with a warning. Raises UserError for inputs of another shape than the
        task's, values out of range, and settings that have no effect under the strategy.

        >>> load("CHECKPOINT").generate([[("Aarhus_Airport", "cityServed", "Aarhus")]])  # doctest: +SKIP
        ['Aarhus Airport serves the city of Aarhus.']
        """
        if isinstance(sources, str):
            raise UserError("generate() takes a list of sources, not one text")
        given = {"num_beams": num_beams, "min_length": min_length, "length_penalty": length_penalty, "stop": stop}
        given |= {"top_p": top_p, "top_k": top_k, "temperature": temperature, "max_new_tokens": max_new_tokens}
        ready = self.prepare(sources, num_return_sequences, strategy=strategy, **given)
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: must be above 0")
        how = {"strategy": ready.strategy, "seed": seed, "batch_size": batch_size, "progress": progress}
        found = self.decode(ready.inputs, ready.rule, count=num_return_sequences, **how)
        return as_texts(found, ready.to_text, several=num_return_sequences > 1, scores=return_scores)

    def prepare(
        self,
        sources: Sequence[Any],
        count: int,
        *,
        strategy: str | None = None,
        num_beams: int | None = None,
        min_length: int | None = None,
        max_new_tokens: int | None = None,
        length_penalty: float | None = None,
        top_p: float = TOP_P,
        top_k: int = 0,
        temperature: float = TEMPERATURE,
        stop: str | Sequence[str] = (),
    ) -> Prepared:
        """Sources ready to be decoded, alone or in a batch with other prefixes' (`mixed`); see `generate`."""
        given = {"num_beams": num_beams, "length_pen": length_penalty}
        given |= {"top_p": top_p, "top_k": top_k, "temperature": temperature}
        stop, strategy = as_stop(stop), self._strategy(strategy, top_p, top_k, temperature)
        rule = self._rule(strategy, min_length, max_new_tokens, stop, **given)
        check_count(count, strategy, rule.num_beams)
        inputs, _ = self.encode(self._texts(sources), self.source_limit)
        return Prepared(inputs, strategy, rule, self.to_text(stop))

    def stream(
        self,
        source: Any,
        *,
        strategy: str = "greedy",
        min_length: int | None = None,
        max_new_tokens: int | None = None,
        top_p: float = TOP_P,
        top_k: int = 0,
        temperature: float = TEMPERATURE,
        stop: str | Sequence[str] = (),
        seed: int = SEED,
    ) -> Iterator[str]:
        """The text for one source, a piece at a time, as soon as the piece is certain; "greedy" or "nucleus".

        The pieces joined are what `generate` gives with the same settings. Raises UserError as `generate` does.

        >>> for text in load("CHECKPOINT").stream("The document to summarise."):  # doctest: +SKIP
        ...     print(text, end="", flush=True)
        """
        if strategy not in ("greedy", "nucleus"):
            raise UserError(f"stream() is greedy or nucleus, not {strategy!r}: beams are certain only at their end")
        stop, strategy = as_stop(stop), self._strategy(strategy, top_p, top_k, temperature)
        given = {"top_p": top_p, "top_k": top_k, "temperature": temperature}
        rule = self._rule(strategy, min_length, max_new_tokens, stop, **given)
        inputs, _ = self.encode(self._texts([source]), self.source_limit)
        self.lm.eval()
        with torch.no_grad():
            prefix = self.lm.layers()
        steps = decoding.make_steps(self.base, *decoding.pad_sources(self.base, inputs), decoding.Past(prefix))
        (start,) = decoding.start_tokens(self.base, 1)
        tokens = stream(steps, start, rule, seed if strategy == "nucleus" else None)
        return text_pieces(tokens, self.to_text(stop), stop, self._verbatim)

    @property
    def _verbatim(self) -> bool:
        return find_task(self._row.name).verbatim

    def to_text(self, stop: Sequence[str] = ()) -> Callable[[Sequence[int]], str]:
        """What makes text of generated tokens: as the task wants it, up to the first of the strings `stop`."""
        return functools.partial(decoding.to_text, self.tokenizer, verbatim=self._verbatim, stop=stop)

    def _strategy(self, given: str | None, top_p: float, top_k: int, temperature: float) -> str:
        sampled = (top_p, top_k, temperature) != (TOP_P, 0, TEMPERATURE)
        return choose_strategy(self._row.name, given, "beam", temperature, sampled)

    def _rule(
        self, strategy: str, min_length: int | None, max_new_tokens: int | None, stop: Sequence[str], **given: Any
    ) -> DecodingRule:
        """The task's rule with what is given. UserError for a setting that has no effect under the strategy."""
        if strategy not in STRATEGIES:
            raise UserError(f"strategy {strategy!r}: one of {', '.join(STRATEGIES)}")
        for name, owner, default in OF_ONE_STRATEGY:
            if owner == "nucleus" and strategy == "greedy" and given.get("temperature") == 0:
                continue  # sampling made greedy
            if strategy != owner and given.get(name, default) != default:
                raise UserError(f"strategy {strategy!r} and {name} do not go together: it belongs to {owner!r}")
        max_length = None
        if max_new_tokens is not None:
            max_length = max_new_tokens + 1
            if min_length is None:  # an output may be shorter than is usual for the task
                min_length = min(self._row.min_length, max_length)
        how = {"min_length": min_length, "max_length": max_length, "stop": decoding.stops(self.tokenizer, stop)}
        return decoding.decoding_rule(self._row.name, self.base.config, **how, **given)

    def _texts(self, sources: Sequence[Any]) -> list[str]:
        """The sources linearised, as `utils.load_examples` reads them from a file."""
        texts = [as_group(self._row.name, self.wording.source(source)).source for source in sources]
        return texts if self._verbatim else [text.strip() for text in texts]

    def encode(self, texts: Sequence[str], limit: int) -> tuple[list[list[int]], int]:
        """Token ids of sources, cut to `limit` tokens, special tokens included; and how many were cut."""
        if not texts:
            return [], 0
        inputs, cut = encode_sources(self.tokenizer, self.wording, texts, limit)
        if cut:
            logger.warning("%d of %d sources cut to %d tokens", cut, len(texts), limit)
        return inputs, cut

    @torch.no_grad()
    def decode(self, inputs: Sequence[Sequence[int]], rule: DecodingRule, **how: Any) -> list[list[Hypothesis]]:
        """The hypotheses of every source (token ids), best first; `how` as in `decoding.decode`."""
        self.lm.eval()
        return decoding.decode(self.base, inputs, rule, prefix=self.lm.layers(), **how)

    # ---- saving ----

    def save(self, directory: Path | str, scores: Mapping[str, Any] | None = None) -> None:
        """Write what was trained: the prefix, or the whole model in transformers' format with its tokenizer, or both.

        Of both, the model goes to DIRECTORY/model. `scores` stand in a prefix's model card. A loaded prefix is saved
        without its network, which only training needs. Raises OSError if the disk does not take the files.
        """
        directory, base_record, task = Path(directory), self.base_record, self.task
        directory.mkdir(parents=True, exist_ok=True)
        if self.prefix is None:
            self._save_base(directory)
            return
        if task.get("tuning_mode") == "bothtune":
            (directory / checkpoint.CONFIG).unlink(missing_ok=True)  # it describes another model than the new one
            files.replace_directory(directory / checkpoint.OWN_MODEL, self._save_base)
            task = {**task, "tuned_from": task.get("tuned_from") or base_record["name"]}
            base_record = {"name": checkpoint.OWN_MODEL, "revision": None}
        save_prefix(directory, self.prefix, base_record, task, scores)

    def _save_base(self, directory: Path) -> None:
        # the config that is saved names what plain transformers knows
        self.base.set_attn_implementation("sdpa" if self.base._supports_sdpa else "eager")
        save_whole(directory, self.base, self.tokenizer)
        attention.install(self.base)
        checkpoint.save_task(directory, {**self.task, "base_model": self.base_record})

    def load_weights(self, directory: Path) -> None:
        """The counterpart of `save`."""
        best.load_weights(self, directory, FAMILY, load_prefix)

    def count_parameters(self) -> dict[str, int | None]:
        """Numbers that are trained; those of the model behind the prefix; those that decoding needs stored."""
        trainable = sum(p.numel() for p in self.lm.parameters() if p.requires_grad)
        base = sum(p.numel() for p in self.base.parameters())
        if self.prefix is None:
            return {"trainable": trainable, "base": None, "stored": base}
        config = self.prefix.config
        stored = sum(config.preseqlen * math.prod(config.shape(branch.site)) for branch in self.prefix.branches)
        tuned = base if self.task.get("tuning_mode") == "bothtune" else 0
        return {"trainable": trainable, "base": base, "stored": stored + tuned}


# ---- a new model -------------------------------------------------------------------------------------------------


def new(settings: Settings, *, resuming: bool = False, texts: Sequence[str] = ()) -> Model:
    """The model that a run trains: a base with a new prefix, or the base itself, whole, in part, or its adapters.

    Just what the tuning mode trains requires gradients. The prefix starts at random, from a text, or at the weights of
    --prefix_model_path; that of a resumed run gets its weights later, so it does not start from a text again. The
    tokenizer must be able to write `texts`. Raises UserError for a base model or a start that does not fit.
    """
    name = resolve_model_name(settings.model_name_or_path or DEFAULT_MODEL)
    hub = {"revision": settings.model_revision, "cache_dir": settings.cache_dir}
    tokenizer = load_tokenizer(name, **hub)
    without = settings.tuning_mode == "prefixtune" and not settings.use_dropout
    dropout = dropout_settings(load_config(name, **hub))
    # a layer that is left out (LayerDrop, M2M100) would leave out its prefix: a step could be without any gradient
    off = {key: 0.0 for key in dropout if without or (settings.has_prefix and "layerdrop" in key)}
    base = load_model(name, FAMILY, **hub, quantization=settings.quantization, **off)
    check_tokenizer(name, tokenizer, base, texts)
    mark, prefix = fingerprint(base, tokenizer), None  # before adapters are put in
    if settings.has_prefix:
        install(base)
        prefix = _new_prefix(settings, base, tokenizer, resuming)
    elif settings.tuning_mode == "finetune-top":
        baselines.train_top(base, settings.top_layers, embeddings=settings.top_embeddings)
    elif settings.tuning_mode == "adaptertune":
        baselines.insert(base, settings.adapter_design, settings.adapter_bottleneck)
        baselines.train_only_adapters(base)
    lm = PrefixLM(base, prefix, freeze=settings.tuning_mode != "bothtune")
    if settings.gradient_checkpointing:
        attention.enable_checkpointing(base)
    task = {
        "mode": settings.mode,
        "tuning_mode": settings.tuning_mode,
        "seed": settings.seed,
        "max_source_length": settings.lengths(max_positions(base.config))["max_source_length"],
        **settings.data_settings(),
        **settings.tuning_settings(),
    }
    record_ = {"name": name, "revision": settings.model_revision, "fingerprint": mark}
    if settings.quantization:
        record_["quantization"] = settings.quantization
    return Model(lm, tokenizer, task, record_)


def _new_prefix(settings: Settings, base: nn.Module, tokenizer: Any, resuming: bool) -> PrefixTuning:
    text, ids = settings.start_text(), []
    if text is not None:
        ids, limit = tokenizer(text, add_special_tokens=False)["input_ids"], max_positions(base.config)
        if not 0 < len(ids) <= limit:
            raise UserError(f"the initial text has {len(ids)} tokens; it needs 1 to {limit}")
        if len(ids) != settings.preseqlen:
            logger.info("preseqlen %d: the tokens of the initial text", len(ids))
    config = PrefixConfig.for_model(
        base.config,
        preseqlen=len(ids) or settings.preseqlen,
        mid_dim=settings.mid_dim,
        prefix_dropout=settings.dropout,
        use_deep=settings.use_deep,
        **{branch.switch: getattr(settings, branch.switch) for branch in BRANCHES},
        init_shallow=settings.init_shallow,
    )
    prefix = PrefixTuning(config)
    if ids and not resuming:
        start_from_text(prefix, base, ids)
    if settings.prefix_model_path:
        saved = load_prefix(settings.prefix_model_path)
        known, wanted = saved.config.as_dict(), config.as_dict()
        differing = [f"{name} {known[name]}, not {wanted[name]}" for name in known if known[name] != wanted[name]]
        if differing:
            raise UserError(
                f"--prefix_model_path {settings.prefix_model_path} was trained with other settings: "
                + ", ".join(differing)
            )
        prefix.load_state_dict(saved.network)
    return prefix


# ---- starting a prefix from a text (paper section 7.4) -----------------------------------------------------------

STEPS, LEARNING_RATE = 500, 1e-4  # the original's regression onto the activations of real words


def start_from_text(prefix: PrefixTuning, base: nn.Module, ids: list[int]) -> list[float]:
    """Start the prefix at the keys and values of P tokens: copied without an MLP, else the MLPs are trained onto them.

    The training is the original's: Adam on the networks, not the embeddings, mean squared error; returns its losses.
    """
    target = key_values_of_text(base, ids)
    if prefix.config.init_shallow:
        with torch.no_grad():
            for branch in prefix.branches:
                getattr(prefix, branch.network).copy_(target[branch.site])
        return []
    networks = nn.ModuleList(getattr(prefix, branch.network) for branch in prefix.branches)
    optimizer = torch.optim.Adam(networks.parameters(), lr=LEARNING_RATE)
    losses = []
    for _ in range(STEPS):
        flat = prefix.flat()
        loss = sum(nn.functional.mse_loss(prefix.dropout(flat[site]), target[site]) for site in flat)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    prefix.zero_grad()
    logger.info("prefix trained onto %d tokens: loss %.4f -> %.4f", len(ids), losses[0], losses[-1])
    return losses


# ---- checkpoints -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedPrefix:
    """A prefix read from a checkpoint."""

    config: PrefixConfig
    base: dict[str, Any]  # {"name", "revision"}
    task: dict[str, Any]
    network: dict[str, Tensor]  # state dict of PrefixTuning
    flat: dict[str, Tensor]  # site -> keys and values (P, 2*L*H*D)

    def for_decoding(self) -> PrefixTuning:
        """A module that gives the stored keys and values, without the network."""
        with torch.device("meta"):  # its parameters are the stored arrays themselves
            prefix = PrefixTuning(replace(self.config, init_shallow=True))
        names = {branch.site: branch.network for branch in prefix.branches}
        prefix.load_state_dict({names[site]: flat for site, flat in self.flat.items()}, assign=True)
        return prefix.eval().requires_grad_(False)


def save_prefix(
    directory: Path,
    prefix: PrefixTuning,
    base_record: Mapping[str, Any],
    task: Mapping[str, Any],
    scores: Mapping[str, Any] | None = None,
) -> None:
    """Write the network and its flattened keys and values; raises OSError if the disk does not take them."""
    with torch.no_grad():
        flat = prefix.flat()
    checkpoint.save(
        directory,
        family=FAMILY,
        base=base_record,
        prefix=prefix.config.as_dict(),
        task=task,
        network=prefix.state_dict(),
        flat={branch.saved: flat[branch.site] for branch in prefix.branches},
        versions=record.versions(),
        scores=scores,
    )


def load_prefix(directory: Path | str) -> SavedPrefix:
    """Read a prefix of this package, or of the original code. Raises UserError if it is neither, or damaged."""
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise UserError(f"checkpoint {directory}: no such folder")
    if checkpoint.is_checkpoint(directory):
        read = checkpoint.load(directory, FAMILY)
        config = checkpoint.rebuild(PrefixConfig, read.prefix, directory / checkpoint.CONFIG)
        with checkpoint.odd_settings_refused(directory), torch.device("meta"):  # shapes alone
            prefix = PrefixTuning(config)
        network = {name: tensor.shape for name, tensor in prefix.state_dict().items()}
        checkpoint.check_tensors(read.network, network, directory / checkpoint.NETWORK)
        stored = {b.saved: (config.preseqlen, math.prod(config.shape(b.site))) for b in prefix.branches}
        checkpoint.check_tensors(read.flat, stored, directory / checkpoint.FLAT)
        flat = {branch.site: read.flat[branch.saved] for branch in prefix.branches}
        return SavedPrefix(config, read.base, read.task, read.network, flat)
    found = original.read_bart(directory)
    prefix = PrefixTuning(checkpoint.rebuild(PrefixConfig, found.settings, directory))
    original.load_network(prefix, found, directory, "BART")
    with torch.no_grad():
        return SavedPrefix(prefix.config, found.base, found.task, found.network, prefix.flat())


def saved_settings(directory: Path | str) -> dict[str, Any]:
    """What a checkpoint was trained with, under the flags' names and in their spelling; {} where it does not say.

    Raises UserError for a folder that is neither a prefix checkpoint nor a model's.
    """
    directory = Path(directory)
    if not original.is_prefix(directory) and checkpoint.model_folder(directory) is not None:
        return checkpoint.load_task(checkpoint.model_folder(directory))
    if checkpoint.is_checkpoint(directory):
        config = checkpoint.read_config(directory)
        prefix, task = config["prefix"], config["task"]
    else:
        saved = load_prefix(directory)
        prefix, task = saved.config.as_dict(), saved.task
    values = {name: spelled(value) for name, value in prefix.items()}
    return {**values, "dropout": values.get("prefix_dropout"), **task}


def load(
    directory: Path | str,
    *,
    mode: str | None = None,
    model_name_or_path: str | None = None,
    model_revision: str | None = None,
    cache_dir: str | None = None,
    dtype: torch.dtype = torch.float32,
    allow_other_base: bool = False,
    quantization: str | None = None,
) -> Model:
    """The trained model in `directory`, ready to generate, on a GPU if there is one.

    Args:
        directory: a prefix checkpoint, the folder of a model that was tuned itself (wholly, in its top layers, with
            adapters, or together with a prefix), a checkpoint of the original code, or any folder of an
            encoder-decoder.
        mode: the task, where the checkpoint does not say it; another one than the checkpoint's is refused.
        model_name_or_path, model_revision: the base model, where it is not where the checkpoint says.
        cache_dir: where hub files are kept. dtype: the precision of the base model; the prefix follows it.
        allow_other_base: decode with a base model of the same shape that is not the one trained on.
        quantization: of the base model, as --quantization; by default as in training.

    Raises UserError for a folder that is no checkpoint, a damaged file, or a base model that does not fit.

    >>> load("seq2seq/xsum_models/NAME").generate(["The document to summarise."])  # doctest: +SKIP
    """
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise UserError(f"checkpoint {directory}: no such folder")
    check_tree(mode, "seq2seq")
    hub = {"cache_dir": cache_dir, "dtype": dtype}
    tuned = None if original.is_prefix(directory) else checkpoint.model_folder(directory)
    if tuned is not None:
        return _load_tuned(tuned, mode, model_name_or_path, **hub)
    saved = load_prefix(directory)
    of_base = {"revision": model_revision, "quantization": quantization, **hub}
    base, tokenizer, name = load_base_of(saved, directory, model_name_or_path, **of_base)
    return attach(saved, base, tokenizer, name, directory, mode=mode, allow_other_base=allow_other_base)


def load_base_of(
    saved: SavedPrefix,
    directory: Path | str,
    name: str | None,
    *,
    revision: str | None = None,
    quantization: str | None = None,
    **hub: Any,
) -> tuple[nn.Module, Any, str]:
    """The base model that `saved` was trained on, or `name` in its place, on a GPU if there is one; tokenizer; name."""
    name, of_checkpoint = choose_base(saved.base, name, directory)
    bits = quantization or saved.base.get("quantization")
    base, tokenizer = _load_base(name, revision or of_checkpoint, **hub, quantization=bits)
    return on_device(base), tokenizer, name


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
    task = _task_of(saved.task, mode, directory)
    check_fits(saved.config, base.config, directory, name)
    if not allow_other_base:
        check_fingerprint(saved.base, base, tokenizer, name, directory)
    lm = PrefixLM(base, saved.for_decoding().to(base.device))
    return Model(lm.eval(), tokenizer, task, checkpoint.own_model_base(saved.base, saved.task, directory))


def check_fits(config: PrefixConfig, base: PreTrainedConfig, directory: Path | str, name: str) -> None:
    """Raise UserError if a prefix was trained for a model of another shape than `base`, a model's configuration."""
    with contextlib.suppress(AttributeError):  # a model of the other family
        if all(getattr(config, size) == value for size, value in shape_of(base).items()):
            return
    raise UserError(f"the prefix in {directory} was trained for a model of another shape than {name}")


def _load_tuned(directory: Path, mode: str | None, model_name: str | None, **hub: Any) -> Model:
    """A model that was tuned itself, without a prefix."""
    if model_name is not None:
        raise UserError(f"--model_name_or_path {model_name} contradicts {directory}, which is a whole model itself")
    saved = checkpoint.load_task(directory)
    if saved.get("tuning_mode") == "bothtune":
        raise UserError(
            f"{directory} was tuned together with a prefix: pass --prefix_model_path {directory.parent}, which holds "
            "both"
        )
    task = _task_of(saved, mode, directory)
    base, tokenizer = _load_base(str(directory.resolve()), None, **hub)
    base_record = task.pop("base_model", {"name": str(directory.resolve()), "revision": None})
    return Model(on_device(PrefixLM(base)), tokenizer, task, dict(base_record))


def _load_base(name: str, revision: str | None, cache_dir: str | None, **how: Any) -> tuple[nn.Module, Any]:
    base = load_model(name, FAMILY, revision=revision, cache_dir=cache_dir, **how)
    return base, load_tokenizer(name, revision=revision, cache_dir=cache_dir)


def _task_of(saved: Mapping[str, Any], mode: str | None, directory: Path) -> dict[str, Any]:
    """What the checkpoint says of its task, or `mode` where it says nothing; UserError if the two differ."""
    known = saved.get("mode")
    check_tree(known or mode, "seq2seq", f"{directory}: ")
    if known is not None and mode is not None and find_task(known) is not find_task(mode):
        checkpoint.check_agrees({"mode": mode}, {"mode": known}, directory)
    return {**saved, "mode": known or mode}


def on_device(lm: nn.Module) -> nn.Module:
    """The model on a GPU if there is one, in eval mode."""
    return lm.to("cuda" if torch.cuda.is_available() else "cpu").eval()
