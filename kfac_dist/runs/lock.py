"""One process a folder: a lock that the operating system releases when its holder dies."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kfac_dist.errors import ConflictError

_NAME = ".lock"
_LOOK_SECONDS = 0.1


def holder_of(folder: Path) -> int | None:
    """Return the id of the process that last took the lock; it may have released it since."""
    try:
        return int((folder / _NAME).read_text())
    except (FileNotFoundError, ValueError):
        return None


def is_held(folder: Path) -> bool:
    """Return whether a process holds the lock; it is not taken."""
    try:
        file = (folder / _NAME).open()
    except FileNotFoundError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


class FolderLock:
    """An exclusive lock on a folder, held until `release` or the end of the process."""

    def __init__(self, folder: Path) -> None:
        """Take the lock.

        Raises:
            ConflictError: another process holds it; the message has its process id.
        """
        self._file = (folder / _NAME).open("a+")
        try:
            self._lock_patiently()
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise ConflictError(
                f"{folder}: another process (pid {holder}) is working in this run folder; wait "
                "for it, stop it, or choose another folder with --run-dir"
            ) from error
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def _lock_patiently(self) -> None:
        """Lock the file; a process that only looks whether it is locked (`is_held`) is waited for.

        Raises:
            BlockingIOError: another process holds the lock.
        """
        deadline = time.monotonic() + _LOOK_SECONDS
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_LOOK_SECONDS / 10)
            else:
                return

    def release(self) -> None:
        """Release the lock; may be called more than once."""
        self._file.close()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of the file `path` inside the block; wait for the process that has it."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
