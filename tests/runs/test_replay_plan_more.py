"""Which changes of the members a replay goes through."""

from __future__ import annotations

from pathlib import Path

import pytest

from kfac_dist.runs import Event, StepRecord
from kfac_dist.runs.replay_plan import Difference, first_difference, plan_replay
from tests.runs.test_replay_plan import event, recorded_step, run_of, started


def records_of(*numbers: int, **changes: object) -> list[StepRecord]:
    """A record of each step, with its number of gradient workers."""
    return [
        recorded_step(step, gradient_workers=number, shards=1, epoch=1, **changes)
        for step, number in enumerate(numbers, start=1)
    ]


def change(after_step: int, epoch: int, gradient_workers: int, **details: bool) -> Event:
    facts = {"repeats_step": False, "undoes_step": False, "loses_buffers": False} | details
    return event(
        "member_died",
        after_step,
        role="gradient_worker",
        rank=1,
        details=facts
        | {"after_step": after_step, "epoch": epoch, "gradient_workers": gradient_workers},
    )


def test_workers_that_join_and_leave_between_two_steps_do_so_in_the_replay(tmp_path: Path) -> None:
    records = records_of(2, 2, 2, 3, 3, 3, 2, 2)
    events = [started(), change(3, 2, 3), change(6, 3, 2)]
    plan = plan_replay(run_of(tmp_path, records, events), None)
    assert (plan.last_step, plan.stop) == (8, None)
    assert plan.script.gradient_workers == {4: 3, 7: 2}
    assert plan.script.most_gradient_workers == 3
    assert [step for step in range(1, 9) if plan.script.ends_window(step)] == [3, 6]
    assert (plan.spec.workers.gradient, plan.spec.workers.parameter_server) == (2, 1)


def test_a_run_with_one_number_of_workers_keeps_the_shards_of_its_specification(
    tmp_path: Path,
) -> None:
    plan = plan_replay(run_of(tmp_path, records_of(2, 2, 2), [started()]), None)
    assert plan.script.gradient_workers == {}
    assert plan.spec.workers.parameter_server == "auto"


def test_an_attempt_with_another_number_of_workers_is_gone_through(tmp_path: Path) -> None:
    events = [started(), event("resumed", 2), started(2, gradient_workers=3)]
    plan = plan_replay(run_of(tmp_path, records_of(2, 2, 3, 3), events), None)
    assert (plan.stop, plan.script.gradient_workers) == (None, {3: 3})


@pytest.mark.parametrize(
    ("numbers", "changes", "reason"),
    [
        # A process took the place of one that died, or a shard moved.
        ((2, 2, 2, 2), [change(2, 2, 2, repeats_step=True)], None),
        ((2, 2, 2, 2), [change(2, 2, 1, repeats_step=True), change(2, 3, 2)], None),
        (
            (2, 2, 1, 1),
            [change(2, 2, 1, repeats_step=True)],
            "step 3 was repeated after a member was lost, with 1 instead of 2 gradient workers",
        ),
        (
            (2, 2, 2, 2),
            [change(2, 2, 2, repeats_step=True, undoes_step=True)],
            "an update that was subtracted again is undone only to rounding",
        ),
        (
            (2, 2, 2, 2),
            [change(2, 2, 2, loses_buffers=True)],
            "a gradient worker was lost before step 3, with the buffers of its model",
        ),
        # Two events of one change, and one that happened after the last record.
        ((3, 3, 1, 1), [change(2, 2, 1), change(2, 2, 1)], None),
        ((2, 2), [change(2, 2, 1, undoes_step=True)], None),
        # The step was done again by a later attempt.
        (
            (2, 2, 2, 2),
            [change(2, 2, 2, undoes_step=True), event("resumed", 2), started(2)],
            None,
        ),
    ],
)
def test_a_replay_ends_before_a_change_that_left_something_behind(
    tmp_path: Path, numbers: tuple[int, ...], changes: list[Event], reason: str | None
) -> None:
    plan = plan_replay(run_of(tmp_path, records_of(*numbers), [started(), *changes]), None)
    if reason is None:
        assert plan.stop is None
    else:
        assert plan.stop is not None
        assert (plan.last_step, plan.stop.step) == (2, 3)
        assert reason in plan.stop.reason


def two_layers(step: int, b: int | None, **changes: object) -> StepRecord:
    versions = {"a": 1} | ({} if b is None else {"b": b})
    gammas = {name: [1.0] for name in versions}
    return recorded_step(
        step, inverse_version_step=versions, inverse_gammas=gammas, incomplete=b is None, **changes
    )


@pytest.mark.parametrize(
    ("before", "after", "stale", "is_known"),
    [(1, 1, {}, True), (1, 3, {}, False), (1, 1, {"b": "damp"}, False), (1, None, {}, False)],
)
def test_an_inverse_that_a_lost_shard_did_not_report_is_known_if_it_stayed_the_same(
    tmp_path: Path, before: int, after: int | None, stale: dict[str, str], is_known: bool
) -> None:
    records = [two_layers(1, before), two_layers(2, before), two_layers(3, None)]
    records.append(two_layers(4, after, stale_layers=stale))
    plan = plan_replay(run_of(tmp_path, records, [started()]), None)
    if is_known:
        assert plan.stop is None
    else:
        assert plan.stop is not None
        assert plan.stop.step == 3
        assert "the shard of layer b was lost before it reported step 3" in plan.stop.reason


def test_of_an_incomplete_record_only_the_layers_that_it_has_are_compared() -> None:
    recorded, replayed = two_layers(3, None), two_layers(3, 1)
    assert first_difference(recorded, replayed) is None
    other = replayed.model_copy(update={"inverse_version_step": {"a": 2, "b": 1}})
    assert first_difference(recorded, other) == Difference(
        step=3, field="inverse_version_step", recorded={"a": 1}, replayed={"a": 2}
    )
