"""Writes checkpoints in a thread, so that training waits for a copy and not for the disk.

Training continues while a checkpoint is merged, hashed and written. There is never more than one on
its way. What went wrong is raised in the driver's thread, between two steps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from workers.checkpoint import write_checkpoint
from workers.exchange.arrays import Arrays

_LOOK_SECONDS = 0.05  # how soon an interrupt is seen


@dataclass(frozen=True, kw_only=True)
class CheckpointContent:
    """What belongs into the checkpoint of a step; nothing in it changes any more.

    `roles` is called in the writing thread, and returns the arrays of each role.
    """

    step: int
    roles: Callable[[], Mapping[str, Arrays]]
    state: Mapping[str, object]


class CheckpointWriter:
    """Writes to `folder`, where the `keep` newest checkpoints stay.

    `on_written` is called in the caller's thread with the step of a checkpoint that is on disk.
    """

    def __init__(self, folder: Path, keep: int, on_written: Callable[[int], None]) -> None:
        self._folder = folder
        self._keep = keep
        self._on_written = on_written
        self._thread: threading.Thread | None = None
        self._step = 0
        self._error: BaseException | None = None

    def start(self, content: CheckpointContent) -> None:
        """Write a checkpoint in the background; `finish` has been called before."""
        assert self._thread is None, "one checkpoint at a time"
        self._step, self._error = content.step, None
        self._thread = threading.Thread(
            target=self._write, args=[content], name="checkpoint", daemon=True
        )
        self._thread.start()

    def _write(self, content: CheckpointContent) -> None:
        try:
            write_checkpoint(self._folder, content.step, content.roles(), content.state, self._keep)
        except BaseException as error:  # noqa: BLE001 - raised by `look` in the driver's thread
            self._error = error

    def look(self) -> None:
        """Tell of a checkpoint that is on disk by now; does not wait.

        Raises:
            JobFailedError: it could not be written.
        """
        if self._thread is None or self._thread.is_alive():
            return
        self._thread = None
        if self._error is not None:
            raise self._error
        self._on_written(self._step)

    def finish(self, check: Callable[[], None]) -> None:
        """Wait until no checkpoint is on its way; `check` may raise to end the wait.

        Raises:
            JobFailedError: it could not be written.
        """
        while self._thread is not None:
            self._thread.join(_LOOK_SECONDS)
            self.look()
            if self._thread is not None:
                check()

    def wait(self, seconds: float) -> None:
        """Give a checkpoint that is on its way so long to reach the disk."""
        if self._thread is not None:
            self._thread.join(seconds)
