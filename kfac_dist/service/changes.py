"""Who waits for a change of a job is woken by it."""

from __future__ import annotations

import threading
from collections.abc import Callable


class ChangeFeed:
    """Tells listeners the id of each job that has changed, after the change is durable.

    It knows of changes by this process alone, which is the only server of its store.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: dict[int, Callable[[str], None]] = {}
        self._count = 0

    def subscribe(self, listener: Callable[[str], None]) -> Callable[[], None]:
        """Call `listener` with each id from now on, on the thread of whoever made the change.

        It must return at once and raise nothing. The result ends it; again is allowed.
        """
        with self._lock:
            self._count += 1
            key = self._count
            self._listeners[key] = listener

        def unsubscribe() -> None:
            with self._lock:
                self._listeners.pop(key, None)

        return unsubscribe

    def publish(self, job_id: str) -> None:
        """Tell all listeners."""
        with self._lock:
            listeners = list(self._listeners.values())
        for listener in listeners:
            listener(job_id)
