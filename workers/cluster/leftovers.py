"""Finds what is left of an attempt on this machine, whatever Ray's tables say.

Every process of an attempt has the attempt's name in its environment: Ray passes it from the job to
its workers, and the operating system from them to their children.
"""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import NamedTuple

from kfac_dist.coordination.jobs.runner import AttemptKey, Remnant

MARK = "KFAC_DIST_ATTEMPT"
"""The environment variable with the name of the attempt."""

_SHARED = "/dev/shm/"
_TITLE_LENGTH = 60


class Process(NamedTuple):
    """A running process; `title` is the start of its command line."""

    pid: int
    title: str


def processes_of(attempt: str) -> list[Process]:
    """Return this user's processes that have the attempt's name in their environment."""
    mark = f"{MARK}={attempt}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(Process(int(folder.name), _title(folder)))
            except (FileNotFoundError, PermissionError, ProcessLookupError):
                continue  # it is gone by now, or belongs to another user
    return found


def _title(folder: Path) -> str:
    words = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
    return words.decode(errors="replace").strip()[:_TITLE_LENGTH]


def kill_processes(attempt: str) -> None:
    """Send SIGKILL to all processes of an attempt, but not to this one."""
    for pid, _ in processes_of(attempt):
        # Python's resource tracker of this process ends with it, and is missed if it is gone.
        if pid == _tracker_pid():
            continue
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _tracker_pid() -> int | None:
    tracker = getattr(resource_tracker, "_resource_tracker", None)
    pid: int | None = getattr(tracker, "_pid", None)
    return pid


@contextmanager
def ended_with_block() -> Iterator[str]:
    """Yield a new name for an attempt, and kill its processes after the block.

    If this process belongs to an attempt already, the name is empty: who started the attempt ends
    it.
    """
    attempt = "" if MARK in os.environ else f"train-{secrets.token_hex(8)}"
    try:
        yield attempt
    finally:
        if attempt:
            kill_processes(attempt)


@contextmanager
def marking(attempt: str) -> Iterator[None]:
    """Give the processes that are started inside the block the name of the attempt, if any."""
    if not attempt:
        yield
        return
    os.environ[MARK] = attempt
    try:
        yield
    finally:
        del os.environ[MARK]


def shared_memory_of(attempt: str) -> Iterator[Path]:
    """Yield the named shared-memory segments that the processes of an attempt have mapped."""
    for pid, _ in processes_of(attempt):
        try:
            lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue
        for line in lines:
            _, found, name = line.partition(_SHARED)
            if found and not name.endswith(" (deleted)"):  # freed with its last user
                yield Path(_SHARED + name)


class Traces:
    """What attempts leave on this machine. Noted while their processes live, found when they end.

    Which shared memory an attempt had cannot be found out once its processes are gone.
    """

    def __init__(self) -> None:
        """Begin without any attempt."""
        self._shared_memory: dict[AttemptKey, set[Path]] = {}

    def note(self, key: AttemptKey) -> None:
        """Remember the shared memory that the attempt has now."""
        noted = self._shared_memory.setdefault(key, set())
        noted.update(shared_memory_of(key.submission_id))

    def remains(self, key: AttemptKey) -> Sequence[Remnant]:
        """Return the processes and the shared memory that still exist of an attempt."""
        self.note(key)
        found = [
            Remnant(description=f"process {pid} ({title})")
            for pid, title in processes_of(key.submission_id)
        ]
        left = {path for path in self._shared_memory.pop(key, set()) if path.exists()}
        if left:
            self._shared_memory[key] = left
        found += [Remnant(description=f"shared memory {path}") for path in sorted(left)]
        return found
