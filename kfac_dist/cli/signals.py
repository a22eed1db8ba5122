"""SIGTERM, SIGHUP and SIGQUIT interrupt a command as Ctrl-C does; some blocks finish first."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_UNLESS_IGNORED = (signal.SIGHUP, signal.SIGQUIT)  # `nohup` ignores the first


@contextmanager
def terminate_is_interrupt() -> Iterator[None]:
    """Make SIGTERM, SIGHUP and SIGQUIT raise KeyboardInterrupt inside the block."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    wanted = [s for s in _UNLESS_IGNORED if signal.getsignal(s) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, *wanted)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interrupt_at_end() -> Iterator[None]:
    """Delay the KeyboardInterrupt of Ctrl-C to the end of the block; a second one comes at once."""
    came = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt
