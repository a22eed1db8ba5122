"""Makes deliveries in order, in a thread of its own, so that no step waits for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Courier:
    """Makes one delivery after the other. Not thread-safe."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="courier")
        self._open: deque[Future[None]] = deque()

    def deliver(self, delivery: Callable[[], None]) -> None:
        """Make this delivery after those before it, and return at once.

        What an earlier delivery raised is raised here, and nothing is delivered.
        """
        while self._open and self._open[0].done():
            self._open.popleft().result()
        self._open.append(self._thread.submit(delivery))

    def finish(self) -> None:
        """Return when all deliveries have been made, or raise what one of them raised."""
        while self._open:
            self._open.popleft().result()
