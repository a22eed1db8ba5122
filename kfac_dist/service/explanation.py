"""Why a job is where it is: the first failure before its echoes, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kfac_dist.coordination.jobs.lifecycle import JobState
from kfac_dist.errors import FirstFailure
from kfac_dist.service.job_records import Job, JobEvent

_ECHO_SEVERITIES = ("warning", "error")

# By `reason`; what is not here explains itself by its message.
_ADVICE = {
    "bad_data": "Look at the case that the message names; the whole set was read before the start.",
    "bad_steps": "The numbers broke down: a larger damping.initial, float64 or a smaller batch is "
    "steadier. `kfac-dist metrics ID reduction_ratio damping` shows how it came.",
    "user_task": "The task's own code raised; the traceback is in the log of that worker.",
    "worker_died": "Killed from outside or out of memory, mostly; the machine's kernel log knows. "
    "`kfac-dist retry ID` goes on at the newest checkpoint.",
    "driver_died": "The driver's log is `kfac-dist logs ID --role driver`. `kfac-dist retry ID` "
    "goes on at the newest checkpoint.",
    "start_timed_out": "The cluster took the job and did not start it: look at its load with "
    "`kfac-dist cluster status`, then `kfac-dist retry ID`.",
    "insufficient_resources": "It will never fit on this cluster: lower `workers`, or add nodes.",
    "waiting_for_room": "It starts by itself when jobs that run now have ended.",
    "waiting_for_turn": "A larger --priority at submission goes before; it starts by itself.",
    "inverse_worker_died": "Training goes on with the last inverses; the worker is replaced by "
    "itself, and the job is RUNNING again when they are fresh enough.",
    "peers_lost": "A gradient worker or the network between them failed; the first failure names "
    "the one that was first.",
    "internal_error": "This is a bug of kfac_dist; please report it with the driver's log.",
    "checkpoint_not_written": "Look at the space and the permissions of the run's folder.",
}
_OF_STATE = {
    JobState.PENDING: "The controller has not seen it yet; it does so within seconds.",
    JobState.STARTING: "Driver and workers start, which takes some seconds.",
    JobState.PAUSED: "`kfac-dist resume ID` lets it go on.",
    JobState.CANCELLING: "It is CANCELLED once nothing of it is left in the cluster.",
}


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why a job is where it is.

    `echoes` are the warnings and errors that came after the first failure, oldest first. Without
    a first failure they are all there were.
    """

    job: str
    state: JobState
    reason: str | None
    message: str | None
    first_failure: FirstFailure | None
    echoes: Sequence[JobEvent]
    advice: str | None


def explain_job(job: Job, events: Sequence[JobEvent]) -> Explanation:
    """Explain a job from what is known of it; `events` in the order of their sequence."""
    first = job.first_failure
    echoes = [
        event
        for event in events
        if event.severity in _ECHO_SEVERITIES
        and event.attempt in (0, job.attempt)
        and (first is None or not _is_of(event, first))
    ]
    advice = _ADVICE.get(job.reason or "") or _OF_STATE.get(job.state)
    return Explanation(
        job=job.id,
        state=job.state,
        reason=job.reason,
        message=job.message,
        first_failure=first,
        echoes=sorted(echoes, key=lambda event: (event.time, event.sequence)),
        advice=None if advice is None else advice.replace(" ID", f" {job.id}"),
    )


def _is_of(event: JobEvent, failure: FirstFailure) -> bool:
    """Whether an event tells of that failure itself, or of something before it."""
    is_same = (event.role, event.rank) == (failure.role, failure.rank)
    return is_same or event.time < failure.time_seconds
