"""A request goes out in the steps in which inverses are due, with what it must contain."""

from __future__ import annotations

from typing import Any

from kfac_dist.coordination.steps.plan import StepPlan, StepSchedule
from kfac_dist.coordination.steps.recorded import InverseUse, RecordedInverses
from kfac_dist.coordination.steps.staleness import StalenessBound
from workers.exchange.messages import RefreshRequest
from workers.parameter_server.refresh_requests import RefreshRequests

SCHEDULE = StepSchedule(
    factor_update_period=1, inverse_update_period=5, gamma_adapt_period=None, damping_adapt_period=5
)
GAMMAS = (0.5, 0.25, 1.0)


def sent(steps: range, **options: Any) -> list[RefreshRequest]:
    bound = StalenessBound(**({"max_steps": 20, "warmup_steps": 0, "schedule": SCHEDULE} | options))
    found: list[RefreshRequest] = []
    requests = RefreshRequests(bound, found.append)
    for step in steps:
        requests.send(plan(step), GAMMAS)
    return found


def plan(step: int) -> StepPlan:
    return SCHEDULE.plan(step)


def test_inverses_are_asked_for_where_a_refresh_is_due() -> None:
    found = sent(range(1, 12))
    assert [request.step for request in found] == [1, 2, 3, 5, 10]
    for request in found:
        assert request.gammas == GAMMAS
        assert (request.exact, request.min_statistics_step) == (False, 1)
        assert request.gammas_by_layer is None


def test_a_synchronous_step_needs_its_own_statistics() -> None:
    for request in sent(range(1, 12), max_steps=0):
        assert (request.exact, request.min_statistics_step) == (True, request.step)


def test_the_steps_of_a_warm_up_are_synchronous_and_the_others_not() -> None:
    found = sent(range(1, 12), warmup_steps=5)
    assert [request.exact for request in found] == [True, True, True, True, False]


def test_a_replay_asks_for_the_recorded_versions_only() -> None:
    recorded = RecordedInverses(
        uses={
            "a": [InverseUse(first_step=6, version_step=4, gammas=(3.0,))],
            "b": [InverseUse(first_step=3, version_step=2, gammas=(1.0, 2.0))],
        },
        beyond_bound={},
    )
    found = sent(range(1, 12), recorded=recorded)
    assert [(r.step, r.gammas_by_layer) for r in found] == [
        (2, {"b": (1.0, 2.0)}),
        (4, {"a": (3.0,)}),
    ]
    assert [r.min_statistics_step for r in found] == [2, 4]
