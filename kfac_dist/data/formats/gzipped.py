"""Files that may be gzipped or plain."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from kfac_dist.errors import DataError, DataNotFoundError

_GZIP_MAGIC = b"\x1f\x8b"


def unpack(content: bytes, origin: object) -> bytes:
    """Return `content`, decompressed if it is gzip; `origin` names it in messages.

    Raises DataError if the gzip stream is cut off or damaged.
    """
    if not content.startswith(_GZIP_MAGIC):
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{origin}: a damaged gzip file: {error}") from error


def read_unpacked(path: Path) -> bytes:
    """Return the decompressed content of `path`; DataNotFoundError if it cannot be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataNotFoundError(f"{path}: cannot be read: {error.strerror}") from error
    return unpack(content, path)
