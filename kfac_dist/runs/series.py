"""What the report draws: the records of a run, thinned out to columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kfac_dist.config import JobSpec, KFACSpec
from kfac_dist.runs.records import Event, Metrics, StepRecord

MOST_COLUMNS = 600
_DIGITS = 6

Column = Sequence[StepRecord]
Values = list[float | None]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One curve over the steps; `guides` are levels drawn across it.

    `log` is whether it opens with a logarithmic axis, `joined` whether missing points are bridged
    (a value that is only measured now and then), `clip` the range that is drawn. An `optional` one
    is left out where there is nothing to draw.
    """

    key: str
    title: str
    unit: str
    log: bool = False
    joined: bool = False
    guides: tuple[float, ...] = ()
    clip: tuple[float, float] | None = None
    optional: bool = False


CHARTS = (
    Chart(key="objective", title="Objective", unit="nats a case, mean of the batch"),
    Chart(key="damping", title="Damping λ", unit="", log=True),
    Chart(key="gamma", title="Factored damping γ", unit="", log=True),
    Chart(key="lr", title="Learning rate", unit="", optional=True),
    Chart(
        key="reduction_ratio",
        title="Reduction ratio ρ",
        unit="λ rises below 1/4, falls above 3/4",
        joined=True,
        guides=(0.25, 0.75),
        clip=(-1.0, 2.0),
    ),
    Chart(key="steps_per_second", title="Throughput", unit="steps a second"),
    Chart(key="update_norm", title="Update norm", unit="of the whole parameter vector", log=True),
)


def report_series(
    spec: JobSpec, records: Sequence[StepRecord], events: Iterable[Event]
) -> dict[str, Any]:
    """Return everything the page's script draws, ready for JSON; at most 600 columns.

    A column is the mean of its steps, for staleness the maximum, so that a step above the bound
    is never averaged away.
    """
    columns = thin_out(records)
    series = {chart.key: _series(chart.key, columns) for chart in CHARTS}
    charts = [chart for chart in CHARTS if not chart.optional or any(series[chart.key])]
    layers = list(dict.fromkeys(name for r in records for name in r.inverse_version_step))
    return {
        "steps": [column[-1].step for column in columns],
        "steps_a_column": max((len(column) for column in columns), default=1),
        "charts": [asdict(chart) for chart in charts],
        "series": series,
        "evaluations": [_evaluation(record) for record in records if record.evaluation],
        "layers": layers,
        "staleness": [[_staleness(column, layer) for column in columns] for layer in layers],
        "bound": staleness_bound(spec),
        "events": [_event(event) for event in events],
    }


def thin_out(records: Sequence[StepRecord], most: int = MOST_COLUMNS) -> list[Column]:
    """Cut the records into at most `most` runs of equal length (the last may be shorter)."""
    length = max(1, math.ceil(len(records) / most))
    return [records[start : start + length] for start in range(0, len(records), length)]


def staleness_bound(spec: JobSpec) -> int | None:
    """Oldest inverse, in steps, that the job allows itself; None where there are no inverses.

    A synchronous job uses the inverses of its last refresh.
    """
    if not isinstance(spec.optimizer, KFACSpec):
        return None
    return spec.staleness.max_steps or spec.optimizer.inverse_update_period - 1


def _series(key: str, columns: Iterable[Column]) -> Values:
    if key == "steps_per_second":
        return [_inverse(_mean(column, lambda r: r.step_seconds)) for column in columns]
    return [_mean(column, lambda r: getattr(r, key)) for column in columns]


def _mean(column: Column, read: Callable[[StepRecord], float | None]) -> float | None:
    """Mean of what was measured; None when nothing was or a number is not finite."""
    values = [value for value in map(read, column) if value is not None]
    return _finite(math.fsum(values) / len(values)) if values else None


def _inverse(value: float | None) -> float | None:
    return _finite(1 / value) if value else None


def _finite(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None


def _staleness(column: Column, layer: str) -> int | None:
    ages = [
        record.step - record.inverse_version_step[layer]
        for record in column
        if layer in record.inverse_version_step
    ]
    return max(ages, default=None)


def _evaluation(record: StepRecord) -> dict[str, Any]:
    """The objective on each set, of the last iterate and of the averaged parameters."""
    evaluation = record.evaluation
    assert evaluation is not None, "the caller leaves out the steps without one"
    return {
        "step": record.step,
        "train": _objective(evaluation.train),
        "test": _objective(evaluation.test),
        "train_averaged": _objective(evaluation.train_averaged),
        "test_averaged": _objective(evaluation.test_averaged),
    }


def _objective(metrics: Metrics | None) -> float | None:
    value = metrics.get("objective") if metrics else None
    return None if value is None else _finite(value)


def _event(event: Event) -> dict[str, Any]:
    return {
        "step": event.step,
        "kind": event.kind,
        "message": event.message,
        "severity": event.severity,
    }
