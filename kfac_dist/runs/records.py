"""What a run records: events, the state of the job, its summary (steps: `step_record`).

These are the lines of `events.jsonl`, and all of `job.json` and `summary.json`. A number that is
not finite is null in JSON and NaN in Python.
"""

from __future__ import annotations

import json
import math
import time
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from kfac_dist.errors import FirstFailure, JobFailedError, KfacDistError, reason_of


def _nan_for_null(value: object) -> object:
    return math.nan if value is None else value


Measured = Annotated[float, BeforeValidator(_nan_for_null)]
"""A measured number: NaN where it is null in JSON."""

RunState = Literal[
    "STARTING",
    "RUNNING",
    "DEGRADED",
    "PAUSED",
    "SUCCEEDED",
    "FAILED",
    "CANCELLED",
    "INTERRUPTED",
]
"""The last is never written: readers see it if the process of an unfinished run is gone."""

ENDED: frozenset[RunState] = frozenset(
    {"PAUSED", "SUCCEEDED", "FAILED", "CANCELLED", "INTERRUPTED"}
)
"""States of a run that no process works on."""

Severity = Literal["info", "warning", "error"]
InversionResult = Literal["ok", "rescued", "failed"]

Metrics = dict[str, Measured]
"""Means over cases: `objective` in nats, and the task's own, such as `accuracy`."""


class RunRecord(BaseModel):
    """Base class of the records in a run folder; an unknown key counts as damage."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")


class StalenessSummary(RunRecord):
    """Over the layers: the current step minus that of the newest statistics in the inverse used."""

    mean: float
    max: float


class Inversion(RunRecord):
    """One inversion of a layer, for all gammas tried; it took `seconds`.

    `result` is "rescued" if it needed float64 or more damping, and "failed" if it found no inverse
    for some gamma.
    """

    layer: str
    seconds: float
    result: InversionResult


class Evaluation(RunRecord):
    """Means over the whole training and test sets.

    The averaged ones are those of the Polyak average; null while averaging is off or has not begun.
    """

    train: Metrics
    test: Metrics
    train_averaged: Metrics | None = None
    test_averaged: Metrics | None = None


class Event(RunRecord):
    """Something that happened to a job: a worker died, a checkpoint was written.

    `kind` is a machine word such as `inverse_worker_died`, `message` is for people. `step` is the
    last step that was begun, `time` is in Unix seconds.
    """

    kind: str
    message: str
    step: int
    time: float = Field(default_factory=time.time)
    severity: Severity = "info"
    role: str | None = None
    rank: int | None = None
    attempt: int = 1
    details: dict[str, Any] = Field(default_factory=dict)

    def plain_details(self) -> dict[str, Any]:
        """Return the details as JSON has them: a number that is not finite is null."""
        plain: dict[str, Any] = json.loads(self.model_dump_json(include={"details"}))["details"]
        return plain


class Failure(NamedTuple):
    """The error that ended a run, as a machine word, a sentence and the failure that came first."""

    reason: str
    message: str
    first_failure: FirstFailure | None

    @classmethod
    def from_error(cls, error: Exception) -> Failure:
        """Describe an error; one that is outside the project's own tree counts as a bug."""
        if not isinstance(error, KfacDistError):
            return cls("internal_error", f"{type(error).__name__}: {error}", None)
        first = error.first_failure if isinstance(error, JobFailedError) else None
        return cls(reason_of(error), error.message, first)


class JobRecord(RunRecord):
    """The state of a job: `job.json`.

    `reason` explains the state in a machine word, `message` in a sentence. `attempt` counts from 1;
    times are in Unix seconds.
    """

    job: str
    state: RunState
    reason: str | None = None
    message: str | None = None
    attempt: int = 1
    step: int = 0
    created_at: float
    updated_at: float
    first_failure: FirstFailure | None = None


class WorkerCounts(RunRecord):
    """The number of workers of each role; of the parameter server it is the number of shards."""

    gradient: int
    inverse: int
    parameter_server: int


class JobSummary(RunRecord):
    """The result of a job: `summary.json`, and what `train -o json` prints.

    `train` and `test` are null if the job ended before an evaluation; the averaged ones also while
    Polyak averaging is off. `initial_objective` is that of the first step's batch.
    `inverse_staleness_steps` covers all steps. `wall_seconds` and `steps_per_second` cover this
    attempt; the latter leaves evaluation out. `workers` are those at the start of this attempt,
    `workers_at_end` those when it ended, null if none had started. `not_stored`
    names what is not in the storage of the specification, or not in its newest state.
    """

    job: str
    state: RunState
    step: int
    train: Metrics | None = None
    test: Metrics | None = None
    train_averaged: Metrics | None = None
    test_averaged: Metrics | None = None
    initial_objective: float | None = None
    wall_seconds: float
    steps_per_second: float | None = None
    inverse_staleness_steps: StalenessSummary | None = None
    workers: WorkerCounts
    workers_at_end: WorkerCounts | None = None
    run_dir: str
    reason: str | None = None
    message: str | None = None
    first_failure: FirstFailure | None = None
    not_stored: list[str] = Field(default_factory=list)
