"""The control loop: queue and cluster are looked at again and again, and made to agree.

The rules are in `coordination.admission` and `coordination.supervision`; here they are given what
is known, and done as they say. All that is durable is in the store: a controller that was killed
goes on where it was.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Sequence
from typing import NamedTuple

from sqlalchemy import select

from kfac_dist.config import parse_spec
from kfac_dist.coordination.jobs.lifecycle import ACTIVE, JobState, Trigger
from kfac_dist.coordination.jobs.placement import NO_ROOM, Room, room_needed
from kfac_dist.coordination.jobs.queueing import Waiting, admit_jobs
from kfac_dist.coordination.jobs.runner import AttemptKey, JobRunner
from kfac_dist.coordination.jobs.supervision import WaitLimits
from kfac_dist.errors import KfacDistError, UnreachableError
from kfac_dist.service.control.attempts import Supervisor, start_attempt
from kfac_dist.service.jobs import Jobs
from kfac_dist.service.store import JobRow
from kfac_dist.service.store.job_rows import move, note, touch

_log = logging.getLogger(__name__)

_PERIOD_SECONDS = 1.0
_LEAST_SECONDS = 0.2  # between two looks, however many reports come in
_STRAYS_SECONDS = 60.0


class Controller:
    """Runs the jobs in `jobs` by `runner`; `start` and `stop` it once."""

    def __init__(self, jobs: Jobs, runner: JobRunner, limits: WaitLimits | None = None) -> None:
        self._jobs = jobs
        self._runner = runner
        self._supervisor = Supervisor(jobs, runner, limits or WaitLimits())
        self._wake = threading.Event()
        self._stopping = False
        self._strays_at = 0.0
        self._known_needs: dict[str, Room] = {}
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)

    def start(self) -> None:
        """Begin; what a controller before left is taken over."""
        self._unsubscribe = self._jobs.subscribe(lambda _job: self._wake.set())
        self._thread.start()

    def stop(self) -> None:
        """End after the look in hand; jobs go on."""
        self._stopping = True
        self._wake.set()
        self._thread.join()
        self._unsubscribe()

    def num_active(self) -> int:
        """Return how many jobs have an attempt on the cluster."""
        return len(self._ids(ACTIVE))

    def _run(self) -> None:
        while not self._stopping:
            try:
                self.look()
            except UnreachableError as error:
                _log.warning("%s", error.message)
            except KfacDistError as error:
                _log.error("%s", error.message)
            except Exception:  # noqa: BLE001 - it is logged; the jobs need the loop to go on
                _log.exception("the controller failed; it goes on")
            time.sleep(_LEAST_SECONDS)
            self._wake.wait(_PERIOD_SECONDS)
            self._wake.clear()

    def look(self) -> None:
        """Look at everything once.

        Raises:
            UnreachableError: the cluster or the store does not answer.
        """
        for job in self._ids({JobState.PENDING}):
            with self._jobs.change(job) as (session, row):
                if row.state == JobState.PENDING:
                    move(session, row, Trigger.ENQUEUE, time.time())
        for job in self._ids(ACTIVE):
            self._guarded(job)
        self._start_admitted()
        if time.monotonic() - self._strays_at > _STRAYS_SECONDS:
            self._end_strays()
            self._strays_at = time.monotonic()

    def _guarded(self, job: str) -> None:
        """Look after one job; what is wrong with it must not keep the others waiting."""
        try:
            self._supervisor.look_after(job)
        except UnreachableError:
            raise
        except KfacDistError as error:
            _log.error("job %s: %s", job, error.message)

    def _ids(self, states: Collection[JobState]) -> Sequence[str]:
        with self._jobs.store.read() as session:
            query = select(JobRow.id).where(JobRow.state.in_(sorted(states)))
            return session.scalars(query.order_by(JobRow.number)).all()

    def _start_admitted(self) -> None:
        """Start what there is room for, and tell the others what they wait for."""
        queue = self._queue()
        if not queue:
            return
        try:
            cluster = self._runner.resources()
        except UnreachableError as error:
            for queued in queue:
                self._tell_why(queued, "cluster_unreachable", error.message)
            raise
        used = sum((self._needs(job) for job in self._ids(ACTIVE)), NO_ROOM)
        waiting = [queued.waiting for queued in queue]
        by_id = {queued.waiting.job: queued for queued in queue}
        for verdict in admit_jobs(waiting, cluster, used):
            if verdict.reason is None:
                start_attempt(self._jobs, self._runner, verdict.job)
            else:
                self._tell_why(by_id[verdict.job], verdict.reason, verdict.message)

    def _queue(self) -> list[_Queued]:
        """What is queued; there may be thousands, so only what is needed is read."""
        columns = JobRow.number, JobRow.id, JobRow.priority, JobRow.reason, JobRow.message
        with self._jobs.store.read() as session:
            rows = session.execute(select(*columns).where(JobRow.state == JobState.QUEUED)).all()
        return [
            _Queued(
                waiting=Waiting(job=job, number=number, priority=priority, needs=self._needs(job)),
                told=(reason, message),
            )
            for number, job, priority, reason, message in rows
        ]

    def _needs(self, job: str) -> Room:
        """What a job takes, for which its specification is read once."""
        if job not in self._known_needs:
            self._known_needs[job] = room_needed(parse_spec(self._jobs.get(job).spec).workers)
        return self._known_needs[job]

    def _tell_why(self, queued: _Queued, reason: str, message: str | None) -> None:
        if queued.told == (reason, message):
            return
        with self._jobs.change(queued.waiting.job) as (session, row):
            if row.state != JobState.QUEUED:
                return
            is_new = row.reason != reason
            row.reason, row.message = reason, message
            touch(row, time.time())
            if is_new:
                note(session, row, "waiting", message or "", time.time())

    def _end_strays(self) -> None:
        """End what runs although the store says that it does not: none may run twice."""
        for key, status in self._runner.list().items():
            if not status.is_over and self._is_stray(key):
                _log.warning("attempt %s runs, but is not to: ended", key.submission_id)
                self._runner.kill(key)

    def _is_stray(self, key: AttemptKey) -> bool:
        with self._jobs.store.read() as session:
            row = session.scalar(select(JobRow).where(JobRow.id == key.job))
        # A job that this store does not know is another server's.
        return row is not None and (row.attempt != key.attempt or row.state not in ACTIVE)


class _Queued(NamedTuple):
    """A queued job, and the reason and message that it was told."""

    waiting: Waiting
    told: tuple[str | None, str | None]
