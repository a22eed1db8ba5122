from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.coordination.steps.forecast import StalenessForecast, crowding, forecast_staleness
from kfac_dist.errors import InvalidSpecError


@pytest.mark.parametrize(
    ("step", "refresh", "period", "bound", "expected"),
    [
        (1.0, 0.0, 20, 0, StalenessForecast(mean=9.5, max=19, waits=True)),
        (1.0, 0.0, 20, 40, StalenessForecast(mean=9.5, max=19, waits=False)),
        (1.0, 3.5, 20, 40, StalenessForecast(mean=13.5, max=23, waits=False)),
        (1.0, 30.0, 20, 100, StalenessForecast(mean=44.5, max=59, waits=False)),
        (1.0, 30.0, 20, 40, StalenessForecast(mean=40, max=40, waits=True)),
        (0.0, 0.0, 1, 5, StalenessForecast(mean=0, max=0, waits=False)),
    ],
)
def test_forecasts(
    step: float, refresh: float, period: int, bound: int, expected: StalenessForecast
) -> None:
    assert forecast_staleness(step, refresh, period, bound) == expected


@given(
    st.floats(1e-4, 10),
    st.floats(0, 100),
    st.integers(1, 100),
    st.integers(1, 200),
)
def test_it_is_never_above_the_bound_nor_below_what_a_faster_worker_has(
    step: float, refresh: float, period: int, bound: int
) -> None:
    got = forecast_staleness(step, refresh, period, bound)
    faster = forecast_staleness(step, refresh / 2, period, bound)
    assert 0 <= faster.mean <= got.mean <= got.max <= bound
    assert faster.max <= got.max


def test_times_are_not_negative() -> None:
    with pytest.raises(InvalidSpecError, match="refresh_seconds"):
        forecast_staleness(1.0, -1.0, 20, 40)


@pytest.mark.parametrize(
    ("busy", "cpus", "expected"), [(1.5, 2, 1.0), (2.0, 2, 1.0), (3.0, 2, 1.5), (3, 8, 1.0)]
)
def test_a_step_is_as_late_as_the_cores_are_shared(busy, cpus, expected):
    assert crowding(busy, cpus) == expected
