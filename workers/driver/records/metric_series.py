"""From the records and events of a job to the series that Prometheus scrapes.

`STEP_NUMBERS` says which number of a record belongs to which metric; nothing is measured here.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from kfac_dist._version import __version__
from kfac_dist.coordination import metrics
from kfac_dist.coordination.metrics import Metric
from kfac_dist.runs import Event, StepRecord
from kfac_dist.runs.records import InversionResult
from kfac_dist.runs.step_record import STEP_NUMBERS, StepNumber

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily
_Values = dict[tuple[str, ...], float]  # by the values of the labels

# An inverse worker counts when its successor is there. The others have one only if they are missed.
_RESTARTS = {
    "inverse_worker": "inverse_worker_replaced",
    "gradient_worker": "member_died",
    "parameter_server": "member_died",
}


class JobSeries(Collector):
    """The series of one job: the driver's thread adds to them, the server's threads collect."""

    def __init__(self, job: str) -> None:
        self._job = job
        self._lock = threading.Lock()
        self._durations = _Distribution(metrics.INVERSION_DURATION.buckets)
        # Counters start at 0 and not at their first count: `increase` would miss that one.
        self._values: dict[Metric, _Values] = {
            metrics.BUILD_INFO: {(__version__,): 1},
            metrics.INVERSIONS: {(result,): 0 for result in get_args(InversionResult)},
            metrics.SAMPLES: {(): 0},
            metrics.WORKER_RESTARTS: {(role,): 0 for role in _RESTARTS},
        }

    def on_record(self, record: StepRecord) -> None:
        """Add the record of a step."""
        with self._lock:
            self._date_new_inverses(record)  # before the versions of the last record are replaced
            self._add_numbers(record)
            self._add_inversions(record)

    def on_event(self, event: Event) -> None:
        """Add an event."""
        if event.role is not None and _RESTARTS.get(event.role) == event.kind:
            with self._lock:
                self._values[metrics.WORKER_RESTARTS][(event.role,)] += 1

    def collect(self) -> list[Family]:
        """Return all metrics that have a value so far."""
        with self._lock:
            return [*self._valued(), _histogram(metrics.INVERSION_DURATION, self._durations)]

    def _add_numbers(self, record: StepRecord) -> None:
        latest: dict[Metric, _Values] = {}
        for name, number in STEP_NUMBERS.items():
            value = getattr(record, name)
            if number.metric is None or value is None:
                continue
            values = self._by_labels(number, number.metric, value)
            known = self._values.get(number.metric, {})
            if number.over_steps == "sum":
                values = {labels: known.get(labels, 0) + term for labels, term in values.items()}
            if number.over_steps != "last":
                values = known | values
            latest.setdefault(number.metric, {}).update(values)
        self._values |= latest

    def _by_labels(self, number: StepNumber, metric: Metric, value: Any) -> _Values:
        if not isinstance(value, Mapping):
            return {() if number.label is None else (number.label,): value}
        # The label `job`, where a metric has it, comes first.
        job = (self._job,) if "job" in metric.labels else ()
        return {(*job, key): entry for key, entry in value.items()}

    def _date_new_inverses(self, record: StepRecord) -> None:
        versions = self._values.get(metrics.INVERSE_VERSION_STEP, {})
        refreshed = self._values.setdefault(metrics.INVERSE_REFRESH_TIMESTAMP, {})
        for layer, version in record.inverse_version_step.items():
            labels = (self._job, layer)
            if versions.get(labels) != version:
                refreshed[labels] = record.time

    def _add_inversions(self, record: StepRecord) -> None:
        for inversion in record.inversions:
            self._values[metrics.INVERSIONS][(inversion.result,)] += 1
            self._durations.add(inversion.seconds)

    def _valued(self) -> Iterator[Family]:
        for metric in metrics.CATALOGUE:
            if values := self._values.get(metric):
                kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
                family = kind(metric.name, metric.help, labels=metric.labels)
                for labels, value in values.items():
                    family.add_metric(labels, value)
                yield family


class _Distribution:
    """Counts of values by bucket, and their sum; the last bucket has no upper bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = (*bounds, math.inf)
        self.counts = [0] * len(self.bounds)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


def _histogram(metric: Metric, values: _Distribution) -> Family:
    bounds = map(floatToGoString, values.bounds)
    buckets = list(zip(bounds, accumulate(values.counts), strict=True))
    return HistogramMetricFamily(metric.name, metric.help, buckets=buckets, sum_value=values.sum)
