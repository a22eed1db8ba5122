"""Limits on what one server, and one user of it, may have at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kfac_dist.errors import LimitExceededError


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """Limits that only the server enforces; both ends know the size limits in `wire.transport`."""

    streams_a_user: int = 256
    calls_at_once: int = 2000
    call_seconds: float = 60.0


class StreamCounter:
    """Counts each user's open streams. Not thread-safe: the server's event loop owns it."""

    def __init__(self, max_streams: int) -> None:
        self._max_streams = max_streams
        self._open: Counter[str] = Counter()

    @contextmanager
    def counted(self, user: str) -> Iterator[None]:
        """Count one stream of the user inside the block.

        Raises:
            LimitExceededError: the user already has the most streams that one user may have.
        """
        if self._open[user] >= self._max_streams:
            raise LimitExceededError(
                f"{user!r} has {self._max_streams} streams (watch, logs) open, the limit for one "
                "user; close some"
            )
        self._open[user] += 1
        try:
            yield
        finally:
            self._open[user] -= 1
            if not self._open[user]:
                del self._open[user]
