"""Tells the rest of this process which job has changed."""

from __future__ import annotations

import threading
from collections.abc import Callable


class ChangeFeed:
    """Calls listeners with the id of each changed job, once the change is durable.

    It sees only changes made by this process. That is enough: a store has one server.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: dict[int, Callable[[str], None]] = {}
        self._num_subscribed = 0

    def subscribe(self, listener: Callable[[str], None]) -> Callable[[], None]:
        """Call `listener` with each id from now on, on the thread that made the change.

        A listener must return at once and never raise. Call the returned function to unsubscribe;
        calling it again does nothing.
        """
        with self._lock:
            self._num_subscribed += 1
            key = self._num_subscribed
            self._listeners[key] = listener

        def unsubscribe() -> None:
            with self._lock:
                self._listeners.pop(key, None)

        return unsubscribe

    def publish(self, job_id: str) -> None:
        """Call all listeners."""
        with self._lock:  # only for the copy: a listener may subscribe or unsubscribe
            listeners = list(self._listeners.values())
        for listener in listeners:
            listener(job_id)
