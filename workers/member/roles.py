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

from workers.exchange.member_progress import MemberProgress
from workers.exchange.messages import MemberReport, ShardReport, StepOrder, WorkerReport
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
        self.worker = worker
        self.shard = shard
        self._groups: list[Group] = []
        self._worker_reports: list[WorkerReport] = []  # of the window in hand
        self._shard_reports: list[ShardReport] = []
        # The number of threads is a setting of each thread, and it affects rounding.
        self._shard_thread = ThreadPoolExecutor(
            1, "shard", initializer=torch.set_num_threads, initargs=(1,)
        )

    def join(self, join: JoinGroup, worker_rank: int, shard_rank: int, step: int) -> None:
        """Join a group, after `step`, with the ranks of the roles that this process has.

        Raises:
            PeerLostError: a member did not come within the timeout.
        """
        self._groups = []
        self._worker_reports, self._shard_reports = [], []
        self._both(
            lambda: self._join_worker(join, worker_rank, step),
            lambda: self._join_shard(join, shard_rank, step),
        )

    def _join_worker(self, join: JoinGroup, rank: int, step: int) -> None:
        if self.worker is not None:
            group = join(rank)
            self._groups.append(group)
            self.worker.join(group, step)

    def _join_shard(self, join: JoinGroup, rank: int, step: int) -> None:
        if self.shard is not None:
            group = join(rank)
            self._groups.append(group)
            self.shard.shard.join(group, step)

    def run(self, orders: Sequence[StepOrder]) -> list[MemberReport]:
        """Do this process's part of the steps of a window.

        Raises:
            UserTaskError: the user's code raised.
            PeerLostError: another member is gone.
        """
        self._worker_reports, self._shard_reports = [], []
        if self.worker is not None:
            self.worker.expect(orders)
        self._both(lambda: self._work(orders), lambda: self._serve(orders))
        none = [None] * len(orders)
        return [
            MemberReport(worker=worker, shard=shard)
            for worker, shard in zip(
                self._worker_reports or none, self._shard_reports or none, strict=True
            )
        ]

    def _work(self, orders: Sequence[StepOrder]) -> None:
        for order in orders if self.worker is not None else ():
            assert self.worker is not None
            self._worker_reports.append(self.worker.step(order))

    def _serve(self, orders: Sequence[StepOrder]) -> None:
        for order in orders if self.shard is not None else ():
            assert self.shard is not None
            self._shard_reports.append(self.shard.shard.step(order))

    def progress(self) -> MemberProgress:
        """Return how far this process has come, once it has left its group."""
        worker, shard = self.worker, self.shard
        return MemberProgress(
            worker_step=None if worker is None else worker.last_step,
            shard_step=None if shard is None else shard.shard.step_done,
            worker_reports=tuple(self._worker_reports),
            shard_reports=tuple(self._shard_reports),
            mirror=None if worker is None else worker.mirrored_decision(),
        )

    def rewind(self, step: int) -> None:
        """Go back to the end of `step`, which is the last one or the one before it."""
        if self.worker is not None:
            self.worker.rewind(step)
        if self.shard is not None:
            self.shard.shard.rewind(step)

    def replace_shard(self, shard: BuiltShard | None, accepted: Sequence[int]) -> None:
        """Own this shard from now on; inverses that the one before it has are taken over."""
        before = self.shard.store if self.shard is not None else None
        if shard is not None and shard.store is not None:
            shard.store.start_from(accepted, before)
        self.shard = shard

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
