"""Data sets behind a URL: fetched once into a cache of this machine, whatever the processes."""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from kfac_dist.errors import DataNotFoundError, UnreachableError
from kfac_dist.runs.lock import locked
from kfac_dist.runs.transfer.remote import RemoteFile, RemoteFolder

_log = logging.getLogger(__name__)

_LIST = ".fetched.json"  # what the storage said of each file; written last
_CHUNK_BYTES = 2**20


def fetched_folder(url: str, cache_dir: Path) -> Path:
    """Return the folder in which `fetch_folder` puts the files of `url`."""
    digest = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:12]
    name = PurePosixPath(urlsplit(url).path).name or "data"
    return cache_dir / "fetched" / f"{name}-{digest}"


def local_folder(data: Path | str | None, cache_dir: Path) -> Path | None:
    """Return the folder of data sets on this machine; a URL, as a string, is fetched."""
    return fetch_folder(data, cache_dir) if isinstance(data, str) else data


def fetch_folder(url: str, cache_dir: Path) -> Path:
    """Fetch all files of `url`, unless the cache has them as they are there, and return the folder.

    Processes of this machine wait for the one that fetches. Sizes are compared, and hashes where
    the storage has them. If it does not answer, a folder that was fetched before is used.

    Raises:
        DataNotFoundError: there are no files at `url`, or they arrive damaged.
        UnreachableError: the storage does not answer, and the cache has nothing.
        UsageError: the URL is wrong, or the library for its scheme is missing.
    """
    target = fetched_folder(url, cache_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(f"{target.name}.lock")):
        folder = RemoteFolder(url)
        known = _known(target)
        try:
            files = folder.files()
        except UnreachableError as error:
            if known is None:
                raise
            _log.warning("%s; what was fetched before is used: %s", error.message, target)
            return target
        if not files:
            raise DataNotFoundError(f"{url}: there are no files")
        if known != _as_json(files):
            _fetch(folder, files, target)
    return target


def _known(target: Path) -> object:
    path = target / _LIST
    return json.loads(path.read_bytes()) if path.exists() else None


def _as_json(files: Mapping[str, RemoteFile]) -> object:
    return {name: asdict(file) for name, file in files.items()}


def _fetch(folder: RemoteFolder, files: Mapping[str, RemoteFile], target: Path) -> None:
    temporary = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        for name, file in files.items():
            path = temporary / name
            if temporary not in path.parents or ".." in path.parts:
                raise DataNotFoundError(f"{folder.url}: the name {name!r} leads out of the folder")
            path.parent.mkdir(parents=True, exist_ok=True)
            folder.get(name, path)
            _check(folder, name, file, path)
        (temporary / _LIST).write_text(json.dumps(_as_json(files)))
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    except OSError as error:
        raise DataNotFoundError(f"the cache {target.parent} cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check(folder: RemoteFolder, name: str, file: RemoteFile, path: Path) -> None:
    size = path.stat().st_size
    if file.num_bytes is not None and size != file.num_bytes:
        raise DataNotFoundError(
            f"{folder.url}: {name} arrived with {size:,} bytes, and the storage has "
            f"{file.num_bytes:,}"
        )
    if file.md5 is not None and (found := _md5_of(path)) != file.md5:
        raise DataNotFoundError(
            f"{folder.url}: {name} arrived with the MD5 {found}, and the storage says {file.md5}"
        )


def _md5_of(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
