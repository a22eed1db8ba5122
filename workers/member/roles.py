"""What a process of the group does in a step, as a gradient worker, as a shard, or as both.

No Ray here: the actor in `workers.member.actor` is a shell around this. Where a process has both
roles, the shard works in a thread of its own; each role is a member of the group with its own
connections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from workers.exchange.messages import MemberReport, StepOrder
from workers.exchange.process_group import Group, PeerLostError
from workers.gradient_worker.work import GradientWork
from workers.parameter_server.build import BuiltShard

T = TypeVar("T")
U = TypeVar("U")

JoinGroup = Callable[[int], Group]
"""Joins the group with a rank, and returns when all members are there."""


class MemberRoles:
    """The roles of one process: `worker`, `shard`, or both; at least one of them."""

    def __init__(self, worker: GradientWork | None, shard: BuiltShard | None) -> None:
        assert worker is not None or shard is not None, "a member has a role"
        self.worker = worker
        self.shard = shard
        self._groups: list[Group] = []
        # The number of threads is a setting of each thread, and it affects rounding.
        self._shard_thread = ThreadPoolExecutor(
            1, "shard", initializer=torch.set_num_threads, initargs=(1,)
        )

    def join(self, join: JoinGroup, worker_rank: int, shard_rank: int) -> None:
        """Join a group with the ranks of the roles that this process has.

        Raises:
            PeerLostError: a member did not come within the timeout.
        """
        self._groups = []
        self._both(
            lambda: self._join_worker(join, worker_rank), self._shard_joins(join, shard_rank)
        )

    def _join_worker(self, join: JoinGroup, rank: int) -> None:
        if self.worker is not None:
            group = join(rank)
            self._groups.append(group)
            self.worker.join(group)

    def _shard_joins(self, join: JoinGroup, rank: int) -> Callable[[], None]:
        def join_shard() -> None:
            if self.shard is not None:
                group = join(rank)
                self._groups.append(group)
                self.shard.shard.join(group)

        return join_shard

    def run(self, orders: Sequence[StepOrder]) -> list[MemberReport]:
        """Do this process's part of the steps of a window.

        Raises:
            UserTaskError: the user's code raised.
            PeerLostError: another member is gone.
        """
        worker, shard = self.worker, self.shard
        done, served = self._both(
            lambda: [worker.step(order) for order in orders] if worker else None,
            lambda: [shard.shard.step(order) for order in orders] if shard else None,
        )
        none = [None] * len(orders)
        return [
            MemberReport(worker=as_worker, shard=as_shard)
            for as_worker, as_shard in zip(done or none, served or none, strict=True)
        ]

    def _both(self, as_worker: Callable[[], T], as_shard: Callable[[], U]) -> tuple[T, U]:
        """Do both at once; on an error, leave the group so that nobody waits."""
        future: Future[U] | None = None
        if self.shard is not None and self.worker is not None:
            future = self._shard_thread.submit(self._or_leave, as_shard)
        errors: list[Exception] = []
        done: list[T] = []
        served: list[U] = []
        try:
            done.append(self._or_leave(as_worker))
        except Exception as error:  # noqa: BLE001 - raised again below
            errors.append(error)
        try:
            served.append(future.result() if future else self._or_leave(as_shard))
        except Exception as error:  # noqa: BLE001 - raised again below
            errors.append(error)
        if errors:
            # The loss of a peer is seldom the cause.
            raise next((e for e in errors if not isinstance(e, PeerLostError)), errors[0])
        return done[0], served[0]

    def _or_leave(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except Exception:
            self.leave()
            raise

    def leave(self) -> None:
        """Leave the group; calls that wait for others fail."""
        for group in self._groups:
            group.leave()
