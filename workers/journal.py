"""What the driver tells the world: records, events and the state of the job."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from kfac_dist.precision import PreconditionDtype
from kfac_dist.runs import Event, JobState, RunFolder, StepRecord
from kfac_dist.runs.records import Severity

OnRecord = Callable[[StepRecord], None]
OnEvent = Callable[[Event], None]


class JobJournal:
    """Writes to the run folder, which the driver alone does, and calls whoever watches."""

    def __init__(
        self, folder: RunFolder, attempt: int, on_record: OnRecord | None, on_event: OnEvent | None
    ) -> None:
        self._folder = folder
        self._attempt = attempt
        self._on_record = on_record
        self._on_event = on_event
        self.step = 0

    def record(self, record: StepRecord) -> None:
        """Write a step."""
        self._folder.append_metrics(record)
        if self._on_record is not None:
            self._on_record(record)

    def event(
        self,
        kind: str,
        message: str,
        *,
        severity: Severity = "info",
        role: str | None = None,
        rank: int | None = None,
        **details: Any,
    ) -> None:
        """Write an event of the current step."""
        event = Event(
            kind=kind,
            message=message,
            step=self.step,
            time=time.time(),
            severity=severity,
            role=role,
            rank=rank,
            attempt=self._attempt,
            details=details,
        )
        self._folder.append_event(event)
        if self._on_event is not None:
            self._on_event(event)

    def started(self, precondition: PreconditionDtype | None) -> None:
        """Write that all members are there, and what was measured for `precondition`."""
        self.state("RUNNING")
        self.event("started", f"attempt {self._attempt} trains")
        if precondition is not None:
            self.event("precondition_dtype", str(precondition), dtype=precondition.dtype)

    def state(self, state: JobState, **changes: Any) -> None:
        """Write the state of the job."""
        self._folder.update_job(state=state, step=self.step, **changes)
