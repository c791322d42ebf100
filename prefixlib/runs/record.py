"""Seed, versions, memory and timings of a run, its results.json, and its curves as PNG.

results.json, the same in both trees:
run        the command, the settings under their flags' names, base model, device, versions
training   see `training_results`
decoding   split -> data_file, sentences, sources_cut, seconds, scores, and how it was decoded
"""

import contextlib
import functools
import importlib
import importlib.util
import itertools
import logging
import os
import platform
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict

import numpy
import torch
from transformers import logging as transformers_logging

from prefixlib.system import files, places, processes, schema
from prefixlib.system.errors import UserError, first_line

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "accelerate", "lightning", "datasets", "safetensors", "sacrebleu", "rouge-score")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (every device)."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def check_machine(fp16: bool = False, bf16: bool = False) -> None:
    """Raise UserError if the machine lacks what the flags ask for.

    float16 needs a GPU, and each process its own GPU. Warns if bfloat16 would be computed without its instructions.
    """
    gpus, local = torch.cuda.device_count(), processes.local_world_size()
    if fp16 and not gpus:
        raise UserError("--fp16 yes needs a GPU and there is none here: use --bf16 yes, or neither")
    if bf16 and not has_fast_bfloat16():
        logger.warning(
            "--bf16 yes: this processor has no instructions for bfloat16, so matrix products can take 100 times "
            "as long as without --bf16"
        )
    if 0 < gpus < local:
        raise UserError(f"--num_processes {local}: this machine has {gpus} GPU(s), and every process needs its own")


def has_fast_bfloat16() -> bool:
    """Whether bfloat16 is fast here: on a GPU, or where oneDNN multiplies it, which needs AVX-512 on x86."""
    on_cpu = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.cuda.is_available() or on_cpu


def set_up_logging(verbose: bool = True) -> None:
    """Log with the time on stderr, for entry points; libraries' messages below WARNING are dropped."""
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr, level=logging.WARNING
    )
    for name in ("gpt2", "seq2seq", "prefixlib", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.WARNING)
    # its bars for reading and writing weights hide the one line of an error and say nothing that a user needs
    transformers_logging.disable_progress_bar()


def versions() -> dict[str, str]:
    """Versions of Python, of the packages that affect the results, and of this code."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if not places.CHECKOUT:  # a repository around an installed package is not this code's
        return found
    describe = ["git", "-C", str(places.REPOSITORY), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(describe, capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        return found
    if commit.returncode == 0:
        found["commit"] = commit.stdout.strip()
    return found


def device_name() -> str:
    """The accelerator's name, or the processor's kind and torch's thread count."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


def peak_memory_bytes() -> dict[str, int]:
    """Peak memory of this process so far, in bytes: resident on the host (POSIX only), allocated on the GPU if any."""
    peak = {}
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count the process that started this one as well
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        peak["host"] = int(line.split()[1]) * 1024
    elif os.name == "posix":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
        peak["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.cuda.is_available():
        peak["gpu"] = torch.cuda.max_memory_allocated()
    return peak


def set_up_reporting(report_to: str) -> None:
    """Get --report_to's service ready before the work begins, with a project for the runs of this package.

    Raises UserError if its package is not installed, or it does not answer.
    """
    if report_to not in ("wandb", "mlflow"):
        return
    if importlib.util.find_spec(report_to) is None:
        raise UserError(f"--report_to {report_to} needs a package: pip install {report_to}")
    for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        os.environ.setdefault(name, "prefix-tuning")
    if not processes.is_first():
        return
    try:
        service = importlib.import_module(report_to)
        if report_to == "wandb":
            service.login()
        else:
            service.search_experiments(max_results=1)
    except Exception as error:  # each service has exceptions of its own
        raise UserError(f"--report_to {report_to}: {first_line(error)}") from error


@contextlib.contextmanager
def noting(what: str) -> Iterator[None]:
    """While open, turn a failure into a warning: what only records a run must not end it."""
    try:
        yield
    except Exception as error:  # TensorBoard, matplotlib and the services have exceptions of their own
        logger.warning("%s could not be written (%s): the run continues without", what, first_line(error))


def guarded(kind: type, methods: Sequence[str]) -> type:
    """A subclass of a recorder (a callback or a logger) that stops recording, with a warning, at its first failure."""

    def wrap(work: Callable) -> Callable:
        @functools.wraps(work)
        def call(self, *arguments, **named):
            if self.__dict__.get("has_failed"):
                return None
            try:
                return work(self, *arguments, **named)
            except Exception as error:  # each service has exceptions of its own
                self.has_failed = True
                said = first_line(error.__cause__ or error)  # Lightning's own words are about a wrong value
                logger.warning("the curves (--report_to) end here (%s): the run continues", said)
                return None

        return call

    return type(kind.__name__, (kind,), {name: wrap(getattr(kind, name)) for name in methods})


def quiet_event_writers() -> None:
    """Let TensorBoard's threads, whose errors reach the caller anyway, print no traceback."""
    hook = threading.excepthook
    if getattr(hook, "quiet", False):
        return

    def call(failure: Any) -> None:
        if type(failure.thread).__module__.partition(".")[0] != "tensorboard":
            hook(failure)

    call.quiet = True
    threading.excepthook = call


def write_settings(directory: Path, settings: Mapping[str, Any]) -> None:
    """Write `settings` into directory/settings.json, which --config takes. The first process of a run does it."""
    if not processes.is_first():
        return
    with noting("settings.json"):
        files.write_json(directory / "settings.json", settings)


def log_start(
    base: str,
    tuning_mode: str,
    parameters: Mapping[str, int | None],
    texts: Mapping[str, Sequence[Any]],
    *,
    size: int,
    steps: int,
    batch: int,
    output: Path,
) -> None:
    """Log what will be trained. parameters: as in `training_results`; size: number of the base model's parameters."""
    trained, stored = parameters["trainable"], parameters["stored"]
    _log_block(
        "training",
        {
            "model": f"{base}, {size:,} parameters",
            "trained": f"{tuning_mode}: {trained:,} parameters ({100 * trained / size:.2f} % of the base model)",
            "stored": f"{stored:,} parameters, for decoding",
            "texts": ", ".join(f"{len(found):,} {split}" for split, found in texts.items()),
            "steps": f"{steps:,}, each of {batch} texts",
            "device": device_name(),
            "output": output,
        },
    )


def log_end(training: Mapping[str, Any], output: Path, decode: str = "") -> None:
    """Log what was trained: the `training` entry of results.json, the folder, and the command that decodes, if any."""
    dev = training["curves"]["dev"]
    step, lowest = min(dev, key=lambda point: point[1]) if dev else (None, None)
    loss = f", dev loss {dev[-1][1]:.4g} (lowest: {lowest:.4g}, step {step})" if dev else ""
    rows = {"steps": f"{training['steps']:,} in {training['seconds']:.0f} s{loss}", "output": output}
    if best := training.get("best"):
        figures = "  ".join(f"{name} {value:.4g}" for name, value in best.items() if name != "step")
        rows["best"] = f"step {best['step']}, which is decoded: {figures}"
    _log_block("trained", rows | ({"decode": decode} if decode else {}))


def _log_block(title: str, rows: Mapping[str, Any]) -> None:
    logger.info("%s", title)
    for name, value in rows.items():
        logger.info("  %-8s %s", name, value)


def training_results(
    *,
    seconds: float,
    steps: int,
    examples: int,
    curves: Mapping[str, Sequence[tuple[int, float]]],
    parameters: Mapping[str, int | None],
    **more: Any,
) -> dict[str, Any]:
    """The `training` entry of results.json.

    curves: "train" and "dev" -> (step, loss). parameters: numbers of parameters: "trainable"; "base", the base model of
    a prefix, or None; "stored", those of the checkpoint that decoding needs.
    """
    train, dev = curves["train"], curves["dev"]
    return {
        "seconds": round(seconds, 2),
        "steps": steps,
        "examples": examples,
        "dev_loss": dev[-1][1] if dev else None,
        "first_train_loss": train[0][1] if train else None,
        "last_train_loss": train[-1][1] if train else None,
        **{f"{kind}_parameters": count for kind, count in parameters.items()},
        "peak_memory_bytes": peak_memory_bytes(),
        **more,
        "curves": {name: list(points) for name, points in curves.items()},
    }


class Training(TypedDict, total=False):
    """The values that are read back from the `training` entry of results.json."""

    curves: dict[str, list[list[Any]]]
    last: dict[str, Any]
    best: dict[str, Any]


class Results(TypedDict, total=False):
    """The parts of results.json that are merged or read back; `settings` and later keys are earlier versions'."""

    run: dict[str, Any]
    training: Training
    decoding: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    versions: dict[str, Any]
    train: Training
    test: dict[str, Any]


def read_results(directory: Path | str) -> dict[str, Any]:
    """The content of directory/results.json, {} if there is none; earlier versions' keys get today's names.

    Raises UserError for a file that is damaged or of another shape.
    """
    path = Path(directory) / "results.json"
    return files.todays_results(schema.read(path, Results, "move it away")) if path.exists() else {}


def set_aside_damaged(directory: Path | str) -> None:
    """Rename a results.json that cannot be merged into, with a warning: before the work, not after it."""
    if not processes.is_first():
        return
    try:
        read_results(directory)
    except (UserError, IsADirectoryError) as error:
        path = Path(directory) / "results.json"
        free = (path.with_name(f"results.damaged-{number}.json") for number in itertools.count(1))
        aside = next(name for name in free if not name.exists())
        path.rename(aside)
        logger.warning("%s: it is kept as %s", error, aside.name)


def update_results(directory: Path | str, entries: Mapping[str, Any]) -> Path:
    """Merge `entries` into directory/results.json (top-level keys are replaced, by None removed); returns its path."""
    path = Path(directory) / "results.json"
    set_aside_damaged(directory)
    merged = {**read_results(directory), **entries}
    files.write_json(path, {name: value for name, value in merged.items() if value is not None})
    return path


def plot_curves(
    path: Path | str, curves: Mapping[str, Sequence[tuple[float, float]]], *, xlabel: str, ylabel: str, title: str
) -> None:
    """Draw one line per curve, each a sequence of (x, y), into a PNG. If that fails, warn."""
    with noting(Path(path).name):
        _plot(path, curves, xlabel, ylabel, title)


def _plot(
    path: Path | str, curves: Mapping[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str, title: str
) -> None:
    import matplotlib  # here, not at the top: a run without a plot starts faster

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), dpi=120)
    for label, points in curves.items():
        if points:
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, marker="o" if len(points) <= 20 else None, markersize=3, label=label)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    with files.replacing(path) as partial:
        figure.savefig(partial, format="png")
    pyplot.close(figure)


def record_split(directory: Path, split: str, entry: Mapping[str, Any]) -> None:
    """Put a split's entry into results.json; those of other splits stay."""
    known = read_results(directory).get("decoding", {})
    update_results(directory, {"decoding": {**known, split: entry}})
