"""The numbers of a training step: one list, which everything that shows a number reads.

A new number is one field of `StepRecord`, and the place that fills it (`ServerReport` and
`workers/driver/records/step_records.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from kfac_dist.coordination import metrics
from kfac_dist.coordination.metrics import Metric, Unit
from kfac_dist.coordination.steps.recorded import BeyondBound
from kfac_dist.runs.records import Evaluation, Inversion, Measured, RunRecord, StalenessSummary


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A curve over the steps in `report.html`.

    Args:
        title: heading of the chart.
        caption: what stands beside the heading, such as the unit.
        key: name of the curve in the page's data; by default the name of the field.
        reciprocal: draw 1 / x, for example steps a second instead of seconds a step.
        log: open with a logarithmic axis.
        joined: bridge missing points, for a number that is only measured now and then.
        guides: levels drawn across the chart.
        clip: the range that is drawn.
        optional: leave the chart out when the run has none of the values.
        varying: leave the chart out when all values are the same.
    """

    title: str
    caption: str = ""
    key: str = ""
    reciprocal: bool = False
    log: bool = False
    joined: bool = False
    guides: tuple[float, ...] = ()
    clip: tuple[float, float] | None = None
    optional: bool = False
    varying: bool = False


@dataclass(frozen=True, kw_only=True)
class StepNumber:
    """What is done with a field of `StepRecord`; a field without one is only recorded.

    Args:
        unit: unit of the number, or of each number in a mapping.
        chart: how the report draws it; None leaves it out.
        metric: its Prometheus metric; the keys of a mapping become values of the last label.
        label: value of the metric's label, for a number that shares the metric with a mapping.
        over_steps: the metric has the `last` record's numbers; or their `sum` over this attempt;
            or it is `kept`: an entry that a record lacks keeps its last number.
        compared: a replay must have the same bits.
        in_progress: shown in the progress line of a job.
        in_watch: shown by `kfac-dist watch`.
        in_history: kept by the control plane, for `kfac-dist metrics` and the dashboard.
        thinned_to_max: where the history is thinned out, several steps become their maximum
            instead of their mean.
    """

    unit: Unit = ""
    chart: Chart | None = None
    metric: Metric | None = None
    label: str | None = None
    over_steps: Literal["last", "sum", "kept"] = "last"
    compared: bool = False
    in_progress: bool = False
    in_watch: bool = False
    in_history: bool = True
    thinned_to_max: bool = False


class StepRecord(RunRecord):
    """One training step: a line of `metrics.jsonl`.

    The report draws its charts, and a replay compares, in the order of the fields. What an
    optimizer does not have, such as the damping of SGD, is null or empty.
    """

    step: Annotated[int, StepNumber(unit="step", metric=metrics.STEP, in_history=False)]
    """Counted from 1."""
    time: float
    """Unix time in seconds when the step was recorded."""

    # The inverses that the step used. A replay compares the versions before any other number:
    # where they differ, everything else does too.
    inverse_version_step: Annotated[
        dict[str, int],
        StepNumber(
            unit="step", metric=metrics.INVERSE_VERSION_STEP, over_steps="kept", compared=True
        ),
    ] = Field(default_factory=dict)
    """For each layer, the step of the newest statistics in the inverse that was used."""
    inverse_gammas: dict[str, list[float]] = Field(default_factory=dict)
    """The gammas that a version was made for, in the first step that uses it."""
    stale_layers: dict[str, BeyondBound] = Field(default_factory=dict)
    """The layers whose version is beyond the staleness bound, and how it was used."""
    inverse_staleness_steps: Annotated[
        StalenessSummary | None,
        StepNumber(unit="step", thinned_to_max=True),  # a step above the bound must stay visible
    ] = None

    # The objective, and how the step was chosen.
    loss: Annotated[Measured, StepNumber(unit="nats", metric=metrics.LOSS, compared=True)]
    """Mean over the batch before the update, without the l2 term."""
    objective: Annotated[
        Measured,
        StepNumber(
            unit="nats",
            chart=Chart(title="Objective", caption="nats a case, mean of the batch"),
            compared=True,
            in_progress=True,
            in_watch=True,
        ),
    ]
    """The loss plus the l2 term."""
    num_cases: Annotated[
        int, StepNumber(unit="cases", metric=metrics.SAMPLES, over_steps="sum", compared=True)
    ]
    """Size of the batch."""
    alpha: Annotated[float | None, StepNumber(compared=True)] = None
    """Step size."""
    mu: Annotated[float | None, StepNumber(compared=True)] = None
    """Momentum."""
    damping: Annotated[
        float | None,
        StepNumber(
            chart=Chart(title="Damping λ", log=True),
            metric=metrics.DAMPING,
            compared=True,
            in_progress=True,
            in_watch=True,
        ),
    ] = None
    gamma: Annotated[
        float | None,
        StepNumber(
            chart=Chart(title="Factored damping γ", log=True),
            metric=metrics.GAMMA,
            compared=True,
            in_watch=True,
        ),
    ] = None
    lr: Annotated[
        float | None,
        StepNumber(chart=Chart(title="Learning rate", optional=True), compared=True, in_watch=True),
    ] = None
    """Learning rate of this step."""
    predicted_change: Annotated[float | None, StepNumber(unit="nats", compared=True)] = None
    """M(delta) - M(0), the change of the objective that the quadratic model predicts."""
    reduction_ratio: Annotated[
        float | None,
        StepNumber(
            chart=Chart(
                title="Reduction ratio ρ",
                caption="λ rises below 1/4, falls above 3/4",
                joined=True,
                guides=(0.25, 0.75),
                clip=(-1.0, 2.0),
            ),
            metric=metrics.REDUCTION_RATIO,
            compared=True,
            in_watch=True,
        ),
    ] = None
    """The actual change over the predicted one, in the steps that measure it."""

    # Time and traffic.
    step_seconds: Annotated[
        float,
        StepNumber(
            unit="seconds",
            chart=Chart(
                title="Throughput",
                caption="steps a second",
                key="steps_per_second",
                reciprocal=True,
            ),
            metric=metrics.STEP_DURATION,
            label="step",
            in_watch=True,
        ),
    ]
    phase_seconds: Annotated[
        dict[str, float], StepNumber(unit="seconds", metric=metrics.STEP_DURATION)
    ] = Field(default_factory=dict)
    waited_seconds: Annotated[float, StepNumber(unit="seconds")] = 0.0
    """Time that the server waited at the staleness bound."""
    exchanged_bytes: Annotated[int, StepNumber(unit="bytes")] = 0
    """Tensors that a gradient worker sent to the parameter server and received from it.

    The largest over the gradient workers. Statistics are not counted: they travel another way.
    """
    num_messages: Annotated[int, StepNumber()] = 0
    """Number of those tensors."""

    # The parameters after the step.
    update_norm: Annotated[
        Measured,
        StepNumber(
            chart=Chart(title="Update norm", caption="of the whole parameter vector", log=True),
            metric=metrics.UPDATE_NORM,
            compared=True,
        ),
    ]
    """Euclidean norm; 0 in a step that was skipped."""
    parameter_version: Annotated[int, StepNumber()]
    """Number of updates since the start of the job."""

    # The group of gradient workers and shards that did the step; null in older records.
    epoch: Annotated[int | None, StepNumber(metric=metrics.GROUP_EPOCH)] = None
    """Number of the group in this attempt, from 1: each change of its members makes a new one."""
    gradient_workers: Annotated[
        int | None,
        StepNumber(
            chart=Chart(title="Gradient workers", caption="in the group", varying=True),
            metric=metrics.GRADIENT_WORKERS,
        ),
    ] = None
    shards: Annotated[int | None, StepNumber(metric=metrics.SHARDS)] = None
    """Of the parameter server."""
    incomplete: bool = False
    """A shard died before it reported the step: its layers are missing here."""

    # Counted from the start of the job.
    numeric_events: Annotated[dict[str, int], StepNumber(metric=metrics.NUMERIC_EVENTS)] = Field(
        default_factory=dict
    )
    """By rung of the ladder (docs/algorithm.md#ladder)."""
    stale_applied_total: Annotated[int, StepNumber(metric=metrics.STALE_APPLIED)] = 0
    """Inverses that were applied beyond the staleness bound."""

    # The inverse workers.
    inverse_queue_depth: Annotated[
        dict[str, int], StepNumber(metric=metrics.INVERSE_QUEUE_DEPTH)
    ] = Field(default_factory=dict)
    """For each worker, by rank: messages not dealt with and layers not refreshed."""
    inversions: list[Inversion] = Field(default_factory=list)
    """Inversions that arrived since the last record."""

    evaluation: Evaluation | None = None

    @property
    def values(self) -> dict[str, float]:
        """Every number by its name in the history; a null has no entry.

        An entry of a mapping is named `phase_seconds.compute`, a part of a summary
        `inverse_staleness_steps.mean`, a metric of an evaluation `test.objective`.
        """
        return {key: float(value) for key, value in self._named_values()}

    def _named_values(self) -> Iterator[tuple[str, float]]:
        for name, number in STEP_NUMBERS.items():
            if number.in_history:
                yield from _flat(name, getattr(self, name))
        if self.evaluation is not None:
            for name, means in self.evaluation:
                yield from _flat(name, means)


def _flat(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, BaseModel):
        value = dict(value)
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield f"{name}.{key}", inner
    elif value is not None:
        yield name, value


STEP_NUMBERS: Mapping[str, StepNumber] = {
    name: number
    for name, field in StepRecord.model_fields.items()
    for number in field.metadata
    if isinstance(number, StepNumber)
}
"""What is done with each number, by the name of its field, in the order of the fields."""
