"""How far a process of the group has come, when a group ends and a new one is formed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from workers.exchange.decisions import DecisionMirror
from workers.exchange.messages import ShardReport, WorkerReport


@dataclass(frozen=True, kw_only=True)
class MemberProgress:
    """What a process has done of the window in hand.

    Attributes:
        worker_step: the last step that it has applied or skipped as a gradient worker, None if it
            is none.
        shard_step: the same for its shard.
        worker_reports: of the steps of the window that it has ended as a gradient worker.
        shard_reports: the same for its shard.
        mirror: what the deciding shard told the gradient worker last.
    """

    worker_step: int | None
    shard_step: int | None
    worker_reports: Sequence[WorkerReport]
    shard_reports: Sequence[ShardReport]
    mirror: DecisionMirror | None
