"""What of an attempt is still on this machine, whatever Ray's tables say: processes and memory.

Every process of an attempt has the attempt's name in its environment, which Ray hands down from
the job to its workers, and the operating system to their children.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MARK = "KFAC_DIST_ATTEMPT"
_SHARED = "/dev/shm/"
_TITLE_LENGTH = 60


class Process(NamedTuple):
    """A process that lives; `title` is the beginning of its command line."""

    pid: int
    title: str


def processes_of(attempt: str) -> list[Process]:
    """Return the processes that bear the name of an attempt; those of other users are not seen."""
    mark = f"{MARK}={attempt}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(Process(int(folder.name), _title(folder)))
            except (FileNotFoundError, PermissionError, ProcessLookupError):
                continue  # it has gone meanwhile, or is another user's
    return found


def _title(folder: Path) -> str:
    words = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
    return words.decode(errors="replace").strip()[:_TITLE_LENGTH]


def kill_processes(attempt: str) -> None:
    """End all processes of an attempt at once."""
    for pid, _ in processes_of(attempt):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def shared_memory_of(attempt: str) -> Iterator[Path]:
    """Yield the named segments of shared memory that processes of an attempt use."""
    for pid, _ in processes_of(attempt):
        try:
            lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue
        for line in lines:
            _, found, name = line.partition(_SHARED)
            if found and not name.endswith(" (deleted)"):  # which goes with its last user
                yield Path(_SHARED + name)
