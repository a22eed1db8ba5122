"""Everything that can be done with jobs; all requests to the control plane end here.

Synchronous and thread-safe. Methods raise only subclasses of KfacDistError.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from kfac_dist.config import parse_spec
from kfac_dist.coordination.jobs.lifecycle import ENDED, JobState, Trigger
from kfac_dist.errors import ConflictError, UsageError
from kfac_dist.runs.checkpoint_folder import CheckpointInfo, list_checkpoints
from kfac_dist.runs.run_places import RunPlaces
from kfac_dist.service.access.tokens import hash_secret
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
        """Check a job and store it durably as PENDING.

        Args:
            spec: the specification; missing keys get their defaults.
            owner: name of the token that submits the job.
            priority: jobs with a higher priority leave the queue earlier.
            idempotency_key: the same key with the same request by the same owner returns the job
                that was created first.
            package: zip of the folder with the user's code, None for a built-in task.
            data_dir: folder of data sets, an absolute path that every node has, or a URL.

        Raises:
            InvalidSpecError: the specification or the package is wrong; lists every problem.
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
            NotFoundError: no job has this id.
        """
        with self.store.read() as session:
            return to_job(find(session, job_id))

    def attempts(self, job_id: str) -> Sequence[Attempt]:
        """Return the attempts of a job, oldest first."""
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
        """Return a page of jobs, newest first, and the token of the next page, empty at the end.

        The jobs have no specification and no summary, which would be most of the page.

        Raises:
            UsageError: the size is out of range, or the token is from another listing.
        """
        listing = Listing(states=tuple(states), owner=owner, name=name)
        with self.store.read() as session:
            rows = session.execute(listing.query(page_size, page_token)).all()
        page = rows[:page_size]
        next_token = listing.token(page[-1].number) if len(rows) > page_size else ""
        return [to_job(row, whole=False) for row in page], next_token

    def count(
        self,
        *,
        states: Iterable[JobState] = (),
        owner: str | None = None,
        name: str | None = None,
    ) -> int:
        """Return the number of jobs in a listing with these filters, on all its pages."""
        listing = Listing(states=tuple(states), owner=owner, name=name)
        with self.store.read() as session:
            return int(session.execute(listing.count()).scalar_one())

    def cancel(self, job_id: str, *, now: bool = False) -> Job:
        """End a job; with `now`, without waiting for its current step and a checkpoint.

        Raises:
            ConflictError: the job has ended.
        """
        return self._request(job_id, Trigger.CANCEL, "cancelled by request", now=now)

    def pause(self, job_id: str) -> Job:
        """Stop a job at a checkpoint, from which it can be resumed.

        Raises:
            ConflictError: the job has ended or is being cancelled.
        """
        return self._request(job_id, Trigger.PAUSE, "paused by request")

    def resume(self, job_id: str) -> Job:
        """Resume a paused job from its newest checkpoint.

        Raises:
            ConflictError: the job is not paused.
        """
        return self._request(job_id, Trigger.RESUME, "resumed by request")

    def retry(self, job_id: str) -> Job:
        """Start a new attempt of a failed or cancelled job, from its newest checkpoint.

        Raises:
            ConflictError: the job has not ended, or has succeeded.
        """
        return self._request(job_id, Trigger.RETRY, "retried by request")

    def scale(self, job_id: str, *, gradient: int | None = None, inverse: int | None = None) -> Job:
        """Change how many workers a job shall have, in its specification; None leaves a number.

        A driver that runs learns it from the answer to its next report.

        Raises:
            InvalidSpecError: the job cannot have these numbers.
            UsageError: no number is given.
            ConflictError: the job has ended.
        """
        asked = {"gradient": gradient, "inverse": inverse}
        numbers = {role: number for role, number in asked.items() if number is not None}
        if not numbers:
            raise UsageError("give a number of gradient workers, of inverse workers, or both")
        with self.change(job_id) as (session, row):
            if row.state in ENDED:
                raise ConflictError(f"job {job_id} is {row.state}, and has no workers to change")
            workers = row.spec["workers"]
            changed = {**row.spec, "workers": {**workers, **numbers}}
            row.spec = parse_spec(changed).model_dump(mode="json")
            told = ", ".join(f"{number} {role} workers" for role, number in numbers.items())
            note(session, row, "scale_requested", f"asked for {told}", time.time())
        return to_job(row)

    def _request(self, job_id: str, trigger: Trigger, message: str, *, now: bool = False) -> Job:
        with self.change(job_id) as (session, row):
            moved = move(session, row, trigger, time.time(), reason="requested", message=message)
            row.cancel_now = trigger is Trigger.CANCEL and (now or row.cancel_now)
            if trigger in (Trigger.RESUME, Trigger.RETRY):
                row.num_restarts = 0
                row.first_failure = row.summary = None
            if moved or now:
                note(session, row, f"{trigger}_requested", message, time.time())
        return to_job(row)

    @contextmanager
    def change(self, job_id: str) -> Iterator[tuple[Session, JobRow]]:
        """Open a transaction on a job's row; if it changes the row, listeners are called after.

        Raises:
            NotFoundError: no job has this id.
        """
        with self.store.write() as session:
            row = find(session, job_id, for_update=True)
            before = row.revision
            yield session, row
        if row.revision != before:
            self._feed.publish(job_id)

    def events(self, job_id: str, *, after: int = 0, limit: int = 500) -> Sequence[JobEvent]:
        """Return at most `limit` events whose sequence is above `after`, in order.

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
        """Return the names of all metrics that have a history in this job."""
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
        """Return histories in the order of `names`, each thinned out to at most `max_points`.

        Both steps are included in the range; None leaves that end open.

        Raises:
            NotFoundError: the job has no metric with one of the names.
            UsageError: a number is out of range.
        """
        _check_range("max_points", max_points, 1, _MAX_POINTS)
        for field, step in (("first_step", first_step), ("last_step", last_step)):
            _check_range(field, step or 0, 0, 2**63 - 1)
        with self.store.read() as session:
            row = find(session, job_id)
            return history.read_series(session, row, names, first_step, last_step, max_points)

    def checkpoints(self, job_id: str) -> Sequence[CheckpointInfo]:
        """Return the job's checkpoints, newest first, without verifying their content."""
        return list_checkpoints(RunPlaces(Path(self.get(job_id).run_dir)).checkpoints)

    def log_dir(self, job_id: str) -> Path:
        """Return the folder of the job's logs, which may not exist yet."""
        return RunPlaces(Path(self.get(job_id).run_dir)).logs

    def check_report_token(self, job_id: str, attempt: int, token: str) -> bool:
        """Return whether `token` is the secret of this attempt's driver.

        Raises:
            NotFoundError: no job has this id.
        """
        with self.store.read() as session:
            row = session.get(AttemptRow, (find(session, job_id).number, attempt))
        return row is not None and hmac.compare_digest(row.token_sha256, hash_secret(token))

    def report(self, report: Report, *, heard: bool = True) -> ReportAnswer:
        """Store what is new in a report, and answer what the driver should do.

        `heard` is False for a report that the server itself read from the run folder, which does
        not prove that the driver is alive.

        Raises:
            NotFoundError: no job has this id.
        """
        with self.change(report.job) as (session, row):
            return reports.take_up(session, row, report, time.time(), heard=heard)

    def subscribe(self, listener: Callable[[str], None]) -> Callable[[], None]:
        """Call `listener` with the id of each changed job, on the thread that changed it.

        A listener must return at once and never raise. Call the returned function to unsubscribe.
        """
        return self._feed.subscribe(listener)


def _check_range(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise UsageError(f"{field}: {value} is not between {low} and {high}")
