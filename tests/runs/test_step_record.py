"""The one list of a step's numbers, and the names in it that are a contract."""

from __future__ import annotations

from pathlib import Path

from kfac_dist.coordination.metrics import CATALOGUE
from kfac_dist.errors import FirstFailure
from kfac_dist.runs import Evaluation, RunFolder, StalenessSummary, StepRecord
from kfac_dist.runs.step_record import STEP_NUMBERS

from .samples import sample_spec

IN_HISTORY = {
    *("loss", "objective", "num_cases", "update_norm", "step_seconds", "damping", "gamma", "lr"),
    *("reduction_ratio", "alpha", "mu", "predicted_change", "parameter_version"),
    *("stale_applied_total", "waited_seconds", "exchanged_bytes", "num_messages"),
    *("phase_seconds", "inverse_version_step", "numeric_events", "inverse_queue_depth"),
    *("inverse_staleness_steps", "epoch", "gradient_workers", "shards"),
}
COMPARED = [
    *("inverse_version_step", "loss", "objective", "num_cases", "alpha", "mu", "damping"),
    *("gamma", "lr", "predicted_change", "reduction_ratio", "update_norm"),
]
CHARTS = {
    "objective": "Objective",
    "damping": "Damping λ",
    "gamma": "Factored damping γ",
    "lr": "Learning rate",
    "reduction_ratio": "Reduction ratio ρ",
    "steps_per_second": "Throughput",
    "update_norm": "Update norm",
    "gradient_workers": "Gradient workers",
}


def test_every_number_has_a_name_and_a_null_is_left_out() -> None:
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
        inverse_gammas={"0": [1.0]},
        stale_layers={"0": "damp"},
        inverse_staleness_steps=StalenessSummary(mean=1.5, max=2.0),
        parameter_version=4,
        numeric_events={"bad_step": 1},
        exchanged_bytes=800,
        num_messages=6,
        inverse_queue_depth={"0": 3},
        evaluation=Evaluation(train={"objective": 7.0}, test={"objective": 8.0, "accuracy": 0.5}),
    )
    assert record.values == {
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
        "exchanged_bytes": 800.0,
        "num_messages": 6.0,
        "inverse_queue_depth.0": 3.0,
        "train.objective": 7.0,
        "test.objective": 8.0,
        "test.accuracy": 0.5,
    }


def test_names_in_the_history_are_those_of_the_contract() -> None:
    assert {name for name, number in STEP_NUMBERS.items() if number.in_history} == IN_HISTORY


def test_a_replay_compares_the_versions_first_and_no_time() -> None:
    assert [name for name, number in STEP_NUMBERS.items() if number.compared] == COMPARED


def test_charts_keep_their_names_titles_and_order() -> None:
    charts = {
        number.chart.key or name: number.chart.title
        for name, number in STEP_NUMBERS.items()
        if number.chart
    }
    assert list(charts.items()) == list(CHARTS.items())


def test_a_number_has_the_unit_of_its_name_and_of_its_metric() -> None:
    units = {"_seconds": "seconds", "_bytes": "bytes", "_steps": "step", "_step": "step"}
    for name, number in STEP_NUMBERS.items():
        for suffix, unit in units.items():
            assert number.unit == unit or not name.endswith(suffix), name
        if number.metric is not None:
            assert number.metric in CATALOGUE, name
            assert number.metric.unit == number.unit, name


def test_a_first_failure_is_an_object_of_four_keys_in_the_job(tmp_path: Path) -> None:
    failure = FirstFailure(role="gradient_worker", rank=1, time_seconds=2.5, log_tail="x")
    with RunFolder.create(tmp_path, sample_spec()) as folder:
        folder.update_job(state="FAILED", first_failure=failure)
        assert folder.read_job().first_failure == failure
        assert folder.read_job().model_dump(mode="json")["first_failure"] == {
            "role": "gradient_worker",
            "rank": 1,
            "time_seconds": 2.5,
            "log_tail": "x",
        }
