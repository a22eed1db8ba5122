from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.coordination.jobs.lifecycle import ACTIVE, JobState, Trigger, next_state
from kfac_dist.coordination.jobs.supervision import (
    Action,
    AttemptView,
    ClusterWord,
    EarlierEnd,
    WaitLimits,
    decide,
)

S = JobState
LIMITS = WaitLimits()
RUNNING = AttemptView(
    job_state=S.RUNNING,
    state_seconds=50.0,
    cancel_now=False,
    attempt_seconds=60.0,
    silent_seconds=0.5,
    told_end=None,
    told_seconds=0.0,
    reason=None,
    message=None,
    cluster="running",
    cluster_message="",
    num_restarts=0,
    max_restarts=3,
)


def action(**changes: Any) -> Action:
    return decide(replace(RUNNING, **changes), LIMITS).action


def event(**changes: Any) -> tuple[Trigger | None, str | None]:
    decision = decide(replace(RUNNING, **({"cluster": "over"} | changes)), LIMITS)
    assert decision.action is Action.SETTLE
    return decision.event, decision.reason


def test_a_healthy_job_is_left_alone() -> None:
    assert action() is Action.WAIT


def test_a_driver_that_reports_is_believed_more_than_the_cluster() -> None:
    assert action(cluster="over") is Action.WAIT
    assert action(cluster="unknown") is Action.WAIT
    assert event(silent_seconds=6.0) == (Trigger.RESTART, "driver_died")
    assert event(cluster="unknown", silent_seconds=31.0) == (Trigger.RESTART, "driver_died")


def test_a_reported_end_counts_even_if_the_cluster_has_forgotten_the_attempt() -> None:
    assert event(cluster="unknown", told_end=S.SUCCEEDED) == (Trigger.SUCCEED, None)


def test_an_attempt_that_the_cluster_does_not_know_is_submitted() -> None:
    new = {"job_state": S.STARTING, "silent_seconds": None, "attempt_seconds": 2.0}
    assert action(**new, cluster="unknown") is Action.SUBMIT
    assert action(**new, cluster="pending") is Action.WAIT
    new["job_state"] = S.CANCELLING
    assert event(**new, cluster="unknown") == (Trigger.VANISH, "requested")


def test_a_driver_that_never_reports_is_ended_at_the_start_deadline() -> None:
    late = {"job_state": S.STARTING, "silent_seconds": None, "attempt_seconds": 121.0}
    assert action(**late, cluster="pending") is Action.KILL
    decision = decide(replace(RUNNING, **late, cluster="over", cluster_message="no room"), LIMITS)
    assert (decision.event, decision.reason) == (Trigger.FAIL, "start_timed_out")
    assert decision.message == "the driver did not report within 120 s (no room)"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(9.0, Action.WAIT), (11.0, Action.STOP), (21.0, Action.KILL)],
)
def test_an_order_to_cancel_is_enforced_in_the_end(seconds: float, expected: Action) -> None:
    assert action(job_state=S.CANCELLING, state_seconds=seconds) is expected


def test_cancel_now_does_not_wait() -> None:
    assert action(job_state=S.CANCELLING, state_seconds=0.0, cancel_now=True) is Action.KILL


def test_a_pause_has_time_for_its_checkpoint() -> None:
    assert action(job_state=S.PAUSING, state_seconds=80.0) is Action.WAIT
    assert action(job_state=S.PAUSING, state_seconds=95.0) is Action.STOP


def test_a_driver_that_has_reported_its_end_must_exit() -> None:
    assert action(told_end=S.SUCCEEDED, told_seconds=5.0) is Action.WAIT
    assert action(told_end=S.SUCCEEDED, told_seconds=60.0) is Action.KILL


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        ({"told_end": S.SUCCEEDED}, (Trigger.SUCCEED, None)),
        ({"told_end": S.SUCCEEDED, "job_state": S.CANCELLING}, (Trigger.SUCCEED, None)),
        ({"told_end": S.CANCELLED, "job_state": S.CANCELLING}, (Trigger.VANISH, "requested")),
        ({"told_end": S.FAILED, "job_state": S.CANCELLING}, (Trigger.VANISH, "requested")),
        ({"told_end": S.PAUSED, "job_state": S.PAUSING}, (Trigger.HALT, "requested")),
        ({"silent_seconds": 9.0, "job_state": S.PAUSING}, (Trigger.HALT, "requested")),
        ({"told_end": S.FAILED, "reason": "user_task"}, (Trigger.FAIL, "user_task")),
        ({"told_end": S.FAILED, "reason": "peers_lost"}, (Trigger.RESTART, "peers_lost")),
        ({"told_end": S.FAILED, "reason": "node_lost"}, (Trigger.RESTART, "node_lost")),
        ({"told_end": S.FAILED, "reason": "worker_died"}, (Trigger.RESTART, "worker_died")),
        (
            {"told_end": S.FAILED, "reason": "worker_died", "num_restarts": 3},
            (Trigger.FAIL, "worker_died"),
        ),
        (
            {"told_end": S.FAILED, "reason": "worker_died", "job_state": S.PAUSING},
            (Trigger.FAIL, "worker_died"),
        ),
        ({"told_end": S.CANCELLED}, (Trigger.RESTART, "interrupted")),
        ({"told_end": S.PAUSED, "max_restarts": 0}, (Trigger.FAIL, "interrupted")),
    ],
)
def test_how_a_job_ends(view: dict[str, Any], expected: tuple[Trigger, str | None]) -> None:
    assert event(**view) == expected


SECONDS = st.floats(0, 300)
VIEWS = st.builds(
    AttemptView,
    job_state=st.sampled_from(sorted(ACTIVE)),
    state_seconds=SECONDS,
    cancel_now=st.booleans(),
    attempt_seconds=SECONDS,
    silent_seconds=st.none() | SECONDS,
    told_end=st.none() | st.sampled_from([S.SUCCEEDED, S.FAILED, S.CANCELLED, S.PAUSED]),
    told_seconds=SECONDS,
    reason=st.sampled_from([None, "user_task", "worker_died"]),
    message=st.none(),
    cluster=st.sampled_from(get_args(ClusterWord)),
    cluster_message=st.just(""),
    num_restarts=st.integers(0, 4),
    max_restarts=st.integers(0, 3),
)


@given(VIEWS)
def test_what_is_decided_can_always_happen(view: AttemptView) -> None:
    decision = decide(view, LIMITS)
    if decision.action is Action.SETTLE:
        assert decision.event is not None
        assert next_state(view.job_state, decision.event) not in ACTIVE


@given(VIEWS)
def test_nothing_waits_forever(view: AttemptView) -> None:
    """After an order, or a reported end, the attempt is sooner or later killed or settled."""
    ordered = view.job_state in (S.CANCELLING, S.PAUSING) or view.told_end is not None
    late = replace(view, state_seconds=1e4, told_seconds=1e4, attempt_seconds=1e4)
    if ordered:
        assert decide(late, LIMITS).action in (Action.KILL, Action.SETTLE) or (
            late.cluster == "unknown" and late.silent_seconds is not None
        )


@given(VIEWS)
def test_restarts_have_an_end(view: AttemptView) -> None:
    if decide(view, LIMITS).event is Trigger.RESTART:
        assert view.num_restarts < view.max_restarts


def test_a_job_without_room_goes_back_to_the_queue_however_often_it_was_restarted() -> None:
    ended = {"told_end": S.FAILED, "reason": "no_room", "message": "needs 4 CPUs"}
    assert event(**ended, num_restarts=3) == (Trigger.RESTART, "no_room")
    assert event(**ended, job_state=S.PAUSING) == (Trigger.HALT, "requested")
    assert event(**ended, job_state=S.CANCELLING) == (Trigger.VANISH, "requested")


def test_a_preempted_job_starts_again_and_its_limit_is_its_own() -> None:
    ended = {"told_end": S.FAILED, "reason": "preempted", "message": "gradient worker 0 had notice"}
    assert event(**ended, num_restarts=3, num_preemptions=90) == (Trigger.RESTART, "preempted")
    assert event(**ended, num_preemptions=2, max_preemptions=2) == (Trigger.RESTART, "preempted")
    assert event(**ended, num_preemptions=3, max_preemptions=2) == (Trigger.FAIL, "preempted")
    assert event(**ended, job_state=S.PAUSING) == (Trigger.HALT, "requested")


def test_a_lost_node_is_not_the_fault_of_the_job() -> None:
    ended = {"told_end": S.FAILED, "reason": "node_lost"}
    assert event(**ended) == (Trigger.RESTART, "node_lost")
    assert event(**ended, num_restarts=3) == (Trigger.FAIL, "node_lost")


def test_rests_before_restarts_grow_up_to_a_limit() -> None:
    rests = [LIMITS.rest_seconds(number) for number in range(8)]
    assert rests == [0.0, 2.0, 8.0, 32.0, 128.0, 300.0, 300.0, 300.0]
    assert LIMITS.rest_seconds(10**9) == 300.0


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([], Trigger.RESTART),
        ([("driver_died", 7)], Trigger.RESTART),
        ([("driver_died", 7), ("driver_died", 7)], Trigger.FAIL),
        ([("driver_died", 7), ("driver_died", 6)], Trigger.RESTART),
        ([("driver_died", 7), ("worker_died", 7), ("driver_died", 7)], Trigger.RESTART),
        ([("worker_died", 7), ("driver_died", 7), ("driver_died", 7)], Trigger.RESTART),
    ],
)
def test_the_same_failure_without_progress_ends_a_job_early(
    ends: list[tuple[str, int]], expected: Trigger
) -> None:
    earlier = [EarlierEnd(reason=reason, step=step) for reason, step in ends]
    view = replace(
        RUNNING,
        cluster="over",
        silent_seconds=9.0,
        step=7,
        num_restarts=len(ends),
        max_restarts=100,
        earlier=earlier,
    )
    decision = decide(view, LIMITS)
    assert (decision.event, decision.reason) == (expected, "driver_died")
    told = "failed 3 times in a row at step 7, without progress" in str(decision.message)
    assert told is (expected is Trigger.FAIL)


def test_interruptions_from_outside_do_not_count_as_the_same_failure() -> None:
    earlier = [EarlierEnd(reason="interrupted", step=7)] * 9
    view = replace(RUNNING, cluster="over", told_end=S.CANCELLED, step=7, earlier=earlier)
    assert decide(replace(view, max_restarts=100), LIMITS).event is Trigger.RESTART
