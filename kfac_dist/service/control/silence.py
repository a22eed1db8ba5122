"""Notes in a job that its driver is not heard from, so that a user does not just read RUNNING."""

from __future__ import annotations

import time
from datetime import UTC, datetime

from kfac_dist.coordination.jobs.lifecycle import JobState
from kfac_dist.service.jobs import Jobs
from kfac_dist.service.store import AttemptRow, JobRow
from kfac_dist.service.store.job_rows import find_attempt, note, text_of, touch

SILENT, UNREACHABLE = "driver_silent", "cluster_unreachable"
"""Reasons of a job in training: only its driver is silent, or the cluster is not reached either."""

# While a job is to pause or to be cancelled, its reason is that request.
_NOTED = (JobState.STARTING, JobState.RESUMING, JobState.RUNNING, JobState.DEGRADED)


class SilenceNotes:
    """Keeps the reason of a job in training up to date with what is heard of its driver."""

    def __init__(self, jobs: Jobs, silence_seconds: float) -> None:
        """Begin now: a driver has `silence_seconds` to find a server that has just started."""
        self._jobs = jobs
        self._silence_seconds = silence_seconds
        self._begun = time.time()

    def update(
        self, job_id: str, row: JobRow, attempt: AttemptRow, problem: str | None = None
    ) -> None:
        """Note that the driver is silent, or that it is heard again.

        Args:
            job_id: the job.
            row: the job as it was read.
            attempt: its newest attempt as it was read.
            problem: why the cluster cannot be asked, None if it can.
        """
        wanted = self._silence(attempt, problem)
        noted = row.reason in (SILENT, UNREACHABLE)
        if (wanted is None and not noted) or wanted == (row.reason, row.message):
            return
        if attempt.ended_at is not None or row.state not in _NOTED:
            return
        with self._jobs.change(job_id) as (session, locked):
            now = time.time()
            if (locked.state, locked.attempt) != (row.state, attempt.number):
                return
            newest = find_attempt(session, locked)
            if wanted is not None:
                reason, message = wanted
                if locked.reason != reason:
                    note(session, locked, reason, message, now, severity="warning")
                locked.reason, locked.message = wanted
            elif newest is not None:  # back to what the driver has said
                locked.reason, locked.message = newest.reason, newest.message
            touch(locked, now)

    def _silence(self, attempt: AttemptRow, problem: str | None) -> tuple[str, str] | None:
        """Return reason and message for a driver that is silent, None for one that is not."""
        heard = attempt.heard_at or attempt.started_at
        if time.time() - max(heard, self._begun) <= self._silence_seconds:
            return None
        since = datetime.fromtimestamp(heard, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        what = "" if attempt.heard_at else ", when the attempt began"
        message = f"the driver has not reported since {since}{what}"
        if problem is None:
            return SILENT, f"{message}; the cluster says that it runs"
        return UNREACHABLE, text_of(f"{message}; {problem}") or message
