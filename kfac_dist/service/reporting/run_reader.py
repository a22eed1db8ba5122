"""From a run folder to reports: for its driver, and for the server when the driver is silent.

The folder is the durable record; a report is a copy of what is new in it.
"""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from kfac_dist.coordination.jobs.lifecycle import JobState
from kfac_dist.errors import FirstFailure
from kfac_dist.runs import Event, JobRecord, StepRecord
from kfac_dist.runs.parsing import parse_record, read_whole
from kfac_dist.runs.run_places import RunPlaces
from kfac_dist.runs.tail import JournalTail
from kfac_dist.runs.writing import write_whole
from kfac_dist.service.job_records import (
    Report,
    ReportAnswer,
    ReportedEvent,
    ReportedState,
    StepValues,
)

MOST_IN_A_REPORT = 200


class DriverEnd(BaseModel):
    """How a driver ended: `driver.json`, also of one that failed before there was a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    attempt: int
    state: JobState
    reason: str | None = None
    message: str | None = None
    first_failure: FirstFailure | None = None


def write_end(run_dir: Path, end: DriverEnd) -> None:
    """Write how the driver of the newest attempt ended."""
    write_whole(RunPlaces(run_dir).driver_end, end.model_dump_json(indent=2) + "\n")


class RunReader:
    """Reads what is new since the last answer of the server; not thread-safe."""

    def __init__(self, run_dir: Path, job: str, attempt: int) -> None:
        self._places = RunPlaces(run_dir)
        self._job = job
        self._attempt = attempt
        self._event_tail = JournalTail(self._places.events)
        self._step_tail = JournalTail(self._places.metrics)
        self._events: deque[ReportedEvent] = deque()
        self._steps: deque[StepRecord] = deque()
        self._known = ReportAnswer(order="none", events_known=0, steps_known=0)
        self._state_sent: ReportedState | None = None
        self._state_known: ReportedState | None = None

    def read(self) -> Report:
        """Return the next report; it is empty if nothing is new.

        Raises:
            KfacDistError: a file in the folder is damaged.
        """
        state = self._state()  # read first: a run that has ended writes nothing more
        self._state_sent = state
        self._read_events()
        self._read_steps()
        return Report(
            job=self._job,
            attempt=self._attempt,
            state=None if state == self._state_known else state,
            events=tuple(self._events),
            steps=tuple(
                StepValues(step=record.step, time=record.time, values=record.values)
                for record in self._steps
            ),
        )

    def acknowledge(self, answer: ReportAnswer) -> None:
        """Note what the server has received; the rest will be read again."""
        if answer.events_known < self._known.events_known:
            self._event_tail.rewind()
            self._events.clear()
        if answer.steps_known < self._known.steps_known:
            self._step_tail.rewind()
            self._steps.clear()
        self._known = answer
        self._state_known = self._state_sent
        while self._events and self._events[0].line <= answer.events_known:
            self._events.popleft()
        while self._steps and self._steps[0].step <= answer.steps_known:
            self._steps.popleft()

    @property
    def has_more(self) -> bool:
        """Whether the last report was full, so that more may be ready already."""
        return MOST_IN_A_REPORT in (len(self._events), len(self._steps))

    def _read_events(self) -> None:
        while room := MOST_IN_A_REPORT - len(self._events):
            lines = self._event_tail.read(room)
            if not lines:
                return
            self._events.extend(
                ReportedEvent(line=line, event=parse_record(Event, values, self._places.events))
                for line, values in lines
                if line > self._known.events_known
            )

    def _read_steps(self) -> None:
        while room := MOST_IN_A_REPORT - len(self._steps):
            lines = self._step_tail.read(room)
            if not lines:
                return
            for _, values in lines:
                record = parse_record(StepRecord, values, self._places.metrics)
                while self._steps and self._steps[-1].step >= record.step:
                    self._steps.pop()  # the step is done again
                if record.step > self._known.steps_known:
                    self._steps.append(record)

    def _state(self) -> ReportedState | None:
        """Return how the driver ended, else the state of the run; None before either is written."""
        job = self._job_record()
        end = self._driver_end()
        summary = self._places.summary
        known = end or job
        if known is None:
            return None
        return ReportedState(
            state=JobState(known.state),
            step=job.step if job else 0,
            reason=known.reason,
            message=known.message,
            first_failure=known.first_failure,
            summary=json.loads(summary.read_bytes()) if job and summary.exists() else None,
        )

    def _job_record(self) -> JobRecord | None:
        if not self._places.has_run:
            return None
        record = read_whole(JobRecord, self._places.job)
        return record if record.attempt == self._attempt else None

    def _driver_end(self) -> DriverEnd | None:
        if not self._places.driver_end.exists():
            return None
        end = read_whole(DriverEnd, self._places.driver_end)
        return end if end.attempt == self._attempt else None
