"""What a progress line says of a step, whether a run recorded it or a server reports it."""

from __future__ import annotations

from kfac_dist.cli.following import steps_in
from kfac_dist.cli.progress import describe
from kfac_dist.runs import StalenessSummary
from kfac_dist.service.job_records import MetricPoint, MetricSeries
from tests.runs.samples import sample_record

LINE = "objective 12.5 · 3 steps/s · damping 150 · staleness 4.0 (max 8)"


def test_a_record_of_the_run() -> None:
    staleness = StalenessSummary(mean=4.0, max=8.0)
    record = sample_record(7, objective=12.5, damping=150.0, inverse_staleness_steps=staleness)
    assert describe(record, 3.0) == LINE
    assert describe(sample_record(7, objective=12.5), None) == "objective 12.5"


def test_the_series_of_an_update() -> None:
    values = {
        "damping": {7: 150.0},
        "objective": {6: 13.0, 7: 12.5},
        "inverse_staleness_steps.mean": {5: 3.0, 7: 4.0},
        "inverse_staleness_steps.max": {7: 8.0},
    }
    update = [
        MetricSeries(
            name=name,
            points=[MetricPoint(step=step, time=step / 2, value=v) for step, v in points.items()],
            sampled_every=1,
        )
        for name, points in values.items()
    ]
    before, last = steps_in(update)
    assert (before.step, before.time, describe(before, None)) == (6, 3.0, "objective 13")
    assert (last.step, last.time, describe(last, 3.0)) == (7, 3.5, LINE)
