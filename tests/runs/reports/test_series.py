from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.runs import Evaluation
from kfac_dist.runs.reports.series import MOST_COLUMNS, report_series, staleness_bound, thin_out
from tests.runs.samples import sample_record, sample_spec


@given(st.integers(0, 2000), st.integers(1, 700))
def test_thinning_keeps_every_record_once_and_in_order(count: int, most: int) -> None:
    records = [sample_record(1)] * count
    columns = thin_out(records, most)
    assert sum(len(column) for column in columns) == count
    assert len(columns) <= most
    assert all(columns)


def test_a_column_shows_its_worst_staleness_and_its_mean_objective() -> None:
    records = [
        sample_record(
            step, objective=float(step), inverse_version_step={"fc": 1 if step == 3 else step}
        )
        for step in range(1, 2 * MOST_COLUMNS + 1)
    ]
    series = report_series(sample_spec(), records, [])
    assert len(series["steps"]) == MOST_COLUMNS
    assert series["steps"][:2] == [2, 4]
    assert series["steps_a_column"] == 2
    assert series["staleness"][0][:3] == [0, 2, 0]
    assert series["series"]["objective"][:2] == [1.5, 3.5]
    assert series["series"]["steps_per_second"][0] == 4.0


def test_what_was_not_measured_or_not_finite_is_a_gap() -> None:
    records = [
        sample_record(1, objective=math.nan, reduction_ratio=None),
        sample_record(2, reduction_ratio=0.5, inverse_version_step={"late": 2}),
    ]
    series = report_series(sample_spec(), records, [])
    assert series["series"]["objective"] == [None, 101.0]
    assert series["series"]["reduction_ratio"] == [None, 0.5]
    assert series["series"]["damping"] == [None, None]
    assert series["staleness"] == [[None, 0]]


def test_the_learning_rate_is_drawn_where_there_is_one() -> None:
    for lr in (None, 0.1):
        series = report_series(sample_spec(), [sample_record(1, lr=lr)], [])
        assert ("lr" in [chart["key"] for chart in series["charts"]]) is (lr is not None)


def test_the_number_of_gradient_workers_is_drawn_where_it_changes() -> None:
    for last in (2, 3):
        records = [sample_record(1, gradient_workers=2), sample_record(2, gradient_workers=last)]
        series = report_series(sample_spec(), records, [])
        keys = [chart["key"] for chart in series["charts"]]
        assert ("gradient_workers" in keys) is (last == 3)
        assert series["series"]["gradient_workers"] == [2, last]


def test_evaluations_have_the_averaged_parameters_beside_the_last_iterate() -> None:
    last = {"train": {"objective": 3.0}, "test": {"objective": 4.0}}
    averaged = {"train_averaged": {"objective": 2.0}, "test_averaged": {"objective": math.nan}}
    records = [
        sample_record(1),
        sample_record(2, evaluation=Evaluation(**last)),
        sample_record(3, evaluation=Evaluation(**last, **averaged)),
    ]
    first, second = report_series(sample_spec(), records, [])["evaluations"]
    assert first == {
        "step": 2,
        "train": 3.0,
        "test": 4.0,
        "train_averaged": None,
        "test_averaged": None,
    }
    assert second == first | {"step": 3, "train_averaged": 2.0}


def test_the_bound_of_a_synchronous_job_is_its_refresh_period() -> None:
    assert staleness_bound(sample_spec()) == 40
    assert staleness_bound(sample_spec(staleness={"max_steps": 0})) == 19
    assert staleness_bound(sample_spec(optimizer={"name": "sgd"})) is None
