"""Who the gradient workers of the next epoch are, as tables and as properties."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.coordination.steps.membership import (
    MembershipDecision,
    MembershipLimits,
    MembershipView,
    decide_membership,
)
from kfac_dist.errors import InvalidSpecError

LIMITS = MembershipLimits(min_gradient_workers=1, max_restarts=3, max_preemptions=None)
THREE = MembershipView(members=(10, 11, 12), wished=3)


def decided(view: MembershipView = THREE, **changes: Any) -> MembershipDecision:
    return decide_membership(replace(view, **changes), LIMITS)


def test_nothing_new_changes_nothing() -> None:
    assert decided() == MembershipDecision(
        step="continue",
        members=(10, 11, 12),
        num_to_start=0,
        is_degraded=False,
        num_deaths=0,
        num_preemptions=0,
    )


@pytest.mark.parametrize(
    ("changes", "members"),
    [
        ({"dead": [11]}, (10, 12)),  # the last one moves down
        ({"dead": [10]}, (12, 11)),
        ({"dead": [11], "ready": [13]}, (10, 13, 12)),  # the new one takes its place
        ({"leaving": [12]}, (10, 11)),
        ({"wished": 2}, (10, 11)),
        ({"wished": 1, "dead": [10]}, (11,)),
        ({"wished": 5, "ready": [13]}, (10, 11, 12, 13)),
        ({"wished": 3, "ready": [13]}, (10, 11, 12)),
        ({"dead": [10, 11], "ready": [13, 14]}, (13, 14, 12)),
    ],
)
def test_ranks_are_kept_where_they_can_be(
    changes: dict[str, Any], members: tuple[int, ...]
) -> None:
    decision = decided(**changes)
    assert decision.members == members
    assert decision.step == ("continue" if members == THREE.members else "new_epoch")


def test_a_death_is_replaced_where_there_is_room_and_the_job_trains_meanwhile() -> None:
    decision = decided(dead=[11], room=4)
    assert (decision.num_to_start, decision.is_degraded, decision.num_deaths) == (1, True, 1)
    assert decision.message == (
        "2 of 3 gradient workers are there; 1 are starting; the job trains meanwhile"
    )
    assert decided(dead=[11], room=4, num_starting=1).num_to_start == 0


def test_below_the_minimum_the_job_waits_and_says_for_what() -> None:
    limits = replace(LIMITS, min_gradient_workers=3)
    decision = decide_membership(replace(THREE, dead=[11]), limits)
    assert (decision.step, decision.members) == ("wait", ())
    assert decision.message == (
        "2 of 3 gradient workers are there; for 1 the cluster has no room; the job waits, because "
        "faults.min_gradient_workers is 3"
    )


def test_deaths_and_preemptions_have_limits_of_their_own() -> None:
    assert decided(num_deaths=2, dead=[10]).step == "new_epoch"
    failed = decided(num_deaths=3, dead=[10])
    assert (failed.step, failed.reason) == ("fail", "worker_died")
    assert failed.message == "gradient workers died 4 times, faults.max_restarts is 3"
    assert decided(num_preemptions=900, leaving=[10]).step == "new_epoch"
    twice = replace(LIMITS, max_preemptions=2)
    failed = decide_membership(replace(THREE, num_preemptions=2, leaving=[10]), twice)
    assert (failed.step, failed.reason) == ("fail", "preempted")
    # One that died after its notice is a death.
    assert decided(dead=[10], leaving=[10]).num_preemptions == 0


def test_impossible_views_are_refused() -> None:
    with pytest.raises(InvalidSpecError, match="process 10 is given more than once"):
        decided(ready=[10])
    with pytest.raises(InvalidSpecError, match="wished gradient workers"):
        decided(wished=0)


@st.composite
def views(draw: st.DrawFn) -> MembershipView:
    processes = draw(st.lists(st.integers(0, 99), unique=True, max_size=8))
    cut = draw(st.integers(0, len(processes)))
    members = tuple(processes[:cut])
    some = st.sets(st.sampled_from(members)) if members else st.just(set())
    return MembershipView(
        members=members,
        dead=draw(some),
        leaving=draw(some),
        ready=processes[cut:],
        num_starting=draw(st.integers(0, 3)),
        wished=draw(st.integers(1, 8)),
        room=draw(st.integers(0, 8)),
        num_deaths=draw(st.integers(0, 4)),
        num_preemptions=draw(st.integers(0, 4)),
    )


def limits() -> st.SearchStrategy[MembershipLimits]:
    return st.builds(
        MembershipLimits,
        min_gradient_workers=st.integers(1, 4),
        max_restarts=st.integers(0, 6),
        max_preemptions=st.none() | st.integers(0, 6),
    )


@given(views(), limits())
def test_an_epoch_has_only_living_members_each_once_and_never_too_few(
    view: MembershipView, limits: MembershipLimits
) -> None:
    decision = decide_membership(view, limits)
    members = decision.members
    assert len(set(members)) == len(members)
    assert set(members).isdisjoint({*view.dead, *view.leaving})
    assert set(members) <= {*view.members, *view.ready}
    wished = max(view.wished, limits.min_gradient_workers)
    if decision.step in ("continue", "new_epoch"):
        assert limits.min_gradient_workers <= len(members) <= wished
        kept = [p for rank, p in enumerate(view.members) if members[rank : rank + 1] == (p,)]
        moved = [p for p in members if p in view.members and p not in kept]
        # Only members beyond the last rank move.
        assert all(view.members.index(process) >= len(members) for process in moved)
    assert 0 <= decision.num_to_start <= view.room


@given(views(), limits())
def test_every_loss_is_counted_once_and_for_one_reason(
    view: MembershipView, limits: MembershipLimits
) -> None:
    decision = decide_membership(view, limits)
    counted = decision.num_deaths - view.num_deaths + decision.num_preemptions
    assert counted - view.num_preemptions == len({*view.dead, *view.leaving})
    too_often = decision.num_deaths > limits.max_restarts or (
        limits.max_preemptions is not None and decision.num_preemptions > limits.max_preemptions
    )
    assert (decision.step == "fail") == too_often


@given(views(), limits())
def test_with_room_the_job_comes_to_the_wished_number(
    view: MembershipView, limits: MembershipLimits
) -> None:
    limits = replace(limits, max_restarts=100, max_preemptions=None)
    fresh = iter(range(1000, 2000))
    for _ in range(4):
        decision = decide_membership(view, limits)
        members = decision.members or view.members
        gone = {*view.dead, *view.leaving}
        ready = [process for process in view.ready if process not in members]
        members = tuple(process for process in members if process not in gone)
        ready += [next(fresh) for _ in range(view.num_starting + decision.num_to_start)]
        view = replace(
            view,
            members=members,
            dead=(),
            leaving=(),
            ready=ready,
            num_starting=0,
            room=100,
            num_deaths=decision.num_deaths,
            num_preemptions=decision.num_preemptions,
        )
    decision = decide_membership(view, limits)
    assert (decision.step, decision.is_degraded, decision.num_to_start) == ("continue", False, 0)
    assert len(view.members) == max(view.wished, limits.min_gradient_workers)
