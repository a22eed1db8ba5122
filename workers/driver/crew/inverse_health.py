"""Which inverse workers answer, what do they report, and which have been silent for too long?

The driver has one thread, so it never waits for a status: it asks now and reads the answer later.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import ray

from workers.actor import Handle, Ref
from workers.driver.crew.failures import failed_among, finished
from workers.exchange.messages import InverseStatus

# A worker answers even while it inverts. Well below the server's own limit for an inverse.
STALL_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class _Poll:
    """An open request for a worker's status; `asked_seconds` is a time of the monotonic clock."""

    rank: int
    asked_seconds: float


class InverseHealth:
    """Asks workers for their status without waiting for the answers."""

    def __init__(self) -> None:
        self._polls: dict[Ref, _Poll] = {}
        self._statuses: dict[int, InverseStatus] = {}

    def ask(self, workers: Mapping[int, Handle]) -> None:
        """Ask each worker for its status, unless a request to it is still open."""
        asked = {poll.rank for poll in self._polls.values()}
        for rank, handle in workers.items():
            if rank not in asked:
                poll = _Poll(rank=rank, asked_seconds=time.monotonic())
                self._polls[handle.status.remote()] = poll

    def statuses(self) -> dict[int, InverseStatus]:
        """Return the newest answer of each worker."""
        ready = {ref: self._polls.pop(ref) for ref in finished(self._polls)}
        failed = failed_among(ready)
        answered = {ref: poll.rank for ref, poll in ready.items() if ref not in failed}
        newest: list[InverseStatus] = ray.get(list(answered))
        self._statuses |= dict(zip(answered.values(), newest, strict=True))
        return dict(self._statuses)

    def stalled(self) -> list[int]:
        """Return the workers that have not answered for STALL_SECONDS."""
        self.statuses()
        latest = time.monotonic() - STALL_SECONDS
        return [poll.rank for poll in self._polls.values() if poll.asked_seconds < latest]

    def forget(self, rank: int) -> None:
        """Forget the requests and answers of a worker that is gone."""
        self._statuses.pop(rank, None)
        self._polls = {ref: poll for ref, poll in self._polls.items() if poll.rank != rank}
