from __future__ import annotations

from kfac_dist.runs import Evaluation, StalenessSummary, StepRecord
from kfac_dist.service.reporting.metric_values import step_values


def test_every_number_has_a_name_and_what_is_null_is_left_out() -> None:
    record = StepRecord(
        step=4,
        time=9.0,
        loss=2.0,
        objective=2.5,
        num_cases=10,
        update_norm=0.1,
        step_seconds=0.5,
        phase_seconds={"compute": 0.25},
        damping=3.0,
        inverse_version_step={"0": 2},
        inverse_staleness_steps=StalenessSummary(mean=1.5, max=2.0),
        parameter_version=4,
        numeric_events={"bad_step": 1},
        inverse_queue_depth={"0": 3},
        evaluation=Evaluation(train={"objective": 7.0}, test={"objective": 8.0, "accuracy": 0.5}),
    )
    told = step_values(record)
    assert (told.step, told.time) == (4, 9.0)
    assert told.values == {
        "loss": 2.0,
        "objective": 2.5,
        "num_cases": 10.0,
        "update_norm": 0.1,
        "step_seconds": 0.5,
        "phase_seconds.compute": 0.25,
        "damping": 3.0,
        "inverse_version_step.0": 2.0,
        "inverse_staleness_steps.mean": 1.5,
        "inverse_staleness_steps.max": 2.0,
        "parameter_version": 4.0,
        "numeric_events.bad_step": 1.0,
        "stale_applied_total": 0.0,
        "waited_seconds": 0.0,
        "inverse_queue_depth.0": 3.0,
        "train.objective": 7.0,
        "test.objective": 8.0,
        "test.accuracy": 0.5,
    }
