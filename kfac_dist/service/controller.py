"""The control loop: queue and cluster are looked at again and again, and made to agree.

The rules are in `coordination.admission` and `coordination.supervision`; here they are given what
is known, and done as they say. All that is durable is in the store: a controller that was killed
goes on where it was.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from sqlalchemy import select

from kfac_dist.config import parse_spec
from kfac_dist.coordination.admission import NOTHING, Room, Verdict, Waiting, admit
from kfac_dist.coordination.lifecycle import ACTIVE, Event, JobState
from kfac_dist.coordination.runner import AttemptKey, ClusterResources, JobRunner
from kfac_dist.coordination.supervision import Limits
from kfac_dist.errors import KfacDistError, UnreachableError
from kfac_dist.service.attempts import Supervisor, start_attempt
from kfac_dist.service.job_rows import move, note, touch
from kfac_dist.service.jobs import Jobs
from kfac_dist.service.store import JobRow

_log = logging.getLogger(__name__)

_PERIOD_SECONDS = 1.0
_LEAST_SECONDS = 0.1  # between two looks, however many reports come in
_STRAYS_SECONDS = 60.0


class Controller:
    """Runs the jobs in `jobs` by `runner`; `start` and `stop` it once."""

    def __init__(self, jobs: Jobs, runner: JobRunner, limits: Limits | None = None) -> None:
        self._jobs = jobs
        self._runner = runner
        self._supervisor = Supervisor(jobs, runner, limits or Limits())
        self._wake = threading.Event()
        self._stopping = False
        self._strays_at = 0.0
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
        return len(self._rows(ACTIVE))

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
        for row in self._rows({JobState.PENDING}):
            with self._jobs.change(row.id) as (session, locked):
                if locked.state == JobState.PENDING:
                    move(session, locked, Event.ENQUEUE, time.time())
        for row in self._rows(ACTIVE):
            self._guarded(row)
        self._start_admitted()
        if time.monotonic() - self._strays_at > _STRAYS_SECONDS:
            self._end_strays()
            self._strays_at = time.monotonic()

    def _guarded(self, row: JobRow) -> None:
        """Look after one job; what is wrong with it must not keep the others waiting."""
        try:
            self._supervisor.look_after(row.id)
        except UnreachableError:
            raise
        except KfacDistError as error:
            _log.error("job %s: %s", row.id, error.message)

    def _rows(self, states: frozenset[JobState] | set[JobState]) -> Sequence[JobRow]:
        with self._jobs.store.read() as session:
            query = select(JobRow).where(JobRow.state.in_(sorted(states)))
            return session.scalars(query.order_by(JobRow.number)).all()

    def _start_admitted(self) -> None:
        queue = self._rows({JobState.QUEUED})
        if not queue:
            return
        used = sum((_needs(row) for row in self._rows(ACTIVE)), NOTHING)
        waiting = [
            Waiting(job=row.id, number=row.number, priority=row.priority, needs=_needs(row))
            for row in queue
        ]
        try:
            cluster = _room(self._runner.resources())
        except UnreachableError as error:
            for row in queue:
                self._tell_why(
                    Verdict(job=row.id, reason="cluster_unreachable", message=error.message)
                )
            raise
        for verdict in admit(waiting, cluster, used):
            if verdict.reason is None:
                start_attempt(self._jobs, self._runner, verdict.job)
            else:
                self._tell_why(verdict)

    def _tell_why(self, verdict: Verdict) -> None:
        with self._jobs.change(verdict.job) as (session, row):
            if row.state != JobState.QUEUED or row.message == verdict.message:
                return
            known = row.reason == verdict.reason
            row.reason, row.message = verdict.reason, verdict.message
            touch(row, time.time())
            if not known:
                note(session, row, "waiting", verdict.message or "", time.time())

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


def _needs(row: JobRow) -> Room:
    spec = parse_spec(row.spec)
    workers = spec.workers
    # A GPU is shared by all members of a job where there are fewer than members.
    return Room(
        cpus=workers.gradient * (workers.threads or 1),
        gpus=1 if workers.device == "cuda" else 0,
        inverse_slots=workers.inverse,
    )


def _room(resources: ClusterResources) -> Room:
    return Room(
        cpus=resources.num_cpus,
        gpus=resources.num_gpus,
        inverse_slots=resources.num_inverse_slots,
    )
