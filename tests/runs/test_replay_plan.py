"""Which steps of a run a replay can repeat, and with which inverses and settings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from kfac_dist.coordination.steps.recorded import InverseUse
from kfac_dist.errors import ConflictError, KfacDistError, NotFoundError
from kfac_dist.runs import Evaluation, Event, RunFolder, StepRecord
from kfac_dist.runs.replay_plan import Difference, first_difference, plan_replay
from tests.runs.samples import sample_record, sample_spec

FIRST = {
    "gradient_workers": 2,
    "threads": 1,
    "device": "cpu",
    "staleness_max_steps": 40,
    "precondition_dtype": "bfloat16",
}


def recorded_step(step: int, **changes: Any) -> StepRecord:
    """One layer, a new version every three steps, used one step after its statistics."""
    version = max(1, (step - 1) // 3 * 3)
    values = {
        "inverse_version_step": {"a": version},
        "inverse_gammas": {"a": [2.0 + version / 10, 1.0]} if step % 3 == 1 else {},
    }
    return sample_record(step, **(values | changes))


def run_of(path: Path, records: list[StepRecord], events: list[Event]) -> RunFolder:
    with RunFolder.create(path / "run", sample_spec(steps=50)) as folder:
        for record in records:
            folder.append_metrics(record)
        for event in events:
            folder.append_event(event)
    return RunFolder.open(path / "run")


def started(step: int = 0, **changes: Any) -> Event:
    return Event(kind="started", message="trains", step=step, details=FIRST | changes)


def event(kind: str, step: int, **values: Any) -> Event:
    return Event(kind=kind, message=kind, step=step, **values)


TEN = [recorded_step(step) for step in range(1, 11)]


def test_a_whole_run_is_repeated_with_the_settings_of_its_first_attempt(tmp_path: Path) -> None:
    records = [*TEN[:9], recorded_step(10, stale_layers={"a": "damp"})]
    evaluation = Evaluation(train={"objective": 1.0}, test={"objective": 2.0})
    records[4] = recorded_step(5, evaluation=evaluation)
    events = [started(gradient_workers=3), event("checkpoint", 4), event("checkpoint", 8)]
    plan = plan_replay(run_of(tmp_path, records, events), None)
    assert (plan.last_step, plan.stop) == (10, None)
    assert plan.script.inverses.uses["a"] == [
        InverseUse(first_step=1, version_step=1, gammas=(2.1, 1.0)),
        InverseUse(first_step=4, version_step=3, gammas=(2.3, 1.0)),
        InverseUse(first_step=7, version_step=6, gammas=(2.6, 1.0)),
        InverseUse(first_step=10, version_step=9, gammas=(2.9, 1.0)),
    ]
    assert plan.script.inverses.beyond_bound == {10: {"a": "damp"}}
    assert plan.script.checkpoint_steps == {4, 8}
    assert plan.script.evaluation_steps == {5}
    assert (plan.spec.steps, plan.spec.workers.gradient) == (10, 3)
    assert plan.spec.optimizer.precondition_dtype == "bfloat16"
    assert plan.spec.faults.max_restarts == 0


def test_a_shorter_replay_has_only_the_inverses_that_it_uses(tmp_path: Path) -> None:
    events = [started(), event("checkpoint", 4), event("checkpoint", 8)]
    plan = plan_replay(run_of(tmp_path, TEN, events), 6)
    assert plan.last_step == plan.spec.steps == 6
    assert [use.version_step for use in plan.script.inverses.uses["a"]] == [1, 3]
    assert plan.script.checkpoint_steps == {4}


@pytest.mark.parametrize(
    ("events", "last_step", "reason"),
    [
        ([event("inverse_worker_died", 7, rank=1)], 6, "inverse worker 1 died in step 7"),
        ([event("resumed", 5), started(5)], 10, None),
        (
            [event("resumed", 5), started(5, gradient_workers=1)],
            5,
            "step 6 was resumed with gradient_workers 2 to 1",
        ),
        (
            [event("resumed", 5), started(5, precondition_dtype="float32", threads=2)],
            5,
            "threads 1 to 2, precondition_dtype bfloat16 to float32",
        ),
        (
            [event("factors_missing", 5), event("resumed", 5), started(5)],
            5,
            "step 6 was resumed from a checkpoint that lacks the factors",
        ),
        ([event("factors_missing", 5)], 10, None),
        # Events of steps that were done again no longer count.
        (
            [event("factors_missing", 5), event("resumed", 3), started(3), event("resumed", 5)],
            10,
            None,
        ),
        (
            [event("inverse_worker_died", 7, rank=0), event("resumed", 5), started(5)],
            10,
            None,
        ),
        ([event("resumed", 0), started(0, gradient_workers=4)], 10, None),
    ],
)
def test_a_replay_ends_before_a_step_whose_inputs_are_not_recorded(
    tmp_path: Path, events: list[Event], last_step: int, reason: str | None
) -> None:
    run = run_of(tmp_path, TEN, [started(), *events])
    plan = plan_replay(run, None)
    assert plan.last_step == last_step
    if reason is None:
        assert plan.stop is None
    else:
        assert plan.stop is not None
        assert plan.stop.step == last_step + 1
        assert reason in plan.stop.reason
        assert plan_replay(run, last_step).stop is None


def test_checkpoints_of_steps_that_were_done_again_are_forgotten(tmp_path: Path) -> None:
    events = [
        *(started(), event("checkpoint", 3), event("checkpoint", 6)),
        *(event("resumed", 3), started(3), event("checkpoint", 9)),
    ]
    plan = plan_replay(run_of(tmp_path, TEN, events), None)
    assert plan.script.checkpoint_steps == {3, 9}


def test_a_run_is_refused_if_not_even_its_first_step_can_be_repeated(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="has no step to replay"):
        plan_replay(run_of(tmp_path, [], [started()]), None)
    death = event("inverse_worker_died", 1, rank=0)
    with pytest.raises(ConflictError, match="no step can be replayed: inverse worker 0 died"):
        plan_replay(run_of(tmp_path / "other", TEN, [started(), death]), None)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            recorded_step(8, inverse_version_step={"a": 3}),
            "step 8: version 3 of layer a is impossible",
        ),
        (
            recorded_step(8, inverse_version_step={"a": 9}),
            "step 8: version 9 of layer a is impossible",
        ),
        (recorded_step(8, inverse_version_step={"a": 7}), r"are not recorded \(inverse_gammas\)"),
    ],
)
def test_impossible_records_are_refused(tmp_path: Path, changed: StepRecord, message: str) -> None:
    records = [*TEN[:7], changed, *TEN[8:]]
    with pytest.raises(KfacDistError, match=message):
        plan_replay(run_of(tmp_path, records, [started()]), None)


def test_records_of_an_earlier_version_cannot_be_replayed(tmp_path: Path) -> None:
    records = [record.model_copy(update={"inverse_gammas": {}}) for record in TEN]
    with pytest.raises(KfacDistError, match="were written before replays were possible"):
        plan_replay(run_of(tmp_path, records, [event("started", 0)]), None)


def test_the_last_bit_makes_a_difference() -> None:
    recorded = recorded_step(4, loss=math.nan, damping=0.1, lr=None)
    slower = recorded.model_copy(update={"step_seconds": 9.0, "time": 1.0})
    assert first_difference(recorded, slower) is None
    other = recorded.model_copy(update={"damping": math.nextafter(0.1, 1)})
    found = first_difference(recorded, other)
    assert found == Difference(
        step=4, field="damping", recorded=0.1, replayed=math.nextafter(0.1, 1)
    )
    assert str(found) == (
        "step 4: damping is 0.10000000000000002 in the replay and 0.1 in the records"
    )
    assert first_difference(recorded, recorded.model_copy(update={"loss": 1.0})) is not None
