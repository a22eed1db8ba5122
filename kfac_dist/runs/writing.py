"""Writing small text files: whole or not at all, and readable by their user alone."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old content or the new, never half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_secret(path: Path, secret: str) -> Path:
    """Write a file that only its user can read, at no moment anyone else, and return its path."""
    path.unlink(missing_ok=True)  # a file that exists would keep its mode
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secret)
    return path
