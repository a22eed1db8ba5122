"""What may be done with jobs; every way into the control plane ends here.

Synchronous and thread-safe. Every method raises KfacDistError subclasses only.
"""

from __future__ import annotations

import hashlib
import hmac
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from kfac_dist.coordination.jobs.lifecycle import JobState, Trigger
from kfac_dist.errors import UsageError
from kfac_dist.runs.checkpoint_folder import CheckpointInfo, list_checkpoints
from kfac_dist.runs.run_places import RunPlaces
from kfac_dist.service.changes import ChangeFeed
from kfac_dist.service.job_records import (
    Attempt,
    Job,
    JobEvent,
    MetricSeries,
    Report,
    ReportAnswer,
)
from kfac_dist.service.reporting import take_up as reports
from kfac_dist.service.store import AttemptRow, EventRow, JobRow, Store, history
from kfac_dist.service.store.job_rows import find, move, note, to_attempt, to_event, to_job
from kfac_dist.service.store.paging import Listing
from kfac_dist.service.submission import check_request, submit

_MAX_EVENTS = 10_000
_MAX_POINTS = 100_000


class Jobs:
    """The jobs in `store`; run folders and packages are in `home`."""

    def __init__(self, store: Store, home: Path) -> None:
        self.store = store
        self.home = home
        self._feed = ChangeFeed()

    def create(
        self,
        spec: Mapping[str, Any],
        *,
        owner: str,
        priority: int = 0,
        idempotency_key: str | None = None,
        package: bytes | None = None,
        data_dir: str | None = None,
    ) -> Job:
        """Accept a job: check it and make it durable. It is PENDING.

        `package` is a zip of the folder that user code is looked for in. The same key with the
        same request, by the same owner, gives the job that is there.

        Raises:
            InvalidSpecError: the specification or the package is wrong, with every problem.
            UsageError: another part of the request is wrong.
            ConflictError: the key was used for another request.
        """
        request = check_request(
            spec,
            owner=owner,
            priority=priority,
            idempotency_key=idempotency_key,
            package=package,
            data_dir=data_dir,
        )
        job, is_new = submit(self.store, self.home, request)
        if is_new:
            self._feed.publish(job.id)
        return job

    def get(self, job_id: str) -> Job:
        """Return a job.

        Raises:
            NotFoundError: there is none of this id.
        """
        with self.store.read() as session:
            return to_job(find(session, job_id))

    def attempts(self, job_id: str) -> Sequence[Attempt]:
        """Return the attempts of a job, first to last."""
        with self.store.read() as session:
            row = find(session, job_id)
            query = select(AttemptRow).where(AttemptRow.job == row.number)
            attempts = session.scalars(query.order_by(AttemptRow.number))
            return [to_attempt(attempt, job_id) for attempt in attempts]

    def list(
        self,
        *,
        states: Iterable[JobState] = (),
        owner: str | None = None,
        name: str | None = None,
        page_size: int = 50,
        page_token: str = "",
    ) -> tuple[Sequence[Job], str]:
        """Return a page of jobs, newest first, and the token of the next, empty at the end.

        They are without specification and summary, which are most of a job.

        Raises:
            UsageError: the token is not one of this listing's, or the size is out of range.
        """
        listing = Listing(states=tuple(states), owner=owner, name=name)
        with self.store.read() as session:
            rows = session.execute(listing.query(page_size, page_token)).all()
        page = rows[:page_size]
        more = listing.token(page[-1].number) if len(rows) > page_size else ""
        return [to_job(row, whole=False) for row in page], more

    def cancel(self, job_id: str, *, now: bool = False) -> Job:
        """Let a job end; `now` without waiting for its step and checkpoint.

        Raises:
            ConflictError: it has ended.
        """
        return self._request(job_id, Trigger.CANCEL, "cancelled by request", now=now)

    def pause(self, job_id: str) -> Job:
        """Let a job leave a checkpoint and end, to be resumed.

        Raises:
            ConflictError: it has ended or is being cancelled.
        """
        return self._request(job_id, Trigger.PAUSE, "paused by request")

    def resume(self, job_id: str) -> Job:
        """Let a paused job go on.

        Raises:
            ConflictError: it is not paused.
        """
        return self._request(job_id, Trigger.RESUME, "resumed by request")

    def retry(self, job_id: str) -> Job:
        """Let a failed or cancelled job go on at its newest checkpoint.

        Raises:
            ConflictError: it has not ended, or succeeded.
        """
        return self._request(job_id, Trigger.RETRY, "retried by request")

    def _request(self, job_id: str, event: Trigger, message: str, *, now: bool = False) -> Job:
        with self.change(job_id) as (session, row):
            moved = move(session, row, event, time.time(), reason="requested", message=message)
            row.cancel_now = event is Trigger.CANCEL and (now or row.cancel_now)
            if event in (Trigger.RESUME, Trigger.RETRY):
                row.num_restarts = 0
                row.first_failure = row.summary = None
            if moved or now:
                note(session, row, f"{event}_requested", message, time.time())
        return to_job(row)

    @contextmanager
    def change(self, job_id: str) -> Iterator[tuple[Session, JobRow]]:
        """Give a job's row to change in a transaction, and tell of the change after it."""
        with self.store.write() as session:
            row = find(session, job_id, to_change=True)
            before = row.revision
            yield session, row
        if row.revision != before:
            self._feed.publish(job_id)

    def events(self, job_id: str, *, after: int = 0, limit: int = 500) -> Sequence[JobEvent]:
        """Return events with a sequence above `after`, in order.

        Raises:
            UsageError: a number is out of range.
        """
        _check_range("limit", limit, 1, _MAX_EVENTS)
        _check_range("after", after, 0, 2**63 - 1)
        with self.store.read() as session:
            row = find(session, job_id)
            query = select(EventRow).where(EventRow.job == row.number, EventRow.sequence > after)
            events = session.scalars(query.order_by(EventRow.sequence).limit(limit))
            return [to_event(event, job_id) for event in events]

    def metric_names(self, job_id: str) -> Sequence[str]:
        """Return the names of all metrics that the job has a history of."""
        with self.store.read() as session:
            return history.metric_names(session, find(session, job_id))

    def metrics(
        self,
        job_id: str,
        names: Sequence[str],
        *,
        first_step: int | None = None,
        last_step: int | None = None,
        max_points: int = 1000,
    ) -> Sequence[MetricSeries]:
        """Return histories in the order of `names`, thinned out to at most `max_points` each.

        Raises:
            NotFoundError: the job has no metric of this name.
            UsageError: a number is out of range.
        """
        _check_range("max_points", max_points, 1, _MAX_POINTS)
        for field, step in (("first_step", first_step), ("last_step", last_step)):
            _check_range(field, step or 0, 0, 2**63 - 1)
        with self.store.read() as session:
            row = find(session, job_id)
            return history.read_series(session, row, names, first_step, last_step, max_points)

    def checkpoints(self, job_id: str) -> Sequence[CheckpointInfo]:
        """Return the job's checkpoints, newest first, not verified."""
        return list_checkpoints(RunPlaces(Path(self.get(job_id).run_dir)).checkpoints)

    def log_dir(self, job_id: str) -> Path:
        """Where the logs of the job's roles are; the folder may not be there yet."""
        return RunPlaces(Path(self.get(job_id).run_dir)).logs

    def check_report_token(self, job_id: str, attempt: int, token: str) -> bool:
        """Whether `token` is the secret that the driver of this attempt was given."""
        with self.store.read() as session:
            row = session.get(AttemptRow, (find(session, job_id).number, attempt))
        given = hashlib.sha256(token.encode()).hexdigest()
        return row is not None and hmac.compare_digest(row.token_sha256, given)

    def report(self, report: Report, *, heard: bool = True) -> ReportAnswer:
        """Take up what a driver tells, and answer what it is to do.

        Not `heard` is what was read in its run folder, and no sign of life.

        Raises:
            NotFoundError: there is no such job.
        """
        with self.change(report.job) as (session, row):
            return reports.take_up(session, row, report, time.time(), heard=heard)

    def wait_for_change(self, job_id: str, revision: int, timeout_seconds: float) -> Job | None:
        """Return the job once its revision is above `revision`, None when the time is over."""
        woken = threading.Event()
        unsubscribe = self.subscribe(lambda changed: woken.set() if changed == job_id else None)
        deadline = time.monotonic() + timeout_seconds
        try:
            while (job := self.get(job_id)).revision <= revision:
                if not woken.wait(max(0.0, deadline - time.monotonic())):
                    return None
                woken.clear()
            return job
        finally:
            unsubscribe()

    def subscribe(self, listener: Callable[[str], None]) -> Callable[[], None]:
        """Call `listener` with the id of each job that changes, on any thread; returns its end.

        An asyncio server hands it to its loop with `call_soon_threadsafe`: no thread a watcher.
        """
        return self._feed.subscribe(listener)


def _check_range(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise UsageError(f"{field}: {value} is not between {low} and {high}")
