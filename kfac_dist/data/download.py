"""Download a file into the cache: it is checked first, then moved into place."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

from kfac_dist.errors import DataError, DataNotFoundError

_SILENCE_SECONDS = 20.0  # a mirror that sends nothing for this long is given up
_MAX_BYTES = 512 * 1024 * 1024  # several times the largest file; stops an endless answer


def download(urls: Iterable[str], target: Path, check: Callable[[bytes, str], None]) -> None:
    """Write the content of the first of `urls` that answers correctly to `target`.

    `check(content, url)` raises DataError if the content is wrong; then the next address is tried.
    Other processes see the whole file or none. Raises DataNotFoundError with the problem of each
    address, or that of the cache folder.
    """
    problems: list[str] = []
    for url in urls:
        try:
            content = _get(url)
            check(content, url)
        except (OSError, HTTPException) as error:
            problems.append(f"{url}: {error}")
        except DataError as error:
            problems.append(error.message)
        else:
            _put(content, target)
            return
    raise DataNotFoundError("; ".join(problems) or "no address to download from")


def _get(url: str) -> bytes:
    with urlopen(url, timeout=_SILENCE_SECONDS) as response:
        content: bytes = response.read(_MAX_BYTES + 1)
        announced = response.headers["Content-Length"]
    if len(content) > _MAX_BYTES:
        raise DataError(f"{url}: the answer has more than {_MAX_BYTES} bytes")
    # A sized read does not notice by itself that the connection closed early.
    if announced is not None and len(content) != int(announced):
        raise DataError(f"{url}: cut off after {len(content)} of {announced} bytes")
    return content


def _put(content: bytes, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
    except OSError as error:
        raise _cannot_write(target, error) from error
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        raise _cannot_write(target, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _cannot_write(target: Path, error: OSError) -> DataNotFoundError:
    return DataNotFoundError(f"the cache {target.parent} cannot be written: {error.strerror}")
