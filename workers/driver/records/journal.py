"""What the driver makes known: records of steps, events and the state of the job."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

from kfac_dist.optim.precision import PreconditionDtype
from kfac_dist.runs import Event, RunFolder, RunState, StepRecord
from kfac_dist.runs.records import Severity
from workers.driver.records.metrics_server import MetricsServer

OnRecord = Callable[[StepRecord], None]
OnEvent = Callable[[Event], None]


class JobJournal:
    """Writes to the run folder and passes records and events on to watchers.

    No other process writes to the folder, except for the logs of the workers.
    """

    def __init__(self, folder: RunFolder, attempt: int) -> None:
        self._folder = folder
        self._attempt = attempt
        self._on_record: list[OnRecord] = []
        self._on_event: list[OnEvent] = []
        self._warnings: SimpleQueue[tuple[str, str]] = SimpleQueue()
        self.step = 0

    def watch(self, on_record: OnRecord | None, on_event: OnEvent | None) -> None:
        """Call these from now on, after the watchers there already are."""
        self._on_record += [on_record] if on_record else []
        self._on_event += [on_event] if on_event else []

    @contextmanager
    def served(self, server: MetricsServer | None, job: str) -> Iterator[None]:
        """Serve the metrics of `job` inside the block, if there is a server."""
        if server is None:
            yield
            return
        with server.series(job) as series:
            # Before all watchers: what one of them sees can be scraped already.
            self._on_record.insert(0, series.on_record)
            self._on_event.insert(0, series.on_event)
            self.event("metrics_served", f"metrics at {server.url}", url=server.url)
            yield

    def warn_later(self, kind: str, message: str) -> None:
        """Write a warning with the next record or event; may be called from any thread."""
        self._warnings.put((kind, message))

    def _write_warnings(self) -> None:
        while not self._warnings.empty():
            kind, message = self._warnings.get()
            self._write(
                Event(
                    kind=kind,
                    message=message,
                    step=self.step,
                    severity="warning",
                    attempt=self._attempt,
                )
            )

    def record(self, record: StepRecord) -> None:
        """Write the record of a step."""
        self._write_warnings()
        self._folder.append_metrics(record)
        for on_record in self._on_record:
            on_record(record)

    def event(
        self,
        kind: str,
        message: str,
        *,
        severity: Severity = "info",
        role: str | None = None,
        rank: int | None = None,
        step: int | None = None,
        **details: Any,
    ) -> None:
        """Write an event of `step`, by default the current one."""
        event = Event(
            kind=kind,
            message=message,
            step=self.step if step is None else step,
            time=time.time(),
            severity=severity,
            role=role,
            rank=rank,
            attempt=self._attempt,
            details=details,
        )
        self._write_warnings()
        self._write(event)

    def _write(self, event: Event) -> None:
        self._folder.append_event(event)
        for on_event in self._on_event:
            on_event(event)

    def started(
        self, precondition_dtype: PreconditionDtype | None, arithmetic: Mapping[str, Any]
    ) -> None:
        """Write that the attempt has started, with the settings that affect its numerics.

        Args:
            precondition_dtype: the dtype in which the server preconditions; None without K-FAC.
            arithmetic: settings that may differ between attempts and affect the numerics.
        """
        self.state("RUNNING")
        self.event("started", f"attempt {self._attempt} trains", **arithmetic)
        if precondition_dtype is not None:
            dtype = precondition_dtype.dtype
            self.event("precondition_dtype", str(precondition_dtype), dtype=dtype)

    def state(self, state: RunState, **changes: Any) -> None:
        """Write the state of the job."""
        self._folder.update_job(state=state, step=self.step, **changes)
