"""One attempt of a job: start it, watch it, end it, and make sure that nothing of it is left."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

from sqlalchemy.orm import Session

from kfac_dist.coordination.jobs.lifecycle import ACTIVE, JobState, Trigger
from kfac_dist.coordination.jobs.placement import NO_ROOM_REASON
from kfac_dist.coordination.jobs.runner import (
    AttemptKey,
    JobRunner,
    Remnant,
    RunnerState,
    RunnerStatus,
)
from kfac_dist.coordination.jobs.supervision import (
    PREEMPTED_REASON,
    Action,
    AttemptView,
    ClusterWord,
    Decision,
    EarlierEnd,
    WaitLimits,
    decide,
)
from kfac_dist.errors import KfacDistError, UnreachableError
from kfac_dist.runs.records import Severity
from kfac_dist.runs.run_places import RunPlaces
from kfac_dist.service.access.tokens import hash_secret
from kfac_dist.service.control.launching import begin_attempt, prepare_folder
from kfac_dist.service.control.restarts import (
    ATTEMPT_ENDED_EVENT,
    earlier_ends,
    num_preemptions,
)
from kfac_dist.service.control.silence import SilenceNotes
from kfac_dist.service.jobs import Jobs
from kfac_dist.service.reporting.run_reader import RunReader
from kfac_dist.service.store import AttemptRow, JobRow
from kfac_dist.service.store.job_rows import find, find_attempt, move, note, text_of, to_job

_READ_FOLDER_SECONDS = 3.0  # without a report; then the run folder is read instead
_REMNANTS_SECONDS = 10.0  # after a kill; remnants that are still there become an event

_CLUSTER_WORDS: dict[RunnerState, ClusterWord] = {
    RunnerState.UNKNOWN: "unknown",
    RunnerState.PENDING: "pending",
    RunnerState.RUNNING: "running",
}
_SEVERITIES: dict[Trigger, Severity] = {Trigger.FAIL: "error", Trigger.RESTART: "warning"}
# How an attempt ended whose driver could not report its end, by what happens to the job.
_SILENT_ENDS = {
    Trigger.SUCCEED: JobState.SUCCEEDED,
    Trigger.FAIL: JobState.FAILED,
    Trigger.RESTART: JobState.FAILED,
    Trigger.HALT: JobState.PAUSED,
    Trigger.VANISH: JobState.CANCELLED,
}


def start_attempt(jobs: Jobs, runner: JobRunner, job_id: str) -> None:
    """Store the next attempt of a queued job, then submit it to the cluster.

    Raises:
        UnreachableError: the cluster does not answer; the attempt will be submitted later.
    """
    token = secrets.token_urlsafe(32)
    with jobs.change(job_id) as (session, row):
        if row.state != JobState.QUEUED:
            return  # a user has cancelled or paused the job since it was admitted
        resumes = RunPlaces(Path(row.run_dir)).has_run
        begin_attempt(session, row, token, resumes=resumes, now=time.time())
    _submit(jobs, runner, row, token)


def _submit(jobs: Jobs, runner: JobRunner, row: JobRow, token: str) -> None:
    """Prepare the run folder and submit; an attempt that cannot be submitted has failed."""
    key = AttemptKey(row.id, row.attempt)
    try:
        prepare_folder(jobs, to_job(row), token)
        runner.submit(key, Path(row.run_dir))
    except UnreachableError:
        raise
    except (KfacDistError, OSError) as error:
        message = error.message if isinstance(error, KfacDistError) else str(error)
        with jobs.change(row.id) as (session, locked):
            attempt = find_attempt(session, locked)
            if attempt is not None and attempt.number == key.attempt:
                attempt.state, attempt.ended_at = JobState.FAILED, time.time()
                attempt.reason, attempt.message = "not_launched", message


class Supervisor:
    """Looks after the attempts on the cluster. Not thread-safe: the controller's thread owns it."""

    def __init__(self, jobs: Jobs, runner: JobRunner, limits: WaitLimits) -> None:
        self._jobs = jobs
        self._runner = runner
        self._limits = limits
        self._readers: dict[AttemptKey, RunReader] = {}
        self._stopped: set[AttemptKey] = set()
        self._silence = SilenceNotes(jobs, limits.silence_seconds)
        self._remnants_since: dict[AttemptKey, float] = {}

    def look_after(self, job_id: str) -> None:
        """Decide what to do about the newest attempt of a job, and do it.

        Raises:
            UnreachableError: the cluster or the store does not answer.
        """
        row, attempt = self._load(job_id)
        if attempt is None or row.state not in ACTIVE:
            return
        key = AttemptKey(row.id, attempt.number)
        try:
            status = self._runner.status(key)
        except UnreachableError:
            if attempt.ended_at is None and _is_silent(attempt):
                self._read_folder(key, Path(row.run_dir))
            raise
        if attempt.ended_at is None and (status.is_over or _is_silent(attempt)):
            self._read_folder(key, Path(row.run_dir))
            row, attempt = self._load(job_id)
            if attempt is None or attempt.number != key.attempt:
                return
        decision = decide(self._view(row, attempt, status), self._limits)
        if decision.action is Action.WAIT:
            self._silence.update(job_id, row, attempt)
        self._act(key, row, decision)

    def note_unreachable(self, job_id: str, problem: str) -> None:
        """Say in a job that is not heard from that the cluster cannot be asked about it either."""
        row, attempt = self._load(job_id)
        if attempt is not None:
            self._silence.update(job_id, row, attempt, problem)

    def _load(self, job_id: str) -> tuple[JobRow, AttemptRow | None]:
        with self._jobs.store.read() as session:
            row = find(session, job_id)
            return row, find_attempt(session, row)

    def _view(self, row: JobRow, attempt: AttemptRow, status: RunnerStatus) -> AttemptView:
        preemptions = 0
        if attempt.reason == PREEMPTED_REASON:
            with self._jobs.store.read() as session:
                preemptions = num_preemptions(session, row)
        return _view(row, attempt, status, self._earlier_ends(row), preemptions)

    def _earlier_ends(self, row: JobRow) -> Sequence[EarlierEnd]:
        """Return how the attempts ended that automatic restarts have replaced, newest first."""
        if not row.num_restarts:
            return ()
        with self._jobs.store.read() as session:
            return earlier_ends(session, row)

    def _read_folder(self, key: AttemptKey, run_dir: Path) -> None:
        """Store what the driver wrote into its run folder but did not report."""
        reader = self._readers.setdefault(key, RunReader(run_dir, key.job, key.attempt))
        while True:
            report = reader.read()
            if report.is_empty:
                return
            has_more = reader.has_more
            reader.acknowledge(self._jobs.report(report, heard=False))
            if not has_more:
                return

    def _act(self, key: AttemptKey, row: JobRow, decision: Decision) -> None:
        match decision.action:
            case Action.SUBMIT:
                self._submit_again(key)
            case Action.STOP if key not in self._stopped:
                self._stopped.add(key)
                self._runner.stop(key)
            case Action.KILL:
                self._runner.kill(key)
            case Action.SETTLE:
                self._settle(key, row, decision)

    def _submit_again(self, key: AttemptKey) -> None:
        """Submit an attempt that the cluster does not know: a server died before it could.

        The token of the first submission is lost with that server, so the driver gets a new one.
        """
        token = secrets.token_urlsafe(32)
        with self._jobs.change(key.job) as (session, row):
            attempt = find_attempt(session, row)
            if attempt is None or attempt.number != key.attempt or row.state not in ACTIVE:
                return
            attempt.token_sha256 = hash_secret(token)
        _submit(self._jobs, self._runner, row, token)

    def _settle(self, key: AttemptKey, row: JobRow, decision: Decision) -> None:
        """Kill what is left of an attempt; once nothing is left, move its job on."""
        remnants = self._runner.remains(key)
        if remnants:
            self._runner.kill(key)
            self._note_remnants(key, remnants)
            return
        with self._jobs.change(key.job) as (session, locked):
            # The decision holds only for what it was made from: a user may have changed the job.
            if (locked.state, locked.attempt) == (row.state, key.attempt):
                _conclude(session, locked, decision)
        self._readers.pop(key, None)
        self._stopped.discard(key)
        self._remnants_since.pop(key, None)

    def _note_remnants(self, key: AttemptKey, remnants: Sequence[Remnant]) -> None:
        """Add one event about remnants that survive being killed."""
        since = self._remnants_since.setdefault(key, time.monotonic())
        if time.monotonic() - since < _REMNANTS_SECONDS:
            return
        self._remnants_since[key] = math.inf  # so that there is no second event
        what = ", ".join(remnant.description for remnant in remnants)
        with self._jobs.change(key.job) as (session, row):
            message = f"still there although it was killed: {what}"
            note(session, row, "remnants", message, time.time(), severity="warning")


def _is_silent(attempt: AttemptRow) -> bool:
    return time.time() - (attempt.heard_at or attempt.started_at) > _READ_FOLDER_SECONDS


def _view(
    row: JobRow,
    attempt: AttemptRow,
    status: RunnerStatus,
    earlier: Sequence[EarlierEnd],
    preemptions: int,
) -> AttemptView:
    """Return what the rules of supervision need to know about an attempt."""
    now = time.time()
    told_end = JobState(attempt.state) if attempt.ended_at is not None else None
    return AttemptView(
        job_state=JobState(row.state),
        state_seconds=now - row.state_since,
        cancel_now=row.cancel_now,
        attempt_seconds=now - attempt.started_at,
        silent_seconds=None if attempt.heard_at is None else now - attempt.heard_at,
        told_end=told_end,
        told_seconds=now - (attempt.ended_at or now),
        reason=attempt.reason,
        message=attempt.message,
        cluster=_CLUSTER_WORDS.get(status.state, "over"),
        cluster_message=status.message,
        num_restarts=row.num_restarts,
        max_restarts=int(row.spec["faults"]["max_restarts"]),
        num_preemptions=preemptions,
        max_preemptions=row.spec["faults"].get("max_preemptions"),
        step=row.steps_known,
        earlier=earlier,
    )


def _conclude(session: Session, row: JobRow, decision: Decision) -> None:
    """Move a job on after the end of its newest attempt."""
    trigger = decision.event
    assert trigger is not None, "a decision to settle has a trigger"
    now = time.time()
    attempt = find_attempt(session, row)
    assert attempt is not None, "a decision to settle is about an attempt"
    if attempt.ended_at is None:  # its driver did not report the end
        attempt.state, attempt.ended_at = _SILENT_ENDS[trigger], now
        attempt.reason, attempt.message = decision.reason, text_of(decision.message)
    move(session, row, trigger, now, reason=decision.reason, message=decision.message)
    if trigger is Trigger.RESTART and decision.reason not in (NO_ROOM_REASON, PREEMPTED_REASON):
        row.num_restarts += 1
    why = f": {decision.message}" if decision.message else ""
    message = f"attempt {attempt.number} ended and nothing of it is left on the cluster{why}"
    severity: Severity = _SEVERITIES.get(trigger, "info")
    note(session, row, ATTEMPT_ENDED_EVENT, message, now, severity=severity)
