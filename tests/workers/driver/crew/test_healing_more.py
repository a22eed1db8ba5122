"""What survives of a window of steps in which a shard was lost."""

from __future__ import annotations

from workers.driver.crew.healing import has_gone_beyond, last_whole_step, whole_reports
from workers.exchange.member_progress import MemberProgress
from workers.exchange.messages import ShardReport, StepDecision, Traffic, WorkerReport


def decision(step: int) -> StepDecision:
    return StepDecision(
        applied=True,
        parameter_version=step,
        loss=2.0,
        objective=2.5,
        num_cases=20,
        alpha=1.0,
        mu=0.0,
        update_norm=0.1,
        predicted_change=None,
        reduction_ratio=None,
        damping=1.0,
        gamma=1.0,
        lr=None,
        next_gammas=(1.0,),
    )


def shard_report(step: int, layer: str, *, decides: bool) -> ShardReport:
    return ShardReport(
        step=step,
        decision=decision(step) if decides else None,
        inverse_version_step={layer: 1},
        inverse_gammas={layer: (1.0,)},
        stale_layers={},
        accepted=(),
        stale_applied_total=0,
        numeric_events={},
        waited_seconds=0.0,
        phase_seconds={},
        traffic=Traffic(),
        step_seconds=0.5,
        time=1.7e9,
    )


def progress(
    worker_step: int, shard_step: int | None, layer: str = "a", first_step: int = 4
) -> MemberProgress:
    """A process whose shard, if it has one, is the first one and has reported up to its step."""
    last = first_step - 1 if shard_step is None else shard_step
    return MemberProgress(
        worker_step=worker_step,
        shard_step=shard_step,
        worker_reports=[WorkerReport(phase_seconds={}, traffic=Traffic())] * 3,
        shard_reports=[shard_report(s, layer, decides=True) for s in range(first_step, last + 1)],
        mirror=None,
    )


def test_a_step_that_every_shard_reported_is_complete_and_another_one_is_not() -> None:
    survivors = [progress(5, 5), progress(6, None)]
    assert last_whole_step(survivors, 4) == 5
    for num_shards, is_incomplete in ((1, False), (2, True)):
        reports = whole_reports(survivors, range(4, 6), ("a", "b"), None, num_shards)
        assert [r.is_incomplete for r in reports] == [is_incomplete] * 2
        assert [r.server.step for r in reports] == [4, 5]
        assert list(reports[0].server.inverse_version_step) == ["a"]


def test_a_process_that_has_done_more_than_the_others_undoes_it() -> None:
    assert has_gone_beyond([progress(5, 5), progress(6, None)], 5)
    assert not has_gone_beyond([progress(5, 5), progress(5, None)], 5)
    assert has_gone_beyond([progress(5, 6)], 5)
