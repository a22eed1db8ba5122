"""Writing small text files: whole or not at all, and readable by their user alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kfac_dist.errors import JobFailedError


@contextmanager
def record_of_run(path: Path) -> Iterator[None]:
    """Turn what the file system refuses inside the block into a failure of the job.

    Raises:
        JobFailedError: the record at `path` could not be read or written; the run folder may have
            been removed or unmounted.
    """
    try:
        yield
    except OSError as error:
        raise unwritten(path, error.strerror or type(error).__name__) from error


def unwritten(path: Path, why: str) -> JobFailedError:
    """Return the error of a job that cannot write its record at `path`."""
    if not path.parent.is_dir():
        return JobFailedError(
            f"{path.parent}: the run folder was removed, moved or unmounted while the job ran, so "
            f"{path.name} cannot be written",
            reason="run_folder_lost",
        )
    return JobFailedError(f"{path}: cannot be written: {why}", reason="run_folder_not_written")


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
