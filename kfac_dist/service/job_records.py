"""What the control plane knows, as data. Times are in Unix seconds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from kfac_dist.coordination.jobs.lifecycle import JobState
from kfac_dist.errors import FirstFailure
from kfac_dist.runs import Event

Order = Literal["none", "pause", "cancel"]
"""What a driver is told in answer to a report."""


_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")


def is_job_id(text: str) -> bool:
    """Whether a job may have this id, which is also the name of its folder."""
    return _JOB_ID.fullmatch(text) is not None


class Role(StrEnum):
    """What the holder of a token may do; each may do all that those before it may."""

    VIEWER = "viewer"
    """Look at every job."""
    SUBMITTER = "submitter"
    """Submit jobs, and do everything with these."""
    ADMIN = "admin"
    """Everything, with every job and token."""

    def includes(self, needed: Role) -> bool:
        """Whether this role may do what `needed` may."""
        roles = list(Role)
        return roles.index(self) >= roles.index(needed)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as it stands.

    `reason` is a machine word for the state, `message` a sentence. `attempt` is 0 before the
    first, `num_restarts` counts those that the job made by itself since a user last asked for one.
    `spec` is resolved, every default included; `step` is the last step that is known to be
    recorded. `summary` is the run's `summary.json`. `revision` grows by one with each change.
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
    """sha256 of the user code that came with it."""
    summary: Mapping[str, Any] | None
    revision: int
    idempotency_key: str | None


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One submission to the cluster, `<job>-a<number>` there; numbers count from 1.

    `resumed_from_step` is the step of the checkpoint it goes on from, 0 from the beginning, None
    while that is not known.
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
    """Something that happened to a job, told by its driver or by the control plane.

    `sequence` counts 1, 2, ... for each job, in the order in which they became known.
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
    """A line of a worker's log, without its newline; `time` in Unix seconds, if it says one."""

    role: str
    rank: int
    attempt: int
    text: str
    time: float | None


@dataclass(frozen=True, kw_only=True)
class MetricPoint:
    """A value at a step; NaN where it was not finite."""

    step: int
    time: float
    value: float


@dataclass(frozen=True, kw_only=True)
class MetricSeries:
    """The history of one metric in ascending steps.

    A point stands for `sampled_every` steps: 1 is every step, above that it is their mean, for
    staleness their maximum, and has the last step and time of them.
    """

    name: str
    points: Sequence[MetricPoint]
    sampled_every: int


@dataclass(frozen=True, kw_only=True)
class CheckpointFacts:
    """A checkpoint as it lies on the server's file system, with the bytes of all its files."""

    step: int
    path: str
    size_bytes: int
    created_at: float


@dataclass(frozen=True, kw_only=True)
class ReportedEvent:
    """An event of the run folder; `line` is its line in `events.jsonl`, counted from 1."""

    line: int
    event: Event


@dataclass(frozen=True, kw_only=True)
class StepValues:
    """What was measured in one step, by metric name such as `objective` or `damping`."""

    step: int
    time: float
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class ReportedState:
    """Where the run stands: `job.json`, and `summary.json` once it has ended.

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
    """What a driver tells: all of it may be told again without harm. Empty, it is a heartbeat."""

    job: str
    attempt: int
    state: ReportedState | None = None
    events: Sequence[ReportedEvent] = field(default_factory=tuple)
    steps: Sequence[StepValues] = field(default_factory=tuple)

    @property
    def is_empty(self) -> bool:
        """Whether it tells nothing but that its driver lives."""
        return self.state is None and not self.events and not self.steps


@dataclass(frozen=True, kw_only=True)
class ReportAnswer:
    """What the driver is to do, and what is known of its run.

    A driver goes on reporting at line `events_known` + 1 and after step `steps_known`. `fenced`
    tells a driver that another attempt has taken its place: it is to end at once.
    """

    order: Order
    events_known: int
    steps_known: int
    fenced: bool = False
