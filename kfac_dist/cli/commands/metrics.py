"""`kfac-dist metrics`: the history of a job's numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kfac_dist.cli.connection import connect
from kfac_dist.cli.options import CaOption, JobArgument, OutputOption, ServerOption
from kfac_dist.cli.output import Format, make_table, write_result

if TYPE_CHECKING:
    from rich.table import Table

    from kfac_dist.service.job_records import MetricSeries


def metrics(
    job_id: JobArgument,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Metrics; without any, list their names."),
    ] = None,
    first_step: Annotated[
        int | None, typer.Option("--from", metavar="STEP", min=1, help="First step.")
    ] = None,
    last_step: Annotated[
        int | None, typer.Option("--to", metavar="STEP", min=1, help="Last step, included.")
    ] = None,
    points: Annotated[
        int,
        typer.Option(
            "--points",
            metavar="N",
            min=1,
            max=10_000,
            help="At most this many points: each is then the mean of several steps, and for a "
            "staleness their maximum.",
        ),
    ] = 40,
    server: ServerOption = None,
    ca: CaOption = None,
    output: OutputOption = Format.table,
) -> None:
    """Show metrics of a job over its steps, also after its end."""
    with connect(server, ca) as client:
        if not names:
            known = client.metric_names(job_id)
            table = make_table(("metric",), [(name,) for name in known], right=())
            write_result({"job": job_id, "names": known}, output, table)
            return
        series = client.metrics(
            job_id, names, first_step=first_step, last_step=last_step, max_points=points
        )
    facts = [_facts(metric) for metric in series]
    write_result({"job": job_id, "series": facts}, output, _table(series))


def _facts(series: MetricSeries) -> dict[str, Any]:
    return {
        "name": series.name,
        "sampled_every": series.sampled_every,
        "steps": [point.step for point in series.points],
        "times": [point.time for point in series.points],
        "values": [_finite(point.value) for point in series.points],
    }


def _finite(value: float) -> float | None:
    """Return None for what JSON cannot express: NaN and infinity."""
    return value if abs(value) < float("inf") else None


def _table(series: list[MetricSeries]) -> Table:
    by_step: dict[int, dict[str, float]] = {}
    for metric in series:
        for point in metric.points:
            by_step.setdefault(point.step, {})[metric.name] = point.value
    names = [metric.name for metric in series]
    rows = [
        (step, *(values.get(name) for name in names)) for step, values in sorted(by_step.items())
    ]
    return make_table(("step", *names), rows, right=("step", *names))
