"""Which version each step of a recorded run used, and what a replay must invert when."""

from __future__ import annotations

import pytest

from kfac_dist.coordination.steps.plan import StepSchedule
from kfac_dist.coordination.steps.recorded import InverseUse, RecordedInverses
from kfac_dist.coordination.steps.staleness import Admission, StalenessBound, admit


def use(first_step: int, version_step: int, *gammas: float) -> InverseUse:
    return InverseUse(first_step=first_step, version_step=version_step, gammas=gammas)


RECORDED = RecordedInverses(
    uses={
        "a": (use(1, 1, 2.0), use(5, 4, 2.0, 3.0), use(11, 4 + 5, 1.0)),
        "b": (use(3, 1, 2.0), use(7, 4, 1.5)),
    },
    beyond_bound={9: {"b": "damp"}, 10: {"a": "degraded", "b": "damp"}},
)
BOUND = StalenessBound(
    max_steps=4,
    warmup_steps=0,
    schedule=StepSchedule(
        factor_update_period=1,
        inverse_update_period=4,
        gamma_adapt_period=None,
        damping_adapt_period=None,
    ),
    delay_steps={"*": 2},
    recorded=RECORDED,
)


@pytest.mark.parametrize(
    ("step", "versions"),
    [
        (1, {"a": 1}),
        (2, {"a": 1}),
        (3, {"a": 1, "b": 1}),
        (5, {"a": 4, "b": 1}),
        (7, {"a": 4, "b": 4}),
        (11, {"a": 9, "b": 4}),
        (1000, {"a": 9, "b": 4}),
    ],
)
def test_each_step_uses_the_versions_that_it_used(step: int, versions: dict[str, int]) -> None:
    assert BOUND.is_exact(step)
    assert BOUND.only_admissible(step, ("a", "b")) == versions
    assert {name: BOUND.oldest_admissible(step, name) for name in "ab"} == {"b": 0} | versions


def test_only_what_was_used_is_inverted_each_layer_for_its_own_gammas() -> None:
    refreshes = {step: RECORDED.refresh(step) for step in range(1, 12) if RECORDED.refresh(step)}
    assert refreshes == {
        1: {"a": (2.0,), "b": (2.0,)},
        4: {"a": (2.0, 3.0), "b": (1.5,)},
        9: {"a": (1.0,)},
    }
    following = [BOUND.next_exact_refresh(step) for step in (0, 1, 3, 4, 8, 9, 50)]
    assert following == [1, 4, 4, 9, 9, None, None]


@pytest.mark.parametrize(
    ("step", "versions", "decision"),
    [
        (2, {"a": 1, "b": None}, Admission()),  # b's direction was the gradient
        (2, {"a": 1, "b": 1}, Admission()),  # and is again, even if its inverse comes earlier now
        (3, {"a": 1, "b": None}, Admission(wait_for=("b",))),
        (5, {"a": 1, "b": 1}, Admission(wait_for=("a",))),
        (9, {"a": 4, "b": 4}, Admission(damp=("b",))),
        (10, {"a": 4, "b": 4}, Admission(damp=("b",), degraded=("a",))),
        (12, {"a": 9, "b": 4}, Admission()),  # b is beyond 4, but was within its own bound
    ],
)
def test_a_step_waits_for_what_it_used_and_damps_what_it_damped(
    step: int, versions: dict[str, int | None], decision: Admission
) -> None:
    assert admit(step, versions, BOUND, "damp") == decision
    assert admit(step, versions, BOUND, "wait") == decision


def test_a_version_whose_inversion_fails_now_is_not_waited_for() -> None:
    decision = admit(5, {"a": 1, "b": 1}, BOUND, "wait", failed={"a"})
    assert decision == Admission(degraded=("a",))


def test_how_stale_layers_are_used() -> None:
    assert Admission(damp=("b",), degraded=("a",)).beyond_bound == {"b": "damp", "a": "degraded"}
