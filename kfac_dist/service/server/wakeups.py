"""Wakes the streams of a job when the job changes, without a thread for each stream."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from kfac_dist.errors import UnreachableError
from kfac_dist.service.jobs import Jobs


class JobWakeups:
    """Wakes the streams that wait for a job to change. Belongs to the running event loop."""

    def __init__(self, jobs: Jobs) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._is_closing = False
        self._unsubscribe = jobs.subscribe(self._on_change)

    def close(self) -> None:
        """Wake every stream; each then ends with an UnreachableError."""
        self._is_closing = True
        self._unsubscribe()
        for events in self._waiting.values():
            for event in events:
                event.set()

    @contextmanager
    def subscribed(self, job_id: str) -> Iterator[asyncio.Event]:
        """Give an event that each change of the job sets, for `wait`."""
        event = asyncio.Event()
        self._waiting[job_id].add(event)
        try:
            yield event
        finally:
            self._waiting[job_id].discard(event)
            if not self._waiting[job_id]:
                del self._waiting[job_id]

    async def wait(self, event: asyncio.Event, seconds: float) -> None:
        """Wait for a change for at most `seconds`, and clear the event.

        Raises:
            UnreachableError: the server is shutting down.
        """
        try:
            async with asyncio.timeout(seconds):
                await event.wait()
        except TimeoutError:
            pass  # the stream looks for itself: nobody announces a log line, for example
        event.clear()
        if self._is_closing:
            raise UnreachableError("the server is shutting down; connect again with resume_token")

    def _on_change(self, job_id: str) -> None:
        # Runs on the thread that changed the job; events may be set only on the loop's own.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake, job_id)

    def _wake(self, job_id: str) -> None:
        for event in self._waiting.get(job_id, ()):
            event.set()
