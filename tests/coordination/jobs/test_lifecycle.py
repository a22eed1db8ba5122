from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.coordination.jobs.lifecycle import (
    ACTIVE,
    ENDED,
    JobState,
    Trigger,
    next_state,
    possible_requests,
)
from kfac_dist.errors import ConflictError

WAITING = {JobState.PENDING, JobState.QUEUED, JobState.PAUSED}
EVENTS = st.lists(st.sampled_from(Trigger), max_size=40)


def after(events: list[Trigger], state: JobState = JobState.PENDING) -> list[JobState]:
    """Return all states on the way; an event that is refused does not change the state."""
    states = [state]
    for event in events:
        try:
            states.append(next_state(states[-1], event))
        except ConflictError:
            states.append(states[-1])
    return states


@pytest.mark.parametrize(
    ("events", "end"),
    [
        ("enqueue launch run succeed", "SUCCEEDED"),
        ("enqueue launch run degrade run succeed", "SUCCEEDED"),
        ("enqueue launch run restart relaunch run succeed", "SUCCEEDED"),
        ("enqueue launch run pause run halt resume relaunch run", "RUNNING"),
        ("enqueue launch run cancel degrade vanish", "CANCELLED"),
        ("enqueue launch run pause cancel vanish retry relaunch", "RESUMING"),
        ("enqueue launch cancel succeed", "SUCCEEDED"),
        ("enqueue launch fail retry", "QUEUED"),
        ("pause resume launch", "STARTING"),
        ("cancel", "CANCELLED"),
    ],
)
def test_lives(events: str, end: str) -> None:
    state = JobState.PENDING
    for event in events.split():
        state = next_state(state, Trigger(event))
    assert state == end


@given(EVENTS)
def test_only_a_retry_leaves_an_end_and_nothing_leaves_success(events: list[Trigger]) -> None:
    states = after(events)
    for event, before, then in zip(events, states, states[1:], strict=False):
        if before in ENDED and then is not before:
            assert event is Trigger.RETRY
            assert before is not JobState.SUCCEEDED


@given(EVENTS)
def test_only_a_launch_makes_an_attempt_and_only_proof_or_news_ends_one(
    events: list[Trigger],
) -> None:
    states = after(events)
    for event, before, then in zip(events, states, states[1:], strict=False):
        if then in ACTIVE and before not in ACTIVE:
            assert event in (Trigger.LAUNCH, Trigger.RELAUNCH)
            assert before is JobState.QUEUED
        if before in ACTIVE and then not in ACTIVE:
            assert event in {
                Trigger.HALT,
                Trigger.VANISH,
                Trigger.SUCCEED,
                Trigger.FAIL,
                Trigger.RESTART,
            }


@given(EVENTS)
def test_a_request_to_cancel_is_never_forgotten(events: list[Trigger]) -> None:
    state = next_state(JobState.RUNNING, Trigger.CANCEL)
    for then in after(events, state):
        if then is not JobState.CANCELLING:
            assert then in (JobState.CANCELLED, JobState.SUCCEEDED)
            return


@given(st.sampled_from(JobState))
def test_every_state_waits_acts_or_has_ended(state: JobState) -> None:
    assert (state in WAITING) + (state in ACTIVE) + (state in ENDED) == 1


@pytest.mark.parametrize("state", JobState)
@pytest.mark.parametrize("event", [Trigger.PAUSE, Trigger.RESUME, Trigger.CANCEL, Trigger.RETRY])
def test_a_refusal_names_the_possible_requests(state: JobState, event: Trigger) -> None:
    if event in possible_requests(state):
        next_state(state, event)
        return
    with pytest.raises(ConflictError, match=f"{event} is not possible .* {state};") as caught:
        next_state(state, event)
    for request in possible_requests(state):
        assert request in caught.value.message


@pytest.mark.parametrize("event", [Trigger.CANCEL, Trigger.PAUSE, Trigger.RUN, Trigger.DEGRADE])
def test_the_same_request_or_report_twice_changes_nothing(event: Trigger) -> None:
    once = next_state(JobState.RUNNING, event)
    assert next_state(once, event) is once
