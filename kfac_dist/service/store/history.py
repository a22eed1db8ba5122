"""The history of a job's numbers: written step by step, read thinned out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from sqlalchemy import Select, delete, func, insert, select
from sqlalchemy.orm import Session

from kfac_dist.config.problems import did_you_mean
from kfac_dist.errors import NotFoundError
from kfac_dist.runs.step_record import STEP_NUMBERS
from kfac_dist.service.job_records import MetricPoint, MetricSeries, StepValues
from kfac_dist.service.store import JobRow, PointRow, SeriesRow


def append_steps(session: Session, row: JobRow, steps: Iterable[StepValues]) -> None:
    """Add the values of steps that the history does not have yet."""
    steps = list(steps)
    ids = _series_ids(session, row, {name for step in steps for name in step.values})
    points = [
        {
            "series": ids[name],
            "step": step.step,
            "time": step.time,
            "value": value if math.isfinite(value) else None,
        }
        for step in steps
        for name, value in step.values.items()
    ]
    if points:
        session.execute(insert(PointRow), points)


def _series_ids(session: Session, row: JobRow, names: Iterable[str]) -> dict[str, int]:
    query = select(SeriesRow.name, SeriesRow.id).where(SeriesRow.job == row.number)
    ids = {name: number for name, number in session.execute(query).all()}  # noqa: C416 - typed
    new = [SeriesRow(job=row.number, name=name) for name in sorted(set(names) - set(ids))]
    session.add_all(new)
    session.flush()
    return ids | {series.name: series.id for series in new}


def forget_after(session: Session, row: JobRow, step: int) -> None:
    """Remove the values after `step`: a resumed attempt repeats those steps."""
    series = select(SeriesRow.id).where(SeriesRow.job == row.number)
    session.execute(
        delete(PointRow).where(PointRow.series.in_(series), PointRow.step > step),
        execution_options={"synchronize_session": False},
    )


def metric_names(session: Session, row: JobRow) -> list[str]:
    """Return the names of all metrics of a job, sorted."""
    return sorted(session.scalars(select(SeriesRow.name).where(SeriesRow.job == row.number)))


def read_series(
    session: Session,
    row: JobRow,
    names: Sequence[str],
    first_step: int | None,
    last_step: int | None,
    max_points: int,
) -> list[MetricSeries]:
    """Return the history of each of `names`, thinned out to at most `max_points` points each.

    Raises:
        NotFoundError: the job has no metric of that name.
    """
    known = metric_names(session, row)
    for name in names:
        if name not in known:
            raise NotFoundError(_unknown(row, name, known))
    ids = _series_ids(session, row, names)
    return [
        _read_one(session, name, _points(ids[name], first_step, last_step), max_points)
        for name in names
    ]


def _unknown(row: JobRow, name: str, known: Sequence[str]) -> str:
    if not known:
        return f"job {row.id}: has no metrics yet"
    return f"job {row.id}: has no metric {name[:100]!r}.{did_you_mean(name[:100], known)}"


def _points(
    series: int, first_step: int | None, last_step: int | None
) -> Select[int, float, float | None]:
    query = select(PointRow.step, PointRow.time, PointRow.value).where(PointRow.series == series)
    if first_step is not None:
        query = query.where(PointRow.step >= first_step)
    if last_step is not None:
        query = query.where(PointRow.step <= last_step)
    return query


def _read_one(
    session: Session,
    name: str,
    query: Select[int, float, float | None],
    max_points: int,
) -> MetricSeries:
    points = query.subquery()
    count, low, high = session.execute(
        select(func.count(), func.min(points.c.step), func.max(points.c.step))
    ).one()
    every = 1 if count <= max_points else math.ceil((high - low + 1) / max_points)
    if every > 1:
        bucket = (points.c.step - low) // every
        number = STEP_NUMBERS.get(name.partition(".")[0])
        combine = func.max if number and number.thinned_to_max else func.avg
        step, time, value = func.max(points.c.step), func.max(points.c.time), points.c.value
        query = select(step, time, combine(value)).group_by(bucket).order_by(bucket)
    else:
        query = query.order_by(PointRow.step)
    rows = session.execute(query).all()
    return MetricSeries(
        name=name,
        points=tuple(
            MetricPoint(step=step, time=time, value=math.nan if value is None else value)
            for step, time, value in rows
        ),
        sampled_every=every,
    )
