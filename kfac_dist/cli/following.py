"""Progress of a submitted job on stderr, the same as for a job in the foreground."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from kfac_dist.cli.progress import STALENESS, make_progress, progress_numbers
from kfac_dist.service.job_records import StepValues

if TYPE_CHECKING:
    from kfac_dist.service.client import Client
    from kfac_dist.service.job_records import Job, MetricSeries


def follow(client: Client, job: Job, *, plain: bool) -> Job:
    """Show the progress of a job until it ends, and return the job as it ended."""
    names = [*progress_numbers(), *STALENESS]
    with make_progress(job.num_steps, plain=plain) as progress:
        for update in client.watch(job.id, metrics=names):
            if update.job is not None:
                if (update.job.state, update.job.message) != (job.state, job.message):
                    progress.on_state(str(update.job.state), update.job.message)
                job = update.job
            for event in update.events:
                progress.on_event(event)
            for step in steps_in(update.metrics):
                progress.on_record(step)
    return client.get(job.id)


def steps_in(metrics: Sequence[MetricSeries]) -> Iterator[StepValues]:
    """Yield the steps of an update; a step without an objective is left out."""
    by_step: dict[int, dict[str, float]] = {}
    for series in metrics:
        for point in series.points:
            by_step.setdefault(point.step, {})[series.name] = point.value
    objective = next((series.points for series in metrics if series.name == "objective"), ())
    for point in objective:
        yield StepValues(step=point.step, time=point.time, values=by_step[point.step])
