"""The control loop: it compares the store with the cluster again and again, and makes them agree.

The rules are in `coordination.jobs.queueing` and `coordination.jobs.supervision`; the controller
collects what they need to know and does what they decide. All its durable state is in the store,
so a new controller continues where a killed one stopped.
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
from kfac_dist.service.control.restarts import resting
from kfac_dist.service.jobs import Jobs
from kfac_dist.service.store import JobRow
from kfac_dist.service.store.job_rows import move, note, touch

_log = logging.getLogger(__name__)

_PERIOD_SECONDS = 1.0
_LEAST_SECONDS = 0.2  # between two passes, however many reports come in
_STRAYS_SECONDS = 60.0  # between two searches for attempts that should not run


class Controller:
    """Runs the jobs of a store on a cluster, in a thread. Call `start` and `stop` once each."""

    def __init__(self, jobs: Jobs, runner: JobRunner, limits: WaitLimits | None = None) -> None:
        self._jobs = jobs
        self._runner = runner
        self._limits = limits or WaitLimits()
        self._supervisor = Supervisor(jobs, runner, self._limits)
        self._wake = threading.Event()
        self._stopping = False
        self._strays_at = 0.0
        self._known_needs: dict[str, Room] = {}
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)

    def start(self) -> None:
        """Start the loop; it takes over the attempts of earlier controllers."""
        self._unsubscribe = self._jobs.subscribe(lambda _job: self._wake.set())
        self._thread.start()

    def stop(self) -> None:
        """End the loop after its current pass. Jobs continue to run."""
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
                self._pass()
            except UnreachableError as error:
                _log.warning("%s", error.message)
            except KfacDistError as error:
                _log.error("%s", error.message)
            except Exception:  # noqa: BLE001 - a bug is logged; jobs still need the loop
                _log.exception("the controller failed; it continues")
            time.sleep(_LEAST_SECONDS)
            self._wake.wait(_PERIOD_SECONDS)
            self._wake.clear()

    def _pass(self) -> None:
        """Look at every job once; each says so when the cluster does not answer.

        Raises:
            UnreachableError: the cluster or the store does not answer.
        """
        for job_id in self._ids({JobState.PENDING}):
            with self._jobs.change(job_id) as (session, row):
                if row.state == JobState.PENDING:
                    move(session, row, Trigger.ENQUEUE, time.time())
        problem: UnreachableError | None = None
        for job_id in self._ids(ACTIVE):
            if problem is None:  # the next job would only wait for the same answer
                problem = self._look_after(job_id)
            if problem is not None:
                self._supervisor.note_unreachable(job_id, problem.message)
        self._start_admitted(problem)
        if time.monotonic() - self._strays_at > _STRAYS_SECONDS:
            self._kill_strays()
            self._strays_at = time.monotonic()

    def _look_after(self, job_id: str) -> UnreachableError | None:
        """Look after one job, and return why the cluster could not be asked about it.

        Other errors are logged, so that the other jobs still have their turn.
        """
        try:
            self._supervisor.look_after(job_id)
        except UnreachableError as error:
            return error
        except KfacDistError as error:
            _log.error("job %s: %s", job_id, error.message)
        return None

    def _ids(self, states: Collection[JobState]) -> Sequence[str]:
        with self._jobs.store.read() as session:
            query = select(JobRow.id).where(JobRow.state.in_(sorted(states)))
            return session.scalars(query.order_by(JobRow.number)).all()

    def _start_admitted(self, problem: UnreachableError | None) -> None:
        """Start the jobs that are admitted, and note in the others what they wait for.

        Args:
            problem: why the cluster did not answer in this pass, None if it did or was not asked.

        Raises:
            UnreachableError: `problem`, or the cluster does not answer now.
        """
        queue = self._rested(self._queue())
        try:
            if problem is not None:
                raise problem
            if not queue:
                return
            cluster = self._runner.resources()
        except UnreachableError as error:
            for queued in queue:
                self._note_reason(queued, "cluster_unreachable", error.message)
            raise
        used = sum((self._needs(job_id) for job_id in self._ids(ACTIVE)), NO_ROOM)
        waiting = [queued.waiting for queued in queue]
        by_id = {queued.waiting.job: queued for queued in queue}
        for verdict in admit_jobs(waiting, cluster, used):
            if verdict.reason is None:
                start_attempt(self._jobs, self._runner, verdict.job)
            else:
                self._note_reason(by_id[verdict.job], verdict.reason, verdict.message)

    def _queue(self) -> list[_Queued]:
        # Only these columns: with thousands of queued jobs, whole rows would take too long.
        columns = JobRow.number, JobRow.id, JobRow.priority, JobRow.reason, JobRow.message
        with self._jobs.store.read() as session:
            rows = session.execute(select(*columns).where(JobRow.state == JobState.QUEUED)).all()
        return [
            _Queued(
                waiting=Waiting(
                    job=job_id, number=number, priority=priority, needs=self._needs(job_id)
                ),
                noted=(reason, message),
            )
            for number, job_id, priority, reason, message in rows
        ]

    def _rested(self, queue: Sequence[_Queued]) -> list[_Queued]:
        """Leave out the jobs that rest after a failure, and note in them until when."""
        with self._jobs.store.read() as session:
            rests = resting(session, self._limits, time.time())
        for queued in queue:
            if (rest := rests.get(queued.waiting.job)) is not None:
                self._note_reason(queued, "waiting_to_restart", rest.message)
        return [queued for queued in queue if queued.waiting.job not in rests]

    def _needs(self, job_id: str) -> Room:
        """Return what a job needs; its specification is read and parsed only once."""
        if job_id not in self._known_needs:
            workers = parse_spec(self._jobs.get(job_id).spec).workers
            self._known_needs[job_id] = room_needed(workers)
        return self._known_needs[job_id]

    def _note_reason(self, queued: _Queued, reason: str, message: str | None) -> None:
        """Store why a job waits; a new reason, unlike a new message, is also an event."""
        if queued.noted == (reason, message):
            return
        with self._jobs.change(queued.waiting.job) as (session, row):
            if row.state != JobState.QUEUED:
                return
            is_new = row.reason != reason
            row.reason, row.message = reason, message
            touch(row, time.time())
            if is_new:
                note(session, row, "waiting", message or "", time.time())

    def _kill_strays(self) -> None:
        """Kill attempts that run although they should not: two must never run the same job."""
        for key, status in self._runner.list().items():
            if not status.is_over and self._is_stray(key):
                _log.warning("attempt %s should not run: killed", key.submission_id)
                self._runner.kill(key)

    def _is_stray(self, key: AttemptKey) -> bool:
        with self._jobs.store.read() as session:
            row = session.scalar(select(JobRow).where(JobRow.id == key.job))
        # A job that this store does not know belongs to another server of the same cluster.
        return row is not None and (row.attempt != key.attempt or row.state not in ACTIVE)


class _Queued(NamedTuple):
    """A queued job, and the reason and message noted in it before."""

    waiting: Waiting
    noted: tuple[str | None, str | None]
