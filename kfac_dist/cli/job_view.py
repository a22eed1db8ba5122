"""How commands show jobs: the same facts as tables, JSON and YAML."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kfac_dist.cli.output import Format, make_table, moment, write_result
from kfac_dist.errors import CancelledError, JobFailedError

if TYPE_CHECKING:
    from rich.table import Table

    from kfac_dist.service.job_records import Attempt, Job, JobEvent

# The keys of the summary that `train -o json` prints, in its order. A job without a summary has
# them too, with null.
_SUMMARY = (
    "train",
    "test",
    "train_averaged",
    "test_averaged",
    "initial_objective",
    "wall_seconds",
    "steps_per_second",
    "inverse_staleness_steps",
    "workers",
    "workers_at_end",
)

GROUP_NUMBERS = ("epoch", "gradient_workers", "shards")
"""Names in the history of what says how large the group of a step was."""

# Keys that stand before a line already or say nothing new.
_IN_PREFIX = frozenset({"timestamp", "event", "level", "role", "rank", "attempt", "job"})


def write_state(job: Job, output: Format) -> None:
    """Write the state of a job after a request."""
    row = (job.id, str(job.state), job.message)
    write_result(
        {"job": job.id, "state": str(job.state)},
        output,
        make_table(("job", "state", "message"), [row], right=()),
    )


def job_row(job: Job) -> dict[str, Any]:
    """Return the facts of a job that a listing shows."""
    return {
        "job": job.id,
        "name": job.name,
        "state": str(job.state),
        "step": job.step,
        "num_steps": job.num_steps,
        "attempt": job.attempt,
        "owner": job.owner,
        "priority": job.priority,
        "created_at": moment(job.created_at),
        "reason": job.reason,
        "message": job.message,
    }


def jobs_table(jobs: Iterable[Job]) -> Table:
    """Return jobs as a table."""
    now = time.time()
    rows = [
        (
            job.id,
            str(job.state),
            f"{job.step}/{job.num_steps}",
            job.attempt,
            job.owner,
            age(now - job.created_at),
            job.message,
        )
        for job in jobs
    ]
    columns = ("job", "state", "step", "attempt", "owner", "age", "message")
    return make_table(columns, rows, right=("step", "attempt", "age"), cut="message")


def described(
    job: Job, attempts: Iterable[Attempt], group: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Return all facts of a job, beginning with the keys of the summary that `train` prints.

    `group` has the numbers of the group that did the last step, if there was one.
    """
    summary = job.summary or {}
    counts = _asked_for(job.spec.get("workers") or {})
    facts: dict[str, Any] = {"job": job.id, "state": str(job.state), "step": job.step}
    facts |= {key: summary.get(key) for key in _SUMMARY}
    facts["workers"] = summary.get("workers") or counts
    facts["group"] = group
    failure = job.first_failure
    return facts | {
        "run_dir": job.run_dir,
        "reason": job.reason,
        "message": job.message,
        "first_failure": None if failure is None else asdict(failure),
        "name": job.name,
        "owner": job.owner,
        "priority": job.priority,
        "num_steps": job.num_steps,
        "attempt": job.attempt,
        "num_restarts": job.num_restarts,
        "created_at": moment(job.created_at),
        "started_at": moment(job.started_at),
        "ended_at": moment(job.ended_at),
        "data_dir": job.data_dir,
        "package_sha256": job.package,
        "attempts": [attempt_facts(attempt) for attempt in attempts],
        "spec": dict(job.spec),
    }


def _asked_for(workers: Mapping[str, Any]) -> dict[str, int | None]:
    """Return the numbers of workers of a specification; those of shards as `auto` chooses them."""
    shards = workers.get("parameter_server")
    if shards == "auto":
        from kfac_dist.config import WorkersSpec  # pydantic takes a while to load

        shards = WorkersSpec.model_validate(workers).num_shards
    numbers = {key: workers.get(key) for key in ("gradient", "inverse")}
    return numbers | {"parameter_server": shards}


def event_facts(event: JobEvent) -> dict[str, Any]:
    """Return the facts of an event."""
    return {
        "sequence": event.sequence,
        "time": moment(event.time),
        "severity": event.severity,
        "kind": event.kind,
        "step": event.step,
        "attempt": event.attempt,
        "role": event.role,
        "rank": event.rank,
        "message": event.message,
    }


def raise_for_end(job: Job) -> None:
    """Raise the error of a job that did not succeed, so that the command has its exit code.

    Raises:
        JobFailedError: the job failed.
        CancelledError: the job was cancelled.
    """
    why = job.message or job.reason or "no message"
    if job.state == "FAILED":
        failed = f"job {job.id} failed: {why} (kfac-dist explain {job.id} says more)"
        raise JobFailedError(failed, reason=job.reason, first_failure=job.first_failure)
    if job.state == "CANCELLED":
        raise CancelledError(f"job {job.id} was cancelled: {why}")


def age(seconds: float) -> str:
    """Return a duration rounded down in one unit, such as 35s, 12m, 5h or 3d."""
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "m"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{max(0, int(seconds)) // divisor}{unit}"
    return f"{int(seconds) // 86_400}d"


def attempt_facts(attempt: Attempt) -> dict[str, Any]:
    """Return the facts of an attempt."""
    return {
        "number": attempt.number,
        "state": str(attempt.state),
        "reason": attempt.reason,
        "message": attempt.message,
        "started_at": moment(attempt.started_at),
        "ended_at": moment(attempt.ended_at),
        "heard_at": moment(attempt.heard_at),
        "resumed_from_step": attempt.resumed_from_step,
    }


def readable_line(text: str) -> str:
    """Return a line of kfac_dist's own logs as words, any other line unchanged.

    A traceback follows on lines of its own.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):  # a task may print anything
        return text
    if not isinstance(values, dict) or "event" not in values:
        return text
    traceback = values.pop("exception", None)
    rest = [f"{key}={_value(value)}" for key, value in values.items() if key not in _IN_PREFIX]
    level = values.get("level", "info")
    words = ([] if level == "info" else [f"[{level}]"]) + [str(values["event"]), *rest]
    return " ".join(words) + (f"\n{traceback}" if traceback else "")


def _value(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
