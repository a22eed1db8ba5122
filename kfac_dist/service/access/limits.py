"""How much one user may have at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kfac_dist.errors import LimitExceededError


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """ServerLimits of a server; those of sizes are in `transport`, both ends know them."""

    streams_a_user: int = 256
    calls_at_once: int = 2000
    call_seconds: float = 60.0


class StreamCounter:
    """Counts open streams by user; of one thread."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: Counter[str] = Counter()

    @contextmanager
    def one_more(self, user: str) -> Iterator[None]:
        """Count a stream inside the block.

        Raises:
            LimitExceededError: the user has as many as one may have.
        """
        if self._open[user] >= self._most:
            raise LimitExceededError(
                f"{user!r} has {self._most} streams (watch, logs) open, which is the limit of a "
                "user; close some"
            )
        self._open[user] += 1
        try:
            yield
        finally:
            self._open[user] -= 1
            if not self._open[user]:
                del self._open[user]
