"""The data that the report draws: the records of a run, thinned out to columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from kfac_dist.config import JobSpec, KFACSpec
from kfac_dist.runs.records import Event, Metrics
from kfac_dist.runs.step_record import STEP_NUMBERS, Chart, StepRecord

MOST_COLUMNS = 600
_DIGITS = 6

Column = Sequence[StepRecord]
Values = list[float | None]


def report_series(
    spec: JobSpec, records: Sequence[StepRecord], events: Iterable[Event]
) -> dict[str, Any]:
    """Return everything that the page's script draws, ready for JSON, in at most 600 columns.

    A column has the mean over its steps. For the staleness it has the maximum, so that a step above
    the bound stays visible.
    """
    columns = thin_out(records)
    charts = {name: number.chart for name, number in STEP_NUMBERS.items() if number.chart}
    curves = {name: _curve(name, chart, columns) for name, chart in charts.items()}
    drawn = {n: c for n, c in charts.items() if _is_drawn(c, curves[n])}
    layers = list(dict.fromkeys(name for r in records for name in r.inverse_version_step))
    return {
        "steps": [column[-1].step for column in columns],
        "steps_a_column": max((len(column) for column in columns), default=1),
        "charts": [asdict(chart) | {"key": chart.key or name} for name, chart in drawn.items()],
        "series": {charts[name].key or name: curve for name, curve in curves.items()},
        "evaluations": [_evaluation(record) for record in records if record.evaluation],
        "layers": layers,
        "staleness": [[_staleness(column, layer) for column in columns] for layer in layers],
        "bound": staleness_bound(spec),
        "events": [_event(event) for event in events],
    }


def _is_drawn(chart: Chart, curve: Values) -> bool:
    if chart.varying:
        return len(set(curve)) > 1
    return not chart.optional or any(curve)


def thin_out(records: Sequence[StepRecord], most: int = MOST_COLUMNS) -> list[Column]:
    """Cut the records into at most `most` columns of equal length; the last may be shorter."""
    length = max(1, math.ceil(len(records) / most))
    return [records[start : start + length] for start in range(0, len(records), length)]


def staleness_bound(spec: JobSpec) -> int | None:
    """Return the largest staleness, in steps, that the job allows; None without inverses.

    A synchronous job uses the inverses of its last refresh.
    """
    if not isinstance(spec.optimizer, KFACSpec):
        return None
    return spec.staleness.max_steps or spec.optimizer.inverse_update_period - 1


def _curve(name: str, chart: Chart, columns: Iterable[Column]) -> Values:
    means = [_mean([getattr(record, name) for record in column]) for column in columns]
    return [_reciprocal(mean) for mean in means] if chart.reciprocal else means


def _mean(measured: Iterable[float | None]) -> float | None:
    """Return the mean of what was measured; None if nothing was, or a number is not finite."""
    values = [value for value in measured if value is not None]
    return _finite(math.fsum(values) / len(values)) if values else None


def _reciprocal(value: float | None) -> float | None:
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
    """Return the objective on each set, for the last iterate and the averaged parameters."""
    evaluation = record.evaluation
    assert evaluation is not None, "the caller skips steps without an evaluation"
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
