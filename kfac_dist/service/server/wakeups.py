"""Wakes the streams of a job when something of it changes, with no thread a stream."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from kfac_dist.errors import UnreachableError
from kfac_dist.service.jobs import Jobs


class Changes:
    """Events of the running loop, by job; `close` ends every stream that waits."""

    def __init__(self, jobs: Jobs) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._is_closing = False
        self._unsubscribe = jobs.subscribe(self._on_change)

    def close(self) -> None:
        """End the waiting: streams are told to connect again."""
        self._is_closing = True
        self._unsubscribe()
        for events in self._waiting.values():
            for event in events:
                event.set()

    @contextmanager
    def of(self, job_id: str) -> Iterator[asyncio.Event]:
        """Give an event that is set at each change of the job; whoever waits clears it."""
        event = asyncio.Event()
        self._waiting[job_id].add(event)
        try:
            yield event
        finally:
            self._waiting[job_id].discard(event)
            if not self._waiting[job_id]:
                del self._waiting[job_id]

    async def wait(self, event: asyncio.Event, seconds: float) -> None:
        """Wait for a change, at most so long.

        Raises:
            UnreachableError: the server is about to end.
        """
        try:
            async with asyncio.timeout(seconds):
                await event.wait()
        except TimeoutError:
            pass
        event.clear()
        if self._is_closing:
            raise UnreachableError("the server is about to end; connect again with resume_token")

    def _on_change(self, job_id: str) -> None:
        """Called on any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake, job_id)

    def _wake(self, job_id: str) -> None:
        for event in self._waiting.get(job_id, ()):
            event.set()
