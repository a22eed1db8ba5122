"""The progress of a submitted job on stderr, as that of one in the foreground."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kfac_dist.cli.progress import make_progress

if TYPE_CHECKING:
    from kfac_dist.service.client import Client
    from kfac_dist.service.job_records import Job, MetricSeries

_MEAN, _MAX = "inverse_staleness_steps.mean", "inverse_staleness_steps.max"
METRICS = ("objective", "damping", _MEAN, _MAX)


@dataclass(frozen=True, kw_only=True)
class Staleness:
    """Over the layers, in steps."""

    mean: float
    max: float


@dataclass(frozen=True, kw_only=True)
class Point:
    """What a progress line shows of a step."""

    step: int
    time: float
    objective: float
    damping: float | None
    inverse_staleness_steps: Staleness | None


def follow(client: Client, job: Job, *, plain: bool) -> Job:
    """Show a job's progress until it ends; returns it as it ended."""
    with make_progress(job.num_steps, plain=plain) as progress:
        for update in client.watch(job.id, metrics=METRICS):
            if update.job is not None:
                if (update.job.state, update.job.message) != (job.state, job.message):
                    progress.on_state(str(update.job.state), update.job.message)
                job = update.job
            for event in update.events:
                progress.on_event(event)
            for point in points(update.metrics):
                progress.on_record(point)
    return client.get(job.id)


def points(series: Sequence[MetricSeries]) -> Iterator[Point]:
    """Yield the steps of an update, as far as their objective is known."""
    by_name = {one.name: {point.step: point.value for point in one.points} for one in series}
    objective = next((one.points for one in series if one.name == "objective"), ())
    for point in objective:
        mean = by_name.get(_MEAN, {}).get(point.step)
        most = by_name.get(_MAX, {}).get(point.step)
        stale = None if mean is None or most is None else Staleness(mean=mean, max=most)
        yield Point(
            step=point.step,
            time=point.time,
            objective=point.value,
            damping=by_name.get("damping", {}).get(point.step),
            inverse_staleness_steps=stale,
        )
