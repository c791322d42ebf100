"""Sources of data sets: plain downloads, archives, the Hugging Face hub. Used by scripts/prepare_data.py."""

import http.client
import json
import os
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from prefixlib.system.errors import UserError

TIMEOUT = 15  # seconds without an answer before a source counts as unreachable
BY_HAND = "get it on another machine and pass its folder with --source"

Fetcher = Callable[[Path], Path]  # downloads into an empty folder; returns the folder to look for files in


def download(url: str, path: Path) -> Path:
    """Fetch url into path with a progress bar; raises UserError with the url and --source if it fails."""
    request = urllib.request.Request(url, headers={"User-Agent": "prefix-tuning"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, open(path, "wb") as file:
            size = int(answer.headers.get("Content-Length") or 0)
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
                while block := answer.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        raise UserError(f"{url}: not reachable ({getattr(error, 'reason', error)}); {BY_HAND}") from None
    if size and path.stat().st_size != size:
        raise UserError(f"{url}: only {path.stat().st_size:,} of {size:,} bytes came; try again, or {BY_HAND}")
    return path


def from_files(base: str, *names: str) -> Fetcher:
    """Single files of one public folder."""

    def fetch(folder: Path) -> Path:
        for name in names:
            download(base + name, folder / name)
        return folder

    return fetch


def from_archive(url: str) -> Fetcher:
    """A public archive."""
    return lambda folder: unpack(download(url, folder / "archive"), folder / "unpacked")


def from_hub(hub_id: str, *config: str) -> Fetcher:
    """A Hugging Face data set, written to {train,validation,test}.jsonl; a cached copy needs no network."""

    def fetch(folder: Path) -> Path:
        url = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/datasets/{hub_id}"
        reason = None
        try:
            urllib.request.urlopen(url, timeout=TIMEOUT).close()
        except urllib.error.HTTPError:
            pass  # any answer will do, even a refusal: the library has its own addresses and login
        except OSError as error:
            reason = getattr(error, "reason", error)
            os.environ["HF_HUB_OFFLINE"] = "1"  # look in the cache only, instead of trying again for minutes
        import datasets  # here, because it takes seconds and reads HF_HUB_OFFLINE when it is imported

        try:
            splits = datasets.load_dataset(hub_id, *config)
        except (OSError, ValueError, RuntimeError) as error:
            reason = reason or str(error).splitlines()[0]
            raise UserError(f"{url}: not reachable, and not in the local cache ({reason}); {BY_HAND}") from None
        for name, rows in splits.items():
            with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
                for row in tqdm(rows, desc=name, unit=" documents", disable=None):
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return folder

    return fetch


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack a .zip or .tar(.gz) into folder; no member lands outside it. raises UserError for any other file."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as members:
                members.extractall(folder)
        else:
            with tarfile.open(archive) as members:
                members.extractall(folder, filter="data")
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{archive}: neither a .zip nor a .tar.gz archive, or a damaged one ({reason})") from None
    return folder
