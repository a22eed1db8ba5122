from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.coordination.steps.plan import StepSchedule
from kfac_dist.coordination.steps.refresh import LayerRefreshState, RefreshPolicy, choose_next
from kfac_dist.coordination.steps.staleness import (
    Admission,
    AtBound,
    StalenessBound,
    admit,
    degraded_too_long,
)
from kfac_dist.errors import InvalidSpecError


def make_bound(
    max_steps: int, warmup_steps: int = 0, period: int = 20, gamma_period: int | None = None
) -> StalenessBound:
    schedule = StepSchedule(
        factor_update_period=1,
        inverse_update_period=period,
        gamma_adapt_period=gamma_period,
        damping_adapt_period=5,
    )
    return StalenessBound(max_steps=max_steps, warmup_steps=warmup_steps, schedule=schedule)


@pytest.mark.parametrize(
    ("step", "oldest"), [(1, 1), (2, 2), (3, 3), (4, 3), (19, 3), (20, 20), (39, 20), (40, 40)]
)
def test_a_synchronous_step_uses_the_last_scheduled_refresh(step: int, oldest: int) -> None:
    assert make_bound(0).oldest_admissible(step, "layer") == oldest


def test_a_search_for_gamma_is_a_refresh_too() -> None:
    assert make_bound(0, period=20, gamma_period=15).oldest_admissible(19, "layer") == 15


@pytest.mark.parametrize(("step", "oldest"), [(1, 1), (40, 1), (41, 1), (42, 2), (100, 60)])
def test_an_asynchronous_step_takes_inverses_up_to_the_bound(step: int, oldest: int) -> None:
    assert make_bound(40).oldest_admissible(step, "layer") == oldest


def test_the_warm_up_is_exact() -> None:
    bound = make_bound(40, warmup_steps=60)
    assert bound.oldest_admissible(60, "layer") == 60
    assert bound.oldest_admissible(61, "layer") == 21
    assert [bound.is_exact(step) for step in (60, 61)] == [True, False]


def test_the_bound_is_checked_at_birth() -> None:
    with pytest.raises(InvalidSpecError, match=r"staleness\.max_steps must be at least 0; got -1"):
        make_bound(-1)
    with pytest.raises(
        InvalidSpecError, match=r"staleness\.warmup_steps must be at least 0; got -2"
    ):
        make_bound(0, -2)
    with pytest.raises(InvalidSpecError, match="step must be at least 1; got 0"):
        make_bound(40).oldest_admissible(0, "layer")


@pytest.mark.parametrize(
    ("step", "first", "second"),
    [(1, 1, 1), (5, 1, 3), (8, 3, 3), (22, 3, 20), (25, 20, 20), (39, 20, 20), (44, 20, 40)],
)
def test_a_scripted_step_uses_each_refresh_so_many_steps_late(
    step: int, first: int, second: int
) -> None:
    bound = StalenessBound(
        max_steps=40,
        warmup_steps=0,
        schedule=make_bound(40).schedule,
        delay_steps={"*": 5, "second": 2},
    )
    assert bound.is_exact(step)
    assert bound.oldest_admissible(step, "first") == first
    assert bound.oldest_admissible(step, "second") == second


def test_no_version_goes_back_at_the_end_of_the_warm_up() -> None:
    bound = StalenessBound(
        max_steps=60, warmup_steps=40, schedule=make_bound(60).schedule, delay_steps={"*": 25}
    )
    versions = [bound.oldest_admissible(step, "layer") for step in range(1, 100)]
    assert versions == sorted(versions)
    assert versions[39] == versions[63] == 40
    assert versions[84] == 60


VERSIONS = {"fresh": 95, "at_bound": 60, "stale": 59, "new": None}


@pytest.mark.parametrize(
    ("at_bound", "orphaned", "decision"),
    [
        ("wait", (), Admission(wait_for=("stale", "new"))),
        ("damp", (), Admission(damp=("stale",), wait_for=("new",))),
        ("wait", ("stale", "new", "fresh"), Admission(degraded=("stale",), gradient=("new",))),
        ("damp", ("stale", "new", "fresh"), Admission(degraded=("stale",), gradient=("new",))),
    ],
)
def test_what_happens_at_the_bound(
    at_bound: AtBound, orphaned: tuple[str, ...], decision: Admission
) -> None:
    assert admit(100, VERSIONS, make_bound(40), at_bound, orphaned) == decision


@pytest.mark.parametrize("bound", [make_bound(0), make_bound(40, warmup_steps=100)])
def test_a_synchronous_step_is_never_damped(bound: StalenessBound) -> None:
    decision = admit(100, {"layer": 80}, bound, "damp")
    assert decision == Admission(wait_for=("layer",))


@pytest.mark.parametrize("bound", [make_bound(0), make_bound(40, warmup_steps=100)])
def test_a_synchronous_step_waits_for_the_successor_of_a_dead_inverse_worker(
    bound: StalenessBound,
) -> None:
    versions: dict[str, int | None] = {"old": 99, "new": None, "there": 100}
    decision = admit(100, versions, bound, "wait", {"old", "new", "there"})
    assert decision == Admission(wait_for=("old", "new"))


def test_no_step_waits_for_a_version_that_nobody_can_make() -> None:
    versions = {"old": 79, "new": None}
    decision = admit(100, versions, make_bound(0), "wait", {"old"}, failed={"old", "new"})
    assert decision == Admission(degraded=("old",), gradient=("new",))


def test_a_step_does_not_wait_for_statistics_that_were_refused() -> None:
    bound = make_bound(0)
    versions = {"as_new_as_can_be": 80, "older": 79, "new": None}
    decision = admit(100, versions, bound, "wait", accepted_statistics=[79, 80])
    assert decision == Admission(wait_for=("older", "new"), degraded=("as_new_as_can_be",))
    assert admit(1, {"layer": None}, bound, "wait", accepted_statistics=[]) == Admission(
        gradient=("layer",)
    )


@pytest.mark.parametrize(("step", "refused"), [(100, {100}), (103, {100}), (103, {98, 99, 100})])
def test_an_exact_step_does_not_wait_for_what_its_version_cannot_contain(
    step: int, refused: set[int]
) -> None:
    """Statistics accepted after the refresh belong to the next version."""
    bound = make_bound(0, period=10)
    accepted = [s for s in range(1, step + 1) if s not in refused]
    newest = 100 - len(refused)
    made = admit(step, {"layer": newest}, bound, "wait", accepted_statistics=accepted)
    assert made == Admission(degraded=("layer",))
    early = admit(step, {"layer": newest - 1}, bound, "wait", accepted_statistics=accepted)
    assert early == Admission(wait_for=("layer",))


@st.composite
def situations(draw: st.DrawFn) -> dict[str, Any]:
    step = draw(st.integers(1, 120))
    names = [f"layer{i}" for i in range(draw(st.integers(1, 6)))]
    newest = draw(st.none() | st.integers(0, step))
    version = st.none() | st.integers(1, step)
    versions = {name: draw(version) for name in names}
    if newest is not None:
        versions = {
            n: None if v is None or newest == 0 else min(v, newest) for n, v in versions.items()
        }
    return {
        "step": step,
        "versions": versions,
        "bound": make_bound(
            draw(st.sampled_from([0, 1, 5, 40])),
            draw(st.integers(0, 60)),
            draw(st.sampled_from([1, 5, 20])),
            draw(st.sampled_from([None, 7])),
        ),
        "at_bound": draw(st.sampled_from(["wait", "damp"])),
        "orphaned": draw(st.sets(st.sampled_from(names))),
        "failed": draw(st.sets(st.sampled_from(names))),
        "accepted_statistics": None if newest is None else [newest][: newest > 0],
    }


@given(situations())
def test_nothing_staler_than_the_bound_is_applied_uncounted(situation: dict[str, Any]) -> None:
    decision = admit(**situation)
    step, versions, bound = situation["step"], situation["versions"], situation["bound"]
    groups = [decision.wait_for, decision.damp, decision.degraded, decision.gradient]
    counted = [name for group in groups for name in group]
    assert len(counted) == len(set(counted))
    oldest = bound.oldest_admissible(step, "layer")
    for name, version in versions.items():
        within = version is not None and version >= oldest
        assert within == (name not in counted)
    assert all(versions[name] is not None for name in decision.stale)
    assert all(versions[name] is None for name in decision.gradient)
    assert not set(decision.wait_for) & situation["failed"]
    assert bound.is_exact(step) or not set(decision.wait_for) & situation["orphaned"]
    assert not decision.damp or (situation["at_bound"] == "damp" and not bound.is_exact(step))


@given(situations())
def test_waiting_ends_when_the_newest_statistics_are_in(situation: dict[str, Any]) -> None:
    """Once every layer that a step waits for is refreshed, the step waits no longer."""
    accepted = situation["accepted_statistics"]
    arrived = accepted[-1] if accepted else situation["step"]
    waited = admit(**situation).wait_for
    versions = situation["versions"] | dict.fromkeys(waited, arrived)
    assert admit(**(situation | {"versions": versions})).wait_for == ()


@given(
    policy=st.sampled_from(["round_robin", "oldest_first", "largest_drift"]),
    max_steps=st.integers(0, 12),
    num_layers=st.integers(1, 5),
    refreshes=st.lists(st.integers(0, 3), min_size=60, max_size=60),
    drifts=st.lists(st.floats(0, 10), min_size=5, max_size=5),
)
def test_a_slow_inverse_worker_never_breaks_the_bound(
    policy: RefreshPolicy,
    max_steps: int,
    num_layers: int,
    refreshes: list[int],
    drifts: list[float],
) -> None:
    """Both rules together: some refreshes are done between steps, and at the bound all of them."""
    bound = make_bound(max_steps, period=4)
    versions: dict[str, int | None] = {f"layer{i}": None for i in range(num_layers)}
    last: str | None = None

    def refresh(step: int) -> None:
        nonlocal last
        states = [
            LayerRefreshState(name=n, version=v, statistics_step=step, drift=d, cost=1.0)
            for (n, v), d in zip(versions.items(), drifts, strict=False)
        ]
        last = choose_next(states, policy, step, last)
        if last is not None:
            versions[last] = step

    for step, done in enumerate(refreshes, start=1):
        for _ in range(done):
            refresh(step)
        waits = 0
        while admit(step, versions, bound, "wait").wait_for:
            refresh(step)
            waits += 1
        assert waits <= num_layers
        allowed = max_steps if max_steps else 3
        assert all(v is not None and step - v <= allowed for v in versions.values())


def test_degradation_is_bounded_by_steps_beyond_the_bound() -> None:
    bound, versions = make_bound(40), {"a": 10, "b": 30}
    late = degraded_too_long(75, versions, bound, ["a", "b", "c"], 20)
    assert late == {"a": 25, "c": 35}  # c has no inverse yet
    assert degraded_too_long(70, versions, bound, ["a", "b"], 20) == {}
    assert degraded_too_long(75, versions, bound, [], 0) == {}
    assert degraded_too_long(10_000, versions, bound, ["a", "b"], None) == {}
