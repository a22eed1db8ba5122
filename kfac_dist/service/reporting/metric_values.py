"""The numbers of a step by metric name, as the history keeps them."""

from __future__ import annotations

from collections.abc import Iterator

from kfac_dist.runs import Evaluation, StepRecord
from kfac_dist.service.job_records import StepValues

_PLAIN = (
    "loss",
    "objective",
    "num_cases",
    "update_norm",
    "step_seconds",
    "damping",
    "gamma",
    "lr",
    "reduction_ratio",
    "alpha",
    "mu",
    "predicted_change",
    "parameter_version",
    "stale_applied_total",
    "waited_seconds",
)
_BY_NAME = ("phase_seconds", "inverse_version_step", "numeric_events", "inverse_queue_depth")
_SETS = ("train", "test", "train_averaged", "test_averaged")


def step_values(record: StepRecord) -> StepValues:
    """Return everything that was measured in a step.

    What is a mapping in the record has names such as `phase_seconds.compute`, an evaluation
    `test.objective`; what is null there is left out.
    """
    return StepValues(step=record.step, time=record.time, values=dict(_values(record)))


def _values(record: StepRecord) -> Iterator[tuple[str, float]]:
    for name in _PLAIN:
        value = getattr(record, name)
        if value is not None:
            yield name, float(value)
    for field in _BY_NAME:
        for name, value in getattr(record, field).items():
            yield f"{field}.{name}", float(value)
    if (staleness := record.inverse_staleness_steps) is not None:
        yield "inverse_staleness_steps.mean", staleness.mean
        yield "inverse_staleness_steps.max", staleness.max
    if record.evaluation is not None:
        yield from _evaluated(record.evaluation)


def _evaluated(evaluation: Evaluation) -> Iterator[tuple[str, float]]:
    for name in _SETS:
        for metric, value in (getattr(evaluation, name) or {}).items():
            yield f"{name}.{metric}", float(value)
