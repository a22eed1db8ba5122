"""What survives of a step when a member of the group dies, and the state to continue from.

Parameters and previous update are in the mirrors of the gradient workers, and what the first shard
has decided is mirrored there as well. So a dead shard rolls nothing back but the step in hand.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from workers.exchange.arrays import Array
from workers.exchange.member_progress import MemberProgress
from workers.exchange.messages import (
    ServerReport,
    ShardReport,
    Traffic,
    WorkerReport,
    merge_reports,
)

_DECIDED = (
    "version",
    "update:damping",
    "update:gamma",
    "update:fisher_noise",
    "update:search",
)


@dataclass(frozen=True, kw_only=True)
class StepReports:
    """What all members report of one step."""

    server: ServerReport
    workers: Sequence[WorkerReport]


def last_whole_step(progress: Sequence[MemberProgress], first_step: int) -> int:
    """Return the last step that is done for good; the one after it is repeated.

    It is done in every surviving role, and what was decided about it is known: from the report of
    the deciding shard, or from what that shard told the gradient workers afterwards.

    Args:
        progress: of each surviving process.
        first_step: the first step of the window in hand.
    """
    steps = [
        step for own in progress for step in (own.worker_step, own.shard_step) if step is not None
    ]
    known = _last_decided_step(progress, first_step)
    return min([*steps, known])


def _last_decided_step(progress: Sequence[MemberProgress], first_step: int) -> int:
    decided = [
        report.step
        for own in progress
        for report in own.shard_reports
        if report.decision is not None
    ]
    mirrored = [own.mirror.step for own in progress if own.mirror is not None]
    return max([*decided, *mirrored, first_step - 1])


def whole_reports(
    progress: Sequence[MemberProgress],
    steps: range,
    layers: Sequence[str],
    last: ServerReport | None,
) -> list[StepReports]:
    """Return the reports of the first steps of a window, as the surviving members know them.

    The layers of a shard that is gone are missing in them. `last` is the report before.
    """
    return [_whole_report(progress, step, steps.start, layers, last) for step in steps]


def _whole_report(
    progress: Sequence[MemberProgress],
    step: int,
    first_step: int,
    layers: Sequence[str],
    last: ServerReport | None,
) -> StepReports:
    shards = [r for own in progress for r in own.shard_reports if r.step == step]
    shards.sort(key=lambda report: report.decision is None)
    if not shards or shards[0].decision is None:
        shards.insert(0, _from_mirror(progress, step, shards, last))
    index = step - first_step
    workers = [own.worker_reports[index] for own in progress if len(own.worker_reports) > index]
    return StepReports(server=merge_reports(shards, layers), workers=workers)


def _from_mirror(
    progress: Sequence[MemberProgress],
    step: int,
    others: Sequence[ShardReport],
    last: ServerReport | None,
) -> ShardReport:
    """Return what is known of the first shard's report of a step, after its death."""
    mirror = next(
        own.mirror for own in progress if own.mirror is not None and own.mirror.step == step
    )
    assert mirror.decision is not None, "a whole step was decided"
    return ShardReport(
        step=step,
        decision=mirror.decision,
        inverse_version_step={},
        inverse_gammas={},
        stale_layers={},
        accepted=(),
        stale_applied_total=0 if others or last is None else last.stale_applied_total,
        numeric_events={} if others or last is None else last.numeric_events,
        waited_seconds=0.0,
        phase_seconds={},
        traffic=Traffic(),
        step_seconds=0.0,
        time=time.time(),
    )


def healed_snapshot(
    mirrored: Mapping[str, Array], decided: Mapping[str, Array], last: ServerReport | None
) -> dict[str, Array]:
    """Return the state of a parameter server, without inverses, named as in checkpoints.

    Args:
        mirrored: parameters and previous update [P], as a gradient worker has them.
        decided: the state from which the first shard decides; empty at the start of a run.
        last: the report of the last step, None before the first one.
    """
    counts = last.numeric_events if last is not None else {}
    state = dict(mirrored) | {name: decided[name] for name in _DECIDED if name in decided}
    state["stale_applied"] = np.array(last.stale_applied_total if last is not None else 0)
    return state | {f"count:{kind}": np.array(number) for kind, number in counts.items()}


def reported_decisions(last: ServerReport) -> dict[str, Array]:
    """Return the state from which the first shard decides the step after a report."""
    return {
        "version": np.array(last.parameter_version),
        "update:damping": np.array(last.damping),
        "update:gamma": np.array(last.gamma),
        "update:fisher_noise": np.array(last.fisher_noise),
        "update:search": np.array(last.open_search, dtype=np.float64),
    }
