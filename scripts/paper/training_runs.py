"""One training with its decoding: the commands a user would type, its folder, whether it is done."""

import contextlib
import errno
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from paper.experiments import Experiment, Row
from prefixlib.checkpoints.folder import clear_checkpoint
from prefixlib.data.tasks import DEMO, SPLITS, data_file, find_task
from prefixlib.runs.launch import as_words
from prefixlib.system import files
from prefixlib.system.places import DEMO_DATA, REPOSITORY

RECIPE = "recipe.json"
PATIENCE = 30  # seconds that a stopped run gets to write its checkpoint
FIRST_SEED = 101  # the original's
# flags that --demo yes chooses itself, and those that the demo's models do not use
NOT_IN_DEMO = (
    "learning_rate", "epoch", "bsz", "mid_dim", "warmup_steps", "gradient_accumulation_steps",
    "fp16", "max_source_length",
)  # fmt: skip
DRAWN_FROM = {"e2e": "e2e_data", "webnlg": "webnlg_challenge_2017", "xsum": "xsum"}  # folders of the whole sets


class RunFailed(Exception):
    """Raised for a run that cannot be made, or failed; the others continue. The message is one line."""


@dataclass(frozen=True)
class Settings:
    """The settings that all runs share."""

    runs_dir: Path
    data_dir: Path | None = None
    gpt2_model: str = "gpt2-medium"
    bart_model: str = "bart-large"
    demo: bool = False
    own_base: bool = False  # gpt2_model is a user's model (real_model.py): its data sets are under runs_dir
    keep_weights: bool = True  # False: weights are removed once a run is decoded
    passed_on: Mapping[str, object] = field(default_factory=dict)  # --max_steps, --bf16, ...


@dataclass(frozen=True)
class Run:
    """A row with one seed (and, in low data, one of the sampled sets)."""

    row: Row
    folder: Path
    seed: int
    sample: int  # 0 if the whole set is used
    settings: Settings

    @property
    def name(self) -> str:
        return self.folder.name

    # ---- commands ------------------------------------------------------------------------------------------------

    def train_words(self) -> list[str]:
        """The launcher and its flags, without the output folder: they identify the run."""
        row, settings = self.row, self.settings
        values: dict[str, object] = {"mode": row.mode, **row.train, **settings.passed_on, "seed": self.seed}
        if row.tree == "gpt2":
            values["skip_decode"] = "yes"  # only the test set is decoded, by a command of its own
        if settings.demo:
            values = {name: value for name, value in values.items() if name not in NOT_IN_DEMO}
            if row.size:  # the launcher's demo takes no training file, so its model and settings are named here
                chosen = {k: v for k, v in DEMO["gpt2"].get(row.tuning_mode, {}).items() if k not in values}
                values |= {"model_name_or_path": DEMO_DATA / "gpt2", **chosen}
            else:
                values["demo"] = "yes"
        else:
            values["model_name_or_path"] = settings.gpt2_model if row.tree == "gpt2" else settings.bart_model
            if settings.data_dir is not None and not row.size:
                values["data_dir"] = settings.data_dir
        if "max_steps" in values and "eval_steps" in values:  # a run without an evaluation would have no best one
            values["eval_steps"] = min(values["eval_steps"], values["max_steps"])
        if settings.passed_on.get("bf16") == "yes":
            values.pop("fp16", None)
        if row.size:
            stem = self.sample_stem()
            ending = {"e2e": "txt", "webnlg": "json", "xsum": "source"}[self._sampled_from()]
            values |= {"train_file": f"{stem}_train.{ending}", "eval_file": f"{stem}_valid.{ending}"}
        return [f"{row.tree}/train_{'e2e' if row.tree == 'gpt2' else 'bart'}.py", *as_words(values)]

    def decode_words(self) -> list[str]:
        """The command that decodes and scores the test set; its results are stored with the training's."""
        row, settings = self.row, self.settings
        checkpoint = self.folder / "best" if row.best else self.folder
        if self.is_trained() and not checkpoint.is_dir():
            checkpoint = self.folder  # cut by --max_steps before its first validation, so there is no best one
        where = {"output_dir": self.folder}
        if settings.demo:
            where["demo"] = "yes"
        elif settings.data_dir is not None:
            where["data_dir"] = settings.data_dir
        if row.tree == "gpt2":
            return ["gpt2/gen.py", row.mode, "yes", "test", str(checkpoint), "no", *as_words({**row.decode, **where})]
        kind = "prefix_model_path" if row.tuning_mode == "prefixtune" else "finetune_model_path"
        values = {"mode": row.mode, "do_train": "no", kind: checkpoint, **row.decode, **where}
        return ["seq2seq/train_bart.py", *as_words(values)]

    # ---- data ----------------------------------------------------------------------------------------------------

    def data_dir(self) -> Path:
        return DEMO_DATA if self.settings.demo else self.settings.data_dir or REPOSITORY / "data"

    def sample_stem(self) -> Path:
        """The low-data set's files, without their endings."""
        drawn = {"demo_data": self.settings.demo, "drawn_data": self.settings.own_base}
        aside = [name for name, meant in drawn.items() if meant]  # the user's own data folder is left as it is
        root = self.settings.runs_dir / aside[0] if aside else self.data_dir()
        return root / f"{self._sampled_from()}_lowdata" / f"lowdata_{self.row.size}_{self.sample}"

    def _sampled_from(self) -> str:
        return {"seq2seq": "xsum"}.get(self.row.tree) or {"webnlg": "webnlg"}.get(self.row.mode, "e2e")

    def sample_words(self) -> list[str]:
        """The command that samples the low-data set."""
        values = {"of": self._sampled_from(), "sizes": self.row.size, "samples": self.sample}
        values["source"] = self.data_dir() / DRAWN_FROM[self._sampled_from()]
        values["output_dir"] = self.sample_stem().parent.parent
        return ["scripts/prepare_data.py", "lowdata", *as_words(values)]

    def missing(self) -> str | None:
        """A line about the first missing data file or model, with the command that makes it."""
        if self.row.tree == "seq2seq" and self.settings.demo and not (DEMO_DATA / "bart" / "config.json").is_file():
            return f"{DEMO_DATA / 'bart'} is missing: python scripts/build_demo.py bart"
        for split in SPLITS:
            path = data_file(self.row.mode, split, self.data_dir())
            if not path.is_file():
                return f"{path} is missing: python scripts/prepare_data.py {find_task(self.row.mode).prepare}"
        return None

    # ---- state ---------------------------------------------------------------------------------------------------

    def recipe(self) -> dict[str, str]:
        """The two commands without this machine's folders: a result with the same ones is this run's."""
        row, recipe = self.row, {}
        decode = {"checkpoint": "best" if row.best else "last", **row.decode}
        for step, words in (("train", self.train_words()), ("decode", as_words(decode))):
            if "--data_dir" in words:
                del words[words.index("--data_dir") : words.index("--data_dir") + 2]
            line = shlex.join(words)
            for place, name in ((self.sample_stem().parent, "DATA"), (REPOSITORY, ".")):
                line = line.replace(str(place), name)
            recipe[step] = line
        return recipe

    def results(self) -> dict:
        """The content of the run's results.json, {} if there is none. Raises RunFailed for a broken file."""
        return files.todays_results(read_json(self.folder / "results.json"))

    def is_same_recipe(self) -> bool:
        return read_json(self.folder / RECIPE) == self.recipe()

    def scores(self) -> dict[str, float | None] | None:
        """The test scores, or None if there are none yet."""
        test = self.results().get("decoding", {}).get("test")
        return test["scores"] if test else None

    def is_done(self) -> bool:
        return self.is_same_recipe() and (self.scores() is not None or (self.is_trained() and not self.row.decoded))

    def is_trained(self) -> bool:
        return "training" in self.results()

    # ---- running -------------------------------------------------------------------------------------------------

    def steps(self) -> list[list[str]]:
        """All commands of the run, for --dry_run."""
        sample = [self.sample_words()] if self.row.size else []
        decode = [self.decode_words()] if self.row.decoded else []
        return [*sample, [*self.train_words(), "--output_dir", str(self.folder)], *decode]

    def execute(self) -> None:
        """Make the run, or the rest of it. Raises RunFailed with one line, KeyboardInterrupt after a clean stop."""
        reason = self.missing()
        if reason:
            raise RunFailed(reason)
        self.folder.mkdir(parents=True, exist_ok=True)
        with lock(self.folder.parent / f".{self.name}.lock") as handle:
            if any(self.folder.iterdir()) and not self.is_same_recipe():
                aside = set_aside(self.folder)
                print(f"# {self.folder} was made by another recipe: it is kept as {aside.name}", flush=True)
                self.folder.mkdir()
            files.write_json(self.folder / RECIPE, self.recipe())
            if self.row.size and not self.train_file().is_file():
                call(self.sample_words(), handle)
            if not self.is_trained():
                call([*self.train_words(), "--output_dir", str(self.folder), *self._start_flags()], handle)
            if self.row.decoded and self.scores() is None:
                call(self.decode_words(), handle)
            if self.row.decoded and self.scores() is None:
                raise RunFailed(f"{self.folder}/results.json holds no test scores after decoding")
            if not self.settings.keep_weights:
                self._remove_weights()

    def _remove_weights(self) -> None:
        """Keep outputs and measurements; remove checkpoints for resuming, which a trained run no longer needs."""
        for checkpoint in self.folder.glob("checkpoint-*"):
            clear_checkpoint(checkpoint)
        if self.row.decoded:  # else another table may still decode it; prefixes are small and stay
            files.clear_run(self.folder, ("model*.safetensors", "best/model*.safetensors"))

    def train_file(self) -> Path:
        """The low-data set's training file."""
        words = self.train_words()
        return Path(words[words.index("--train_file") + 1])

    def _start_flags(self) -> list[str]:
        """--resume yes if a stopped training left a checkpoint to resume from; else its files are overwritten."""
        checkpoints = "checkpoint-*" if self.row.tree == "gpt2" else "resume.ckpt"
        if any(self.folder.glob(checkpoints)):
            return ["--resume", "yes"]
        left = [path for path in self.folder.iterdir() if path.name != RECIPE]
        return ["--overwrite_output_dir", "yes"] if left else []


def runs_of(experiment: Experiment, row: Row, settings: Settings, label: str, seeds: int, samples: int) -> list[Run]:
    """The row's runs. `label` is the ending of the experiment's folder: GPT-2's size, demo, --max_steps."""
    if row.tree == "seq2seq":
        label = label.replace("_large", "")  # BART-large whatever GPT-2's size
    folder = settings.runs_dir / ((row.home or experiment.name) + label)
    runs = []
    for sample in range(1, samples + 1) if row.size else [0]:
        for seed in range(FIRST_SEED, FIRST_SEED + seeds):
            name = f"{row.key}-d{sample}-s{seed}" if sample else f"{row.key}-s{seed}"
            runs.append(Run(row, folder / name, seed, sample, settings))
    return runs


def call(words: list[str], handle: int | None) -> None:
    """Run a script of this repository as a user would; the user sees its output.

    After Ctrl-C, which the child gets as well, wait for the child, so that it can write its checkpoint.
    """
    print("$ python " + shlex.join(words), flush=True)
    keep = () if handle is None else (handle,)
    child = subprocess.Popen([sys.executable, *words], cwd=REPOSITORY, pass_fds=keep)
    try:
        code = child.wait()
    except KeyboardInterrupt:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=5)  # a terminal's Ctrl-C reaches it as well
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
            try:
                child.wait(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                child.kill()
        raise
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise RunFailed(f"exit code {code} from: python {shlex.join(words)}")


@contextlib.contextmanager
def lock(path: Path) -> Iterator[int | None]:
    """Lock a run for this process and the commands it starts, which keep the lock even if this process is killed."""
    try:
        import fcntl
    except ImportError:  # Windows: without this protection
        yield None
        return
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise RunFailed("another process is making it (a run that was killed may still be training)") from None
        yield handle
    finally:
        os.close(handle)


def set_aside(folder: Path) -> Path:
    """Rename a folder to the first free NAME.before-N."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.before-{number}")).exists():
        number += 1
    folder.rename(aside)
    return aside


def read_json(path: Path) -> dict:
    """A JSON object, {} if there is no file. Raises RunFailed naming a broken file and the remedy."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RunFailed(f"{path} is not JSON ({error}); delete {path.parent} to make the run again") from None
    if not isinstance(found, dict):
        raise RunFailed(f"{path} does not contain a JSON object; delete {path.parent} to make the run again")
    return found
