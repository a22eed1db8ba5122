"""One process a folder: a lock that the operating system releases when its holder dies."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from kfac_dist.errors import ConflictError

_NAME = ".lock"


def holder_of(folder: Path) -> int | None:
    """Return the id of the process that last took the lock; it may have released it since."""
    try:
        return int((folder / _NAME).read_text())
    except (FileNotFoundError, ValueError):
        return None


class FolderLock:
    """An exclusive lock on a folder, held until `release` or the end of the process."""

    def __init__(self, folder: Path) -> None:
        """Take the lock.

        Raises:
            ConflictError: another process holds it; the message has its process id.
        """
        self._file = (folder / _NAME).open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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

    def release(self) -> None:
        """Release the lock; may be called more than once."""
        self._file.close()
