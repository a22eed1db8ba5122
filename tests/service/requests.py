"""Specifications and reports with which the control plane is tested."""

from __future__ import annotations

from typing import Any

from kfac_dist.coordination.jobs.lifecycle import JobState
from kfac_dist.runs import Event
from kfac_dist.service.job_records import Job, Report, ReportedEvent, ReportedState, StepValues
from kfac_dist.service.jobs import Jobs


def spec(**changes: Any) -> dict[str, Any]:
    return {"name": "digits", "task": "autoencoder", "steps": 20, "batch_size": 50} | changes


def submit(jobs: Jobs, **changes: Any) -> Job:
    return jobs.create(spec(**changes), owner="ada")


def told(line: int, kind: str = "checkpoint", attempt: int = 1, **details: Any) -> ReportedEvent:
    event = Event(
        kind=kind, message=f"{kind}.", step=line, time=10.0, attempt=attempt, details=details
    )
    return ReportedEvent(line=line, event=event)


def steps(first: int, last: int, scale: float = 1.0) -> list[StepValues]:
    return [
        StepValues(step=step, time=100.0 + step, values={"loss": scale * step, "gamma": 0.5})
        for step in range(first, last + 1)
    ]


def report(job: Job, attempt: int = 1, state: JobState | None = None, **parts: Any) -> Report:
    stands = None if state is None else ReportedState(state=state, step=0)
    return Report(job=job.id, attempt=attempt, **({"state": stands} | parts))
