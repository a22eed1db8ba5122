"""Names of logs: what one function writes, the other reads."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.runs.run_places import LogName, RunPlaces

PLACES = RunPlaces(Path("run"))


@given(
    st.sampled_from(["gradient_worker", "inverse_worker", "parameter_server", "driver"]),
    st.integers(0, 999_999),
    st.integers(1, 999_999),
)
def test_the_name_of_a_log_says_role_rank_and_attempt(role: str, rank: int, attempt: int) -> None:
    for path in (PLACES.log(role, rank, attempt), PLACES.printed(role, rank, attempt)):
        assert path.parent == PLACES.logs
        assert PLACES.parse_log_name(path.name) == LogName(role, rank, attempt)


def test_names_of_logs_are_those_of_the_contract() -> None:
    assert str(PLACES.log("inverse_worker", 0)) == "run/logs/inverse_worker-0.log"
    assert str(PLACES.log("inverse_worker", 0, 2)) == "run/logs/inverse_worker-0.a2.log"
    assert str(PLACES.printed("driver", 3, 2)) == "run/logs/driver-3.a2.out"


@pytest.mark.parametrize(
    "name",
    [
        "driver.log",
        "driver-0.txt",
        "driver-0.log.gz",
        "Driver-0.log",
        "driver-0.a.log",
        "../x-0.log",
    ],
)
def test_a_file_with_another_name_is_no_log(name: str) -> None:
    assert PLACES.parse_log_name(name) is None
