"""METEOR's paraphrase table as a memory-mapped index: built once from the package's file, then opened at once.

The table holds five million pairs of phrases in a gzip file that can only be read from its beginning to its end, which
takes longer than scoring. The index is stored in $XDG_CACHE_HOME/prefix-tuning (default ~/.cache/prefix-tuning) and
needs about twice the table's space. If that folder cannot be written, the index stays in memory.
"""

import gzip
import hashlib
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixlib.metrics.base import SECONDS_BEFORE_BAR
from prefixlib.system import cache

logger = logging.getLogger(__name__)

FORMAT = 1  # of the index: each format has its own folder
PAIRS_PER_UPDATE = 50_000  # of the progress bar
ARRAYS = ("hashes", "spans", "text")


def index_folder(table: Path) -> Path:
    """The folder of this table's index, named after the size and checksum at the end of the gzip file."""
    with open(table, "rb") as file:
        file.seek(-8, os.SEEK_END)
        checksum = file.read().hex()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "prefix-tuning" / f"meteor-paraphrases-{FORMAT}-{checksum}"


@dataclass(frozen=True)
class Paraphrases:
    """Phrases and their paraphrases, looked up by hash.

    hashes: (G,) uint64, sorted, one for each group of pairs that share their first phrase.
    spans: (G, 2) int64, beginning and end of the group's lines in `text`.
    text: (bytes,) uint8, per group its phrase and the paraphrases, a line each.
    """

    hashes: Any
    spans: Any
    text: Any

    def among(self, phrases: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], list[tuple[str, ...]]]:
        """The pairs of these phrases that are paraphrases of each other, in the table's order."""
        import numpy as np

        by_key = {" ".join(phrase).encode(): phrase for phrase in phrases}
        wanted = np.array([_hash(key) for key in by_key], dtype=np.uint64)
        first, last = (np.searchsorted(self.hashes, wanted, side) for side in ("left", "right"))
        found = {}
        keys = list(by_key)
        for n in np.flatnonzero(last > first).tolist():
            for begin, end in self.spans[first[n] : last[n]].tolist():
                phrase, *others = self.text[begin:end].tobytes().split(b"\n")[:-1]
                others = [by_key[other] for other in others if other in by_key]
                if others and phrase == keys[n]:  # else another phrase has the same hash
                    found.setdefault(by_key[phrase], []).extend(others)
        return found


def _hash(phrase: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(phrase, digest_size=8).digest(), "little")


def open_paraphrases(table: Path) -> Paraphrases:
    """The index of the table (a .gz file of three lines a pair: probability, phrase, paraphrase), built if needed."""
    folder = index_folder(table)
    wrong = cache.damage(folder)
    if wrong:
        if folder.is_dir():
            logger.warning("%s is damaged (%s): METEOR's tables are read anew", folder, wrong)
        arrays = _build(table)
        try:
            cache.keep(folder, lambda made: _write_index(made, arrays))
        except OSError as error:
            logger.warning("%s cannot be written (%s): METEOR's tables will be read anew next time", folder, error)
            return Paraphrases(**arrays)
    return _open_index(folder)


def _open_index(folder: Path) -> Paraphrases:
    import numpy as np

    return Paraphrases(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS))


def _write_index(folder: Path, arrays: dict[str, Any]) -> None:
    import numpy as np

    for name in ARRAYS:
        np.save(folder / f"{name}.npy", arrays[name])


def _build(table: Path) -> dict[str, Any]:
    """Read the whole table into the arrays of Paraphrases."""
    import numpy as np
    from tqdm import tqdm

    hashes, starts, text = [], [], bytearray()
    previous = None  # pairs with the same first phrase are adjacent
    bar = tqdm(
        total=table.stat().st_size, desc="METEOR's tables (kept for the next time)", unit="B", unit_scale=True,
        leave=False, delay=SECONDS_BEFORE_BAR, dynamic_ncols=True,
    )  # fmt: skip
    with bar, open(table, "rb") as raw, gzip.open(raw) as lines:
        for count, (_probability, phrase, paraphrase) in enumerate(zip(lines, lines, lines, strict=True)):
            if phrase != previous:
                previous = phrase
                hashes.append(_hash(phrase.rstrip(b"\n")))
                starts.append(len(text))
                text += phrase
            text += paraphrase
            if count % PAIRS_PER_UPDATE == 0:
                bar.update(raw.tell() - bar.n)
    keys = np.array(hashes, dtype=np.uint64)
    spans = np.array([starts, [*starts[1:], len(text)]], dtype=np.int64).T
    order = np.argsort(keys, kind="stable")  # stable: groups of the same phrase stay in the table's order
    return {"hashes": keys[order], "spans": spans[order], "text": np.frombuffer(text, dtype=np.uint8)}
