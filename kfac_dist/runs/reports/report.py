"""`report.html`: a run's curves and the staleness of its inverses, in one file for offline use.

The page contains its style, script and data. Text that came from a user is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from kfac_dist.config import JobSpec, dump_spec
from kfac_dist.runs.folder import RunFolder
from kfac_dist.runs.records import JobSummary, Metrics
from kfac_dist.runs.reports.series import report_series, staleness_bound
from kfac_dist.runs.step_record import StepRecord
from kfac_dist.runs.writing import write_whole

_NO_VALUE = "–"


class Tile(NamedTuple):
    """One number at the top of the page, with a label above and a remark below."""

    label: str
    value: str
    remark: str


def render_report(folder: RunFolder, damages: list[str] | None = None) -> Path:
    """Write the report of the run in `folder` so far, and return its path.

    With `damages`, records that are damaged are left out, and what is wrong is appended to it.

    Raises:
        KfacDistError: a record is damaged.
    """
    spec = folder.read_spec()
    records, events = folder.read_metrics(damages), folder.read_events(damages)
    summary = folder.read_summary()
    job = folder.read_job()
    environment = Environment(
        loader=PackageLoader("kfac_dist.runs.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["utc"] = _utc
    page = environment.get_template("report.html.j2").render(
        spec=spec,
        spec_text=dump_spec(spec),
        job=job,
        tiles=list(_tiles(spec, records, summary)),
        metrics=_metric_table(summary),
        numeric_events=records[-1].numeric_events if records else {},
        events=events,
        has_layers=any(record.inverse_version_step for record in records),
        series=report_series(spec, records, events),
    )
    write_whole(folder.places.report, page)
    return folder.places.report


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _tiles(
    spec: JobSpec, records: Sequence[StepRecord], summary: JobSummary | None
) -> Iterator[Tile]:
    step = records[-1].step if records else 0
    yield Tile("Steps", str(step), f"of {spec.steps}")
    if records:
        first, last = records[0].objective, records[-1].objective
        yield Tile("Objective", _number(last), f"from {_number(first)}, nats a case")
    staleness = summary.inverse_staleness_steps if summary else None
    if staleness is not None:
        bound = staleness_bound(spec)
        remark = f"mean; max {staleness.max:g}, bound {bound}"
        yield Tile("Staleness, steps", _number(staleness.mean), remark)
    if summary is not None:
        yield Tile("Steps a second", _number(summary.steps_per_second), "evaluation left out")
        yield Tile("Wall time", _duration(summary.wall_seconds), "")
    yield _workers(spec, records)


def _workers(spec: JobSpec, records: Sequence[StepRecord]) -> Tile:
    """Return the workers of the last step, or as specified before there is one."""
    gradient, shards = spec.workers.gradient, spec.workers.num_shards
    if records:
        gradient = records[-1].gradient_workers or gradient
        shards = records[-1].shards or shards
    values = f"{gradient} + {spec.workers.inverse} + {shards}"
    return Tile("Workers", values, "gradient + inverse + shards, in the last step")


def _metric_table(summary: JobSummary | None) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return the names of the metrics, and a row of values for each set of cases."""
    if summary is None:
        return [], []
    sets: dict[str, Metrics | None] = {
        "training set": summary.train,
        "test set": summary.test,
        "training set, averaged parameters": summary.train_averaged,
        "test set, averaged parameters": summary.test_averaged,
    }
    measured = {label: values for label, values in sets.items() if values}
    names = list(dict.fromkeys(name for values in measured.values() for name in values))
    rows = [
        (label, [_number(values.get(name)) for name in names]) for label, values in measured.items()
    ]
    return names, rows


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return _NO_VALUE
    return f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"
