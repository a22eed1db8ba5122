"""The processes that are Ray itself: dead ones, and stopped ones, which is worse.

Training needs neither the GCS nor the raylet for a while, so that one of them is stopped (SIGSTOP)
shows only when something waits for its answer, for ever and deaf to signals. Only those of a
cluster that this process has started can be seen.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

from workers.cluster.ray_internals import dead_daemons, live_daemons

_LOOK_SECONDS = 1.0
_STOPPED = "T"  # the letter in /proc, which names it after the trace that stops a process, too


class LostDaemon(NamedTuple):
    """A daemon without which the job cannot continue, and what happened to it."""

    name: str
    fate: Literal["died", "was stopped"]


class DaemonWatch:
    """Looks from time to time at the daemons; one that is stopped for `stall_seconds` is lost."""

    def __init__(self, stall_seconds: float) -> None:
        self._stall_seconds = stall_seconds
        self._looked_seconds = 0.0
        self._stopped_since: dict[int, float] = {}

    def lost(self) -> LostDaemon | None:
        """Return a daemon that is lost, if there is one."""
        if dead := dead_daemons():
            return LostDaemon(dead[0], "died")
        now = time.monotonic()
        if now - self._looked_seconds < _LOOK_SECONDS:
            return None
        self._looked_seconds = now
        stopped = stopped_daemons()
        self._stopped_since = {pid: self._stopped_since.get(pid, now) for pid in stopped}
        for pid, since in self._stopped_since.items():
            if now - since > self._stall_seconds:
                return LostDaemon(stopped[pid], "was stopped")
        return None


def stopped_daemons() -> dict[int, str]:
    """Return the daemons that are stopped, by process id."""
    return {pid: name for pid, name in live_daemons().items() if _state(pid) == _STOPPED}


def _state(pid: int) -> str:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # it has ended
        return ""
    return stat.rpartition(")")[2].split()[0]  # the name before may contain anything


@contextmanager
def daemons_awake() -> Iterator[None]:
    """Let stopped daemons run inside the block, in which they are asked to end."""
    over = threading.Event()

    def wake() -> None:
        while True:
            for pid in stopped_daemons():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            if over.wait(_LOOK_SECONDS):
                return

    thread = threading.Thread(target=wake, name="daemons-awake", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
