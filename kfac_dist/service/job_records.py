"""The records of the control plane: jobs, attempts, events, metrics, reports.

All times are in Unix seconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from kfac_dist.coordination.jobs.lifecycle import JobState
from kfac_dist.errors import FirstFailure, UsageError
from kfac_dist.runs import Event

Order = Literal["none", "pause", "cancel"]
"""What the answer to a report asks the driver to do."""

_MAX_PRIORITY = 1000
_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")


def is_job_id(text: str) -> bool:
    """Return whether a job may have this id, which is also the name of its run folder."""
    return _JOB_ID.fullmatch(text) is not None


def check_priority(priority: int) -> None:
    """Refuse a priority out of range.

    Raises:
        UsageError: names the range.
    """
    if not -_MAX_PRIORITY <= priority <= _MAX_PRIORITY:
        allowed = f"{-_MAX_PRIORITY} and {_MAX_PRIORITY}"
        raise UsageError(f"priority: {priority} is not between {allowed}")


class Role(StrEnum):
    """What the holder of a token may do. Each role includes the ones before it."""

    VIEWER = "viewer"
    """Read every job."""
    SUBMITTER = "submitter"
    """Submit jobs, and control the jobs submitted with the same token name."""
    ADMIN = "admin"
    """Control every job."""

    def includes(self, needed: Role) -> bool:
        """Return whether this role may do everything that `needed` may do."""
        roles = list(Role)
        return roles.index(self) >= roles.index(needed)


@dataclass(frozen=True, kw_only=True)
class Job:
    """The current state of a job.

    `reason` is a machine-readable word for the state, `message` a sentence. `attempt` is the
    number of the newest attempt, 0 before the first. `num_restarts` counts automatic restarts
    since a user last asked for an attempt. `spec` is resolved: it has every default. `step` is the
    last recorded step that the server knows. `summary` is the run's `summary.json`. `revision`
    grows with each change.
    """

    id: str
    name: str
    owner: str
    state: JobState
    reason: str | None
    message: str | None
    first_failure: FirstFailure | None
    attempt: int
    num_restarts: int
    priority: int
    spec: Mapping[str, Any]
    step: int
    num_steps: int
    created_at: float
    updated_at: float
    started_at: float | None
    ended_at: float | None
    run_dir: str
    data_dir: str | None
    package: str | None
    """SHA-256 of the user's code, None for a built-in task."""
    summary: Mapping[str, Any] | None
    revision: int
    idempotency_key: str | None


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One submission of a job to the cluster, named `<job>-a<number>` there; numbers start at 1.

    `resumed_from_step` is the step of the checkpoint from which it resumed, 0 for the beginning,
    None while that is unknown.
    """

    job: str
    number: int
    state: JobState
    reason: str | None
    message: str | None
    started_at: float
    ended_at: float | None
    heard_at: float | None
    """When the driver last reported."""
    resumed_from_step: int | None


@dataclass(frozen=True, kw_only=True)
class JobEvent:
    """Something that happened to a job, reported by its driver or noted by the control plane.

    `sequence` counts 1, 2, ... within the job, in the order in which the server stored the events.
    """

    job: str
    sequence: int
    kind: str
    message: str
    step: int
    time: float
    severity: str
    role: str | None
    rank: int | None
    attempt: int
    details: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class LogLine:
    """A line of a worker's log without its newline; `time` is None for a line without one."""

    role: str
    rank: int
    attempt: int
    text: str
    time: float | None


@dataclass(frozen=True, kw_only=True)
class MetricPoint:
    """A metric's value at a step; NaN stands for any value that was not finite."""

    step: int
    time: float
    value: float


@dataclass(frozen=True, kw_only=True)
class MetricSeries:
    """The history of one metric, in ascending order of steps.

    Each point stands for `sampled_every` steps. Above 1, its value is their mean, or for staleness
    their maximum, and its step and time are those of the last of them.
    """

    name: str
    points: Sequence[MetricPoint]
    sampled_every: int


@dataclass(frozen=True, kw_only=True)
class CheckpointFacts:
    """A checkpoint on the server's file system; `size_bytes` sums all its files."""

    step: int
    path: str
    size_bytes: int
    created_at: float


@dataclass(frozen=True, kw_only=True)
class ReportedEvent:
    """An event from the run folder; `line` is its line in `events.jsonl`, from 1."""

    line: int
    event: Event


@dataclass(frozen=True, kw_only=True)
class StepValues:
    """The measurements of one step, by metric name such as `objective` or `damping`."""

    step: int
    time: float
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class ReportedState:
    """The state of a run, from its `job.json`, and from `summary.json` once it has ended.

    `state` is STARTING, RUNNING, DEGRADED, PAUSED, SUCCEEDED, FAILED or CANCELLED.
    """

    state: JobState
    step: int
    reason: str | None = None
    message: str | None = None
    first_failure: FirstFailure | None = None
    resumed_from_step: int | None = None
    summary: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """News of one attempt. Reporting the same news twice is harmless; empty, it is a heartbeat."""

    job: str
    attempt: int
    state: ReportedState | None = None
    events: Sequence[ReportedEvent] = field(default_factory=tuple)
    steps: Sequence[StepValues] = field(default_factory=tuple)

    @property
    def is_empty(self) -> bool:
        """Whether it says nothing except that the driver is alive."""
        return self.state is None and not self.events and not self.steps


@dataclass(frozen=True, kw_only=True)
class ReportAnswer:
    """What the driver should do, and what the server knows of its run.

    The driver continues its reports at line `events_known` + 1 of its events and after step
    `steps_known`. `fenced` means that another attempt has replaced the driver's, which must end
    at once. The job shall have this many workers; None where the server does not say.
    """

    order: Order
    events_known: int
    steps_known: int
    fenced: bool = False
    gradient_workers: int | None = None
    inverse_workers: int | None = None
