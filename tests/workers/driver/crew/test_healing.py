"""What is known of a window of steps after a member has died, and where it continues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from workers.driver.crew.healing import (
    healed_snapshot,
    last_whole_step,
    reported_decisions,
    whole_reports,
)
from workers.exchange.decisions import DecisionMirror
from workers.exchange.member_progress import MemberProgress
from workers.exchange.messages import ShardReport, StepDecision, Traffic, WorkerReport

DONE = WorkerReport(phase_seconds={}, traffic=Traffic())


def decision(step: int) -> StepDecision:
    return StepDecision(
        applied=True,
        parameter_version=step,
        loss=1.0 / step,
        objective=1.0 / step,
        num_cases=20,
        alpha=None,
        mu=None,
        update_norm=0.5,
        predicted_change=None,
        reduction_ratio=None,
        damping=2.0,
        gamma=3.0,
        lr=None,
        next_gammas=(3.0,),
        fisher_noise=0.25,
        open_search=(1.0, 2.0),
    )


def report(step: int, layer: str, *, decides: bool) -> ShardReport:
    return ShardReport(
        step=step,
        decision=decision(step) if decides else None,
        inverse_version_step={layer: step},
        inverse_gammas={layer: (3.0,)},
        stale_layers={},
        accepted=(),
        stale_applied_total=1,
        numeric_events={"bad_step": 1},
        waited_seconds=0.0,
        phase_seconds={},
        traffic=Traffic(),
        step_seconds=0.1,
        time=float(step),
    )


def mirror(step: int) -> DecisionMirror:
    return DecisionMirror(
        step=step, decision=decision(step), damping=2.0, gamma=3.0, fisher_noise=0.25, search=()
    )


def worker(step: int, *, told: int | None = None, ended: int = 0) -> MemberProgress:
    """A gradient worker that has applied `step`, ended so many, and heard of step `told`."""
    return MemberProgress(
        worker_step=step,
        shard_step=None,
        worker_reports=(DONE,) * ended,
        shard_reports=(),
        mirror=None if told is None else mirror(told),
    )


def shard(steps: Sequence[int], *, decides: bool = False, last: int | None = None) -> Any:
    return MemberProgress(
        worker_step=None,
        shard_step=steps[-1] if last is None else last,
        worker_reports=(),
        shard_reports=tuple(report(step, "a", decides=decides) for step in steps),
        mirror=None,
    )


@pytest.mark.parametrize(
    ("progress", "last"),
    [
        ([worker(12), worker(12), shard([11, 12], decides=True)], 12),
        # One of them has not applied the step that another one has.
        ([worker(12), worker(11), shard([11], decides=True, last=12)], 11),
        # The deciding shard is gone. What it decided is known from the step that came after.
        ([worker(12, told=11), worker(12, told=11)], 11),
        ([worker(12, told=11), worker(11, told=11)], 11),
        # It died before it told anything in this window.
        ([worker(10), worker(10), shard([], last=10)], 10),
    ],
)
def test_the_last_step_that_is_not_repeated(progress: list[MemberProgress], last: int) -> None:
    assert last_whole_step(progress, first_step=11) == last


def test_reports_of_steps_whose_deciding_shard_has_died() -> None:
    progress = [worker(12, told=11, ended=1), worker(11, told=11, ended=1), shard([11])]
    (only,) = whole_reports(progress, range(11, 12), ["a", "b"], None, 1)
    assert only.server.loss == pytest.approx(1 / 11)
    assert only.server.parameter_version == 11
    assert only.server.inverse_version_step == {"a": 11}  # those of the dead shard are missing
    assert len(only.workers) == 2


def test_a_dead_shard_continues_from_the_mirrors_and_the_last_report() -> None:
    progress = [shard([11], decides=True), worker(11, ended=1)]
    (last,) = whole_reports(progress, range(11, 12), ["a"], None, 1)
    mirrored = {"parameters": np.ones(3), "update:previous_update": np.zeros(3)}
    state = healed_snapshot(mirrored, reported_decisions(last.server), last.server)
    assert state["version"] == 11
    assert (state["update:damping"], state["update:gamma"]) == (2.0, 3.0)
    assert state["update:search"].tolist() == [1.0, 2.0]
    assert (state["stale_applied"], state["count:bad_step"]) == (1, 1)
    assert mirrored.items() <= state.items()


def test_a_shard_that_dies_in_the_first_step_starts_as_at_the_beginning() -> None:
    state = healed_snapshot({"parameters": np.ones(3)}, {}, None)
    assert set(state) == {"parameters", "stale_applied"}
