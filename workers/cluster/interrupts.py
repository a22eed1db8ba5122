"""Signals during a job: the current step may still finish and be in a checkpoint."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Literal, Self

_ALWAYS = (signal.SIGINT, signal.SIGTERM)
_UNLESS_IGNORED = (signal.SIGHUP, signal.SIGQUIT)

Ending = Literal["CANCELLED", "PAUSED"]


def ending_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that end a job.

    `nohup` ignores SIGHUP, and a shell's `&` may ignore SIGQUIT; a job then ignores them as well.
    """
    wanted = (s for s in _UNLESS_IGNORED if signal.getsignal(s) is not signal.SIG_IGN)
    return (*_ALWAYS, *wanted)


@contextmanager
def deferred() -> Iterator[None]:
    """Delay signals that arrive inside the block until its end; for short blocks.

    Does nothing outside the main thread, where signals do not arrive.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _frame: arrived.append(number))
        for number in ending_signals()
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for late in dict.fromkeys(arrived):
        signal.raise_signal(late)


class Interrupts:
    """Turns signals and requests into a KeyboardInterrupt at a moment that suits the job.

    The first interrupt raises at the next `check` after a grace period of `grace_seconds`; a
    second signal raises at once. Outside the main thread signals do not arrive, and only
    `request` interrupts. `ends_as` is the state in which an interrupted run ends.
    """

    def __init__(self) -> None:
        self.grace_seconds = 0.0
        self.ends_as: Ending = "CANCELLED"
        self._patience_seconds = 0.0
        self._requested_at: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            handler: Callable[[int, FrameType | None], None] = self._note
            self._before = {number: signal.signal(number, handler) for number in ending_signals()}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._requested_at is not None:
            raise KeyboardInterrupt
        self._requested_at = time.monotonic()

    def request(self, ends_as: Ending, patience_seconds: float = 0.0) -> None:
        """Interrupt from any thread.

        `patience_seconds` lengthens the grace period, but does not start one.
        """
        self.ends_as = ends_as
        self._patience_seconds = patience_seconds
        self._requested_at = time.monotonic()

    @property
    def requested(self) -> bool:
        """Whether an interrupt has arrived."""
        return self._requested_at is not None

    def check(self) -> None:
        """Raise if an interrupt has arrived and its grace period is over.

        Raises:
            KeyboardInterrupt: the job must end now.
        """
        if self._requested_at is None:
            return
        grace = max(self.grace_seconds, self._patience_seconds) if self.grace_seconds else 0.0
        if time.monotonic() - self._requested_at > grace:
            raise KeyboardInterrupt
