"""How the time of a step is spent, by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from workers.heartbeat import beat


class Phases:
    """Adds up seconds by phase, and tells the heartbeat: `with phases("reduce"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    def elapsed(self) -> float:
        """Return the seconds since this was made."""
        return time.perf_counter() - self._started

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time spent inside the block to the phase `name`."""
        beat(name)
        started = time.perf_counter()
        try:
            yield
        finally:
            beat("")
            elapsed = time.perf_counter() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed
