"""A folder behind a URL, through fsspec: file, memory, s3, gs, http and many more.

fsspec is imported when a folder is first used. Credentials come from where the library of the
storage looks for them, such as `AWS_ACCESS_KEY_ID` or `FSSPEC_S3_ENDPOINT_URL`.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kfac_dist.config.urls import url_problem, without_secrets
from kfac_dist.errors import NotFoundError, UnreachableError, UsageError

# Here a file appears when it is whole, and there are no folders that must be made first.
# Elsewhere, a file is written under another name and renamed.
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "memory"})
_TEMPORARY = ".part-"
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file by its size and, where the storage tells, what changes with its content.

    `md5` is in hexadecimal digits.
    """

    num_bytes: int | None
    etag: str | None
    md5: str | None


class RemoteFolder:
    """The folder at `url`; names are relative to it, with slashes.

    All methods raise UnreachableError if the storage does not answer or refuses, and UsageError if
    there is no library for the scheme of the URL.
    """

    def __init__(self, url: str) -> None:
        if (problem := url_problem(url)) is not None:
            raise UsageError(problem)
        self.url = url.rstrip("/")

    def below(self, name: str) -> RemoteFolder:
        """Return a folder in this one."""
        return RemoteFolder(f"{self.url}/{name}")

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        with self._reached("open it"):
            import fsspec

            system, path = fsspec.core.url_to_fs(self.url)
        return system, path.rstrip("/")

    @property
    def _is_object_store(self) -> bool:
        return self.url.partition("://")[0].lower() in _OBJECT_STORES

    def files(self) -> dict[str, RemoteFile]:
        """Return all files below the folder, sorted by name; empty if it does not exist.

        A URL may also be that of one file, which then is all that the folder has.
        """
        system, path = self._opened
        with self._reached("list its files"):
            system.invalidate_cache()
            try:
                found: Mapping[str, Any] = system.find(path, detail=True)
            except FileNotFoundError:
                return {}
            return dict(sorted(_named(path, found)))

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, None if it does not exist."""
        system, path = self._opened
        with self._reached(f"read {name}"):
            system.invalidate_cache()
            try:
                content: bytes = system.cat_file(f"{path}/{name}")
            except FileNotFoundError:
                return None
        return content

    def get(self, name: str, target: Path) -> None:
        """Write a file to `target`, whose folder exists.

        Raises:
            NotFoundError: the storage has no such file.
        """
        system, path = self._opened
        # The folder may be one file, see `files`.
        whole = path if path.endswith(f"/{name}") and not system.isdir(path) else f"{path}/{name}"
        with self._reached(f"fetch {name}"):
            try:
                system.get_file(whole, str(target))
            except FileNotFoundError as error:
                raise NotFoundError(f"{self.url}: has no file {name}") from error

    def put(self, source: Path, name: str) -> None:
        """Write the file `source`; others see the old one or the new one whole.

        Raises:
            FileNotFoundError: there is no `source`.
        """
        system, path = self._opened
        size = source.stat().st_size
        whole = f"{path}/{name}"
        with self._reached(f"write {name} ({size:,} bytes)"):
            if self._is_object_store:
                system.put_file(str(source), whole)
                return
            temporary = f"{whole}{_TEMPORARY}{secrets.token_hex(4)}"
            system.makedirs(whole.rpartition("/")[0], exist_ok=True)
            system.put_file(str(source), temporary)
            system.mv(temporary, whole)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it; nothing if it does not exist."""
        system, path = self._opened
        with self._reached(f"remove {name}"):
            system.invalidate_cache()
            if system.exists(f"{path}/{name}"):
                system.rm(f"{path}/{name}", recursive=True)

    @contextmanager
    def _reached(self, doing: str) -> Iterator[None]:
        scheme = self.url.partition("://")[0]
        try:
            yield
        except NotFoundError:
            raise
        except (ImportError, ValueError) as error:
            extra = _EXTRAS.get(scheme)
            help_ = f"; pip install 'kfac-dist[{extra}]'" if extra else ""
            raise UsageError(f"{self.url}: {_in_words(error)}{help_}") from error
        except Exception as error:  # the libraries of storages have no error in common
            raise UnreachableError(f"{self.url}: cannot {doing}: {_in_words(error)}") from error


def _named(path: str, found: Mapping[str, Any]) -> Iterator[tuple[str, RemoteFile]]:
    for full, info in found.items():
        name = full[len(path) + 1 :] if full != path else path.rpartition("/")[2]
        if info.get("type") == "file" and _TEMPORARY not in name:
            etag = info.get("ETag") or info.get("etag")
            yield name, RemoteFile(num_bytes=info.get("size"), etag=etag, md5=_md5(info, etag))


def _md5(info: Mapping[str, Any], etag: str | None) -> str | None:
    """Return the MD5 of a file where the storage has it; of one uploaded in parts S3 has none."""
    if encoded := info.get("md5Hash"):  # of Google's storage
        import base64

        return base64.b64decode(encoded).hex()
    digits = (etag or "").strip('"')
    is_md5 = len(digits) == 32 and all(digit in "0123456789abcdef" for digit in digits)
    return digits if is_md5 else None


def _in_words(error: BaseException) -> str:
    text = " ".join(without_secrets(str(error)).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
