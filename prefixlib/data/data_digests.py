"""The data of a run: size and hash of each file, stored in its checkpoints and compared when it is resumed.

    entries = digests("webnlg", {"train": Path("train.json"), "valid": Path("dev.json")})

(Standard library only; datasets is imported where a data set of the hub is read.)
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from prefixlib.data import formats
from prefixlib.system.errors import UserError

logger = logging.getLogger(__name__)

DATA, EARLIER = "data", "earlier_data"  # in a checkpoint: the present data; the earlier data of the training


class Digest(TypedDict):
    """One file, saved data set or data set of the hub."""

    file: str  # its name without the folder
    bytes: int | None  # None on the hub
    sha256: str  # on the hub, the fingerprint that `datasets` gives


Digests = dict[str, list[Digest]]  # split (`train`, `valid`, ...) -> its data


class EarlierData(TypedDict):
    """Data that a run was trained on up to a step."""

    last_step: int
    data: Digests


def digests(paths: Mapping[str, Path]) -> Digests:
    """Digests of each split's data: a file (with `X.source` also `X.target`), a saved data set or one of the hub."""
    return {split: [_digest(part) for part in _parts(path)] for split, path in paths.items()}


def _parts(path: Path) -> list[Path]:
    target = path.with_name(f"{path.name.removesuffix('source')}target")
    return [path, target] if path.name.endswith("source") and target.is_file() else [path]


def _digest(path: Path) -> Digest:
    if not path.exists() and not formats.is_hub(path):
        raise UserError(f"{path}: no such file")
    if formats.is_hub(path):
        return {"file": str(path), "bytes": None, "sha256": formats.hub_fingerprint(path)}
    files = sorted(path.glob("*.arrow")) if path.is_dir() else [path]
    whole = hashlib.sha256()
    for file in files:
        with open(file, "rb") as handle:
            while chunk := handle.read(1 << 20):
                whole.update(chunk)
    return {"file": path.name, "bytes": sum(file.stat().st_size for file in files), "sha256": whole.hexdigest()}


def of_run(paths: Mapping[str, Path]) -> dict[str, Any]:
    """The record of the data in a new run's checkpoints; `paths`: split -> its data."""
    return {DATA: digests(paths)}


def of_resumed(
    paths: Mapping[str, Path], saved: Mapping[str, Any], step: int, where: Path, allow_other: bool
) -> dict[str, Any]:
    """The record of the data in a resumed run's checkpoints: DATA, and EARLIER if it had other data before.

    saved: the content of the checkpoint `where`, of `step`; without a record of the data, as in earlier versions,
    nothing is compared. Raises UserError if the data differ, unless `allow_other`.
    """
    now = digests(paths)
    if DATA not in saved:
        return {DATA: now}
    earlier, changed = list(saved.get(EARLIER, ())), difference(saved[DATA], now, paths)
    if changed and not allow_other:
        raise UserError(
            f"--resume yes: {changed} in {where}: put the earlier data back, or --allow_other_data yes continues with "
            "these"
        )
    if changed:
        logger.warning("%s in %s: training continues with the present data, and the checkpoint says so", changed, where)
        earlier.append({"last_step": step, DATA: saved[DATA]})
    return {DATA: now, **({EARLIER: earlier} if earlier else {})}


def difference(before: Digests, now: Digests, paths: Mapping[str, Path]) -> str | None:
    """The first file that has changed, in words with both sizes and digests; None if all are the same."""
    for split in sorted(before.keys() | now.keys()):
        old, new = before.get(split, []), now.get(split, [])
        for number in range(max(len(old), len(new))):
            one, other = (_at(files, number) for files in (old, new))
            if one is None or other is None or (one["bytes"], one["sha256"]) != (other["bytes"], other["sha256"]):
                place = paths[split].with_name(other["file"]) if other and other["bytes"] is not None else split
                return f"{place} is {_shown(other)}, and the run was trained on {_shown(one)}"
    return None


def _at(files: Sequence[Digest], number: int) -> Digest | None:
    return files[number] if number < len(files) else None


def _shown(digest: Digest | None) -> str:
    if digest is None:
        return "no file"
    if digest["bytes"] is None:
        return f"{digest['file']} with the fingerprint {digest['sha256'][:16]}"
    return f"{digest['file']} of {digest['bytes']:,} bytes (SHA-256 {digest['sha256'][:12]}…)"


def check_steps_left(done: int, planned: int, where: Path) -> None:
    """Raise UserError if a resumed run has no step left with these data; `planned`: its steps in all."""
    if planned <= done:
        raise UserError(
            f"--resume yes: {where} is at step {done}, and with these data the run has {planned} steps in all, so "
            "nothing would be trained: a larger --epoch or --max_steps prolongs it"
        )
