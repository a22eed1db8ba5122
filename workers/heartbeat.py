"""What a worker's process is doing, told from a thread of its own while the work continues.

The process answers `pulse` whatever its work does, so silence means that the process itself is
stopped. That its work hangs is seen in the answer: one phase of its *own* work, not of waiting for
others, has lasted too long. The driver judges both (`workers.driver.crew.health`).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

IDLE = "idle"
"""What a process does that waits for a call."""


@dataclass(frozen=True, kw_only=True)
class Pulse:
    """What a process is doing, and for how long.

    Attributes:
        pid: the process.
        doing: the work, and after a colon its phase, such as `step: compute`; IDLE without any.
        step: the step that the work belongs to, 0 outside the steps.
        seconds: since the work last advanced: a phase began or ended, or a wait did.
        waits: it waits for other members, so that its time says nothing about itself.
        preempted: the process has had notice that it will be ended.
    """

    pid: int
    doing: str
    step: int
    seconds: float
    waits: bool
    preempted: bool


class Heartbeat:
    """The doings of this process; every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._work = IDLE
        self._phase = ""
        self._step = 0
        self._waits = False
        self._since = time.monotonic()
        self._preempted = False

    @contextmanager
    def doing(self, work: str, step: int = 0) -> Iterator[None]:
        """Tell that `work` is done inside the block, and hear of its phases and waits."""
        token = _current.set(self)
        self._set(work, "", step)
        try:
            yield
        finally:
            self._set(IDLE, "", 0)
            _current.reset(token)

    def _set(self, work: str, phase: str, step: int) -> None:
        with self._lock:
            self._work, self._phase, self._step = work, phase, step
            self._waits = False
            self._since = time.monotonic()

    def beat(self, phase: str) -> None:
        """Note that the work continues, now with `phase`."""
        with self._lock:
            self._phase = phase
            self._since = time.monotonic()

    def note_step(self, step: int) -> None:
        """Note that the work continues with another step."""
        with self._lock:
            self._step = step
            self._since = time.monotonic()

    def wait(self, waits: bool) -> None:
        """Note that the work begins or ceases to wait for other members."""
        with self._lock:
            self._waits = waits
            self._since = time.monotonic()

    def note_preemption(self) -> None:
        """Note that this process will be ended; for signal handlers, so without the lock."""
        self._preempted = True

    def pulse(self) -> Pulse:
        """Return what the process does now."""
        with self._lock:
            doing = f"{self._work}: {self._phase}" if self._phase else self._work
            return Pulse(
                pid=os.getpid(),
                doing=doing,
                step=self._step,
                seconds=time.monotonic() - self._since,
                waits=self._waits,
                preempted=self._preempted,
            )


# Of the thread that works: tests have several members in the threads of one process.
_current: ContextVar[Heartbeat | None] = ContextVar("heartbeat", default=None)


def beat(phase: str) -> None:
    """Note that the work of this thread continues with `phase`; nothing outside `doing`."""
    if (heartbeat := _current.get()) is not None:
        heartbeat.beat(phase)


def beat_step(step: int) -> None:
    """Note that the work of this thread continues with `step`; nothing outside `doing`."""
    if (heartbeat := _current.get()) is not None:
        heartbeat.note_step(step)


@contextmanager
def waiting() -> Iterator[None]:
    """Note that the work of this thread waits for other members inside the block."""
    heartbeat = _current.get()
    if heartbeat is None:
        yield
        return
    heartbeat.wait(True)
    try:
        yield
    finally:
        heartbeat.wait(False)
