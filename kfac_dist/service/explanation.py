"""Explains why a job is in its state: its first failure, what followed from it, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kfac_dist.coordination.jobs.lifecycle import JobState
from kfac_dist.errors import FirstFailure
from kfac_dist.service.job_records import Attempt, Job, JobEvent

_ECHO_SEVERITIES = ("warning", "error")
_CHANGES = ("member_joined", "member_left")  # they say how a loss was dealt with

# By the job's `reason`. For other reasons its message says enough.
_ADVICE_BY_REASON = {
    "bad_data": "Correct the case that the message names; the whole data set is checked before "
    "the first step.",
    "bad_steps": "Training diverged. A larger damping.initial, float64 or a smaller batch makes it "
    "more stable; `kfac-dist metrics ID reduction_ratio damping` shows how it came to that.",
    "user_task": "The task's own code raised an exception; its traceback is in that worker's log.",
    "gpu_memory": "The job does not fit into the memory of its GPU; the message says what makes it "
    "smaller.",
    "worker_died": "The worker was probably killed from outside or for lack of memory; the "
    "machine's kernel log says which. `kfac-dist retry ID` resumes at the newest checkpoint.",
    "driver_died": "Read the driver's log with `kfac-dist logs ID --role driver`. "
    "`kfac-dist retry ID` resumes at the newest checkpoint.",
    "start_timed_out": "The cluster accepted the job but did not start it: check its load with "
    "`kfac-dist cluster status`, then `kfac-dist retry ID`.",
    "insufficient_resources": "The cluster has too little of what the message names. Lower "
    "`workers`, or add nodes; for inverse workers, start nodes with "
    "--resources='{\"inverse\": N}', which no node of a cluster of your own has by itself.",
    "waiting_for_room": "It will start by itself when running jobs have ended.",
    "waiting_for_turn": "It will start by itself. A job submitted with a larger --priority starts "
    "earlier.",
    "waiting_to_restart": "It will start by itself at that time. Pauses between automatic restarts "
    "grow from 2 s to 300 s; `kfac-dist pause ID` and `kfac-dist resume ID` start it at once.",
    "inverse_worker_died": "Training continues with the last inverses. The worker is replaced "
    "automatically, and the job is RUNNING again when its inverses are fresh enough.",
    "gradient_workers_missing": "Training continues with the gradient workers that are there; the "
    "others join when they have started, which needs room on the cluster "
    "(`kfac-dist cluster status`). `kfac-dist scale ID --gradient N` is content with fewer.",
    "preempted": "The machine of a worker was taken away, too often for faults.max_preemptions. "
    "`kfac-dist retry ID` resumes at the newest checkpoint.",
    "peers_lost": "A gradient worker or the network between them failed; the first failure names "
    "where it began.",
    "node_lost": "Ray died on the machine, probably for lack of memory. `kfac-dist retry ID` "
    "resumes at the newest checkpoint.",
    "run_folder_lost": "The run's folder was removed, moved or unmounted; put it back, then "
    "`kfac-dist retry ID`.",
    "run_folder_not_written": "Check the free space and the permissions of the run's folder.",
    "diverged": "All steps were done, and the objective is far worse than at the start: try more "
    "damping, or a lower learning rate.",
    "internal_error": "This is a bug of kfac_dist; please report it with the driver's log.",
    "checkpoint_not_written": "Check the free space and the permissions of the run's folder.",
}
# By the job's state, where its reason has no advice.
_ADVICE_BY_STATE = {
    JobState.PENDING: "The controller will queue it within seconds.",
    JobState.STARTING: "The driver and the workers are starting, which takes some seconds.",
    JobState.PAUSED: "`kfac-dist resume ID` resumes it.",
    JobState.CANCELLING: "It will be CANCELLED once nothing of it is left on the cluster.",
}


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why a job is in its state.

    `attempts` are all of them, oldest first. `echoes` are the warnings, errors and changes of the
    members of the newest attempt that came after the first failure, oldest first. Without a first
    failure they are all that it has.
    """

    job: str
    state: JobState
    reason: str | None
    message: str | None
    attempts: Sequence[Attempt]
    first_failure: FirstFailure | None
    echoes: Sequence[JobEvent]
    advice: str | None


def explain_job(
    job: Job, events: Sequence[JobEvent], attempts: Sequence[Attempt] = ()
) -> Explanation:
    """Explain a job from its record, all its events and its attempts."""
    return Explanation(
        job=job.id,
        state=job.state,
        reason=job.reason,
        message=job.message,
        attempts=attempts,
        first_failure=job.first_failure,
        echoes=_echoes(job, events),
        advice=_advice(job),
    )


def _echoes(job: Job, events: Sequence[JobEvent]) -> list[JobEvent]:
    first = job.first_failure
    echoes = [
        event
        for event in events
        if (event.severity in _ECHO_SEVERITIES or event.kind in _CHANGES)
        and event.attempt in (0, job.attempt)
        and (first is None or _is_echo(event, first))
    ]
    return sorted(echoes, key=lambda event: (event.time, event.sequence))


def _is_echo(event: JobEvent, failure: FirstFailure) -> bool:
    """Return whether an event came after the failure and is about another worker."""
    is_same_worker = (event.role, event.rank) == (failure.role, failure.rank)
    return not is_same_worker and event.time >= failure.time_seconds


def _advice(job: Job) -> str | None:
    advice = _ADVICE_BY_REASON.get(job.reason or "") or _ADVICE_BY_STATE.get(job.state)
    return None if advice is None else advice.replace(" ID", f" {job.id}")
