"""The catalogue of metrics; their names and labels are a contract with dashboards and alerts.

The exporter serves these and nothing else, and the table in `docs/operations.md` is checked against
them. No gauge shows an age: when its worker dies it would keep a value that looks fresh. Compute
ages from `kfac_step` minus `kfac_inverse_version_step`, or from now minus a timestamp.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Kind = Literal["gauge", "counter", "histogram"]
Unit = Literal["", "step", "nats", "seconds", "cases", "bytes"]

_NAME = re.compile(r"kfac(_[a-z]+)+")
_LABEL = re.compile(r"[a-z]+(_[a-z]+)*")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric; `unit` is empty for a count or a pure number.

    `buckets` are the upper bounds of a histogram in its unit, without the infinite one.
    """

    name: str
    kind: Kind
    help: str
    unit: Unit = ""
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        assert _NAME.fullmatch(self.name), f"{self.name}: a name is kfac_ and words"
        self._check_suffix()
        for label in self.labels:
            assert _LABEL.fullmatch(label), f"{self.name}: {label!r} is not a label"
            assert label not in ("le", "quantile"), f"{self.name}: {label} is Prometheus' own"
        assert len(set(self.labels)) == len(self.labels), f"{self.name}: a label occurs twice"
        assert self.help.endswith("."), f"{self.name}: the help is a sentence; got {self.help!r}"
        has_buckets = self.kind == "histogram"
        assert has_buckets == bool(self.buckets), f"{self.name}: just histograms have buckets"
        rising = all(low < high for low, high in pairwise(self.buckets))
        assert rising, f"{self.name}: buckets must rise; got {self.buckets}"

    def _check_suffix(self) -> None:
        counts = self.kind == "counter"
        assert counts == self.name.endswith("_total"), f"{self.name}: just counters end in _total"
        timed = self.unit == "seconds"
        assert timed == self.name.endswith("_seconds"), f"{self.name}: just seconds end in _seconds"


STEP = Metric(
    name="kfac_step",
    kind="gauge",
    unit="step",
    help="The last step that was recorded, counted from 1.",
)
LOSS = Metric(
    name="kfac_loss",
    kind="gauge",
    unit="nats",
    help="Mean loss a case of the last batch before its update, without the l2 term.",
)
INVERSE_VERSION_STEP = Metric(
    name="kfac_inverse_version_step",
    kind="gauge",
    unit="step",
    labels=("job", "layer"),
    help="Step of the newest statistics in the inverse that was last used for the layer.",
)
INVERSE_REFRESH_TIMESTAMP = Metric(
    name="kfac_inverse_refresh_timestamp_seconds",
    kind="gauge",
    unit="seconds",
    labels=("job", "layer"),
    help="Unix time at which a step first used the present version of the layer's inverse.",
)
INVERSE_QUEUE_DEPTH = Metric(
    name="kfac_inverse_queue_depth",
    kind="gauge",
    labels=("job", "worker"),
    help="Messages not dealt with and layers not refreshed, of an inverse worker by its rank.",
)
INVERSION_DURATION = Metric(
    name="kfac_inversion_duration_seconds",
    kind="histogram",
    unit="seconds",
    help="Time to invert one layer, for all gammas tried.",
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
)
INVERSIONS = Metric(
    name="kfac_inversions_total",
    kind="counter",
    labels=("result",),
    help="Inversions of a layer: ok, rescued by float64 or more damping, or failed for some gamma.",
)
DAMPING = Metric(name="kfac_damping", kind="gauge", help="The damping lambda.")
GAMMA = Metric(name="kfac_gamma", kind="gauge", help="The factored damping gamma.")
REDUCTION_RATIO = Metric(
    name="kfac_reduction_ratio",
    kind="gauge",
    help="The reduction ratio rho when it was last measured.",
)
UPDATE_NORM = Metric(
    name="kfac_update_norm",
    kind="gauge",
    help="Euclidean norm of the last update; 0 where the step was skipped.",
)
SAMPLES = Metric(
    name="kfac_samples_total",
    kind="counter",
    unit="cases",
    help="Training cases in the steps of this attempt.",
)
STEP_DURATION = Metric(
    name="kfac_step_duration_seconds",
    kind="gauge",
    unit="seconds",
    labels=("phase",),
    help="Time of the last step: the whole, which is phase step, and its phases.",
)
NUMERIC_EVENTS = Metric(
    name="kfac_numeric_events_total",
    kind="counter",
    labels=("rung",),
    help="Numeric events since the start of the job, by rung of the ladder.",
)
STALE_APPLIED = Metric(
    name="kfac_stale_applied_total",
    kind="counter",
    help="Inverses applied beyond the staleness bound since the start of the job.",
)
GROUP_EPOCH = Metric(
    name="kfac_group_epoch",
    kind="gauge",
    help="Number of the group of members in this attempt, from 1; each change makes a new one.",
)
GRADIENT_WORKERS = Metric(
    name="kfac_gradient_workers",
    kind="gauge",
    help="Gradient workers in the group that did the last step.",
)
SHARDS = Metric(
    name="kfac_shards",
    kind="gauge",
    help="Shards of the parameter server in the group that did the last step.",
)
WORKER_RESTARTS = Metric(
    name="kfac_worker_restarts_total",
    kind="counter",
    labels=("role",),
    help="Processes lost in this attempt that were replaced, or that others do without, by role.",
)
BUILD_INFO = Metric(
    name="kfac_build_info",
    kind="gauge",
    labels=("version",),
    help="Always 1; the label has the version of kfac_dist.",
)

CATALOGUE = (
    STEP,
    LOSS,
    INVERSE_VERSION_STEP,
    INVERSE_REFRESH_TIMESTAMP,
    INVERSE_QUEUE_DEPTH,
    INVERSION_DURATION,
    INVERSIONS,
    DAMPING,
    GAMMA,
    REDUCTION_RATIO,
    UPDATE_NORM,
    SAMPLES,
    STEP_DURATION,
    NUMERIC_EVENTS,
    STALE_APPLIED,
    GROUP_EPOCH,
    GRADIENT_WORKERS,
    SHARDS,
    WORKER_RESTARTS,
    BUILD_INFO,
)
