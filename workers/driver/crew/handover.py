"""The state of the parameter server on its way from the shards of one group to those of the next.

While it is on its way the driver has it, so that no death of a member loses it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kfac_dist.errors import KfacDistError
from workers.driver.crew.healing import healed_snapshot, reported_decisions
from workers.driver.crew.processes import (
    Calls,
    CrewPlan,
    GroupCalls,
    GroupProcess,
    call,
    with_shard,
    with_worker,
)
from workers.exchange.arrays import Array, to_array, to_tensor
from workers.exchange.messages import ServerReport
from workers.exchange.shard_plan import ShardPlan, merge_snapshots, split_snapshot

_AVERAGE = "average:average"


class Handover:
    """Takes the state of the parameter server and gives it to other shards.

    Args:
        plan: how the crew was started.
        calls: waits for calls.
        averages: whether parameters are averaged.
    """

    def __init__(self, plan: CrewPlan, calls: GroupCalls, *, averages: bool) -> None:
        self._plan = plan
        self._calls = calls
        self._averages = averages
        self._state: Mapping[str, Array] | None = None  # only on its way

    def check(
        self,
        cause: KfacDistError,
        alive: Sequence[GroupProcess],
        silent: Sequence[GroupProcess],
    ) -> None:
        """Raise `cause` if nobody has the whole state any more."""
        is_lost = not self._plan.has_mirrors or not with_worker(alive)
        if self._state is None and with_shard(silent) and is_lost:
            raise cause

    def take(
        self,
        cause: KfacDistError,
        alive: Sequence[GroupProcess],
        silent: Sequence[GroupProcess],
        shards: ShardPlan,
        last: ServerReport | None,
    ) -> None:
        """Take the state from the shards, and from the mirrors what the silent ones had.

        If it is on its way already, nothing is taken.

        Args:
            cause: raised if nobody has a part of the state.
            alive: the members of the last group that answer.
            silent: those that do not.
            shards: how the parameters are cut in that group.
            last: the report of the last step, None before the first one.
        """
        if self._state is not None:
            return
        owners = with_shard(alive)
        own = dict(zip(owners, self._calls.gather(call(owners, "snapshot", [])), strict=True))
        if not with_shard(silent):
            self._state = merge_snapshots(shards, list(own.values()))
            return
        # What a silent shard had: parameters and previous update are mirrored, inverses are
        # sent again by the inverse workers.
        self.check(cause, alive, silent)
        workers = with_worker(alive)
        (mirrored,) = self._calls.gather(call(workers[:1], "mirrored_state", []))
        decided = next((part for p, part in own.items() if p.place.shard == 0), None)
        if decided is None:
            decided = reported_decisions(last) if last else self._plan.server_snapshot or {}
        averages = {}
        if self._averages:
            num_workers = len(with_worker([*alive, *silent]))
            averages = self._mirrored_averages(cause, own, workers, shards, num_workers)
        self._state = healed_snapshot(mirrored, decided, last) | averages

    def _mirrored_averages(
        self,
        cause: KfacDistError,
        own: Mapping[GroupProcess, Mapping[str, Array]],
        workers: Sequence[GroupProcess],
        shards: ShardPlan,
        num_workers: int,
    ) -> dict[str, Array]:
        """Return the average of the parameters, from the shards that live and from mirrors."""
        by_shard = {process.place.shard: snapshot for process, snapshot in own.items()}
        parts: list[Mapping[str, Array]] = []
        for shard in range(len(shards)):
            if shard in by_shard:
                parts.append(by_shard[shard])
                continue
            rank = (shard + 1) % num_workers
            mirrors = [process for process in workers if process.place.worker == rank]
            if not mirrors:
                raise cause
            (part,) = self._calls.gather(call(mirrors, "mirrored_average", [shard]))
            parts.append(part)
        names = [name for name in parts[0] if name.startswith("average:")]
        if _AVERAGE not in names:
            return {}
        slices = [to_tensor(part[_AVERAGE]) for part in parts]
        whole = to_array(shards.whole(slices))
        return {name: parts[0][name] for name in names} | {_AVERAGE: whole}

    def give(
        self, processes: Sequence[GroupProcess], shards: ShardPlan, accepted: Sequence[int]
    ) -> None:
        """Give each process the state of the shard that it has now, if it is on its way.

        Args:
            processes: all members, in their new places.
            shards: how the parameters are cut among them.
            accepted: the steps whose statistics were accepted.
        """
        if self._state is None:
            return
        calls: Calls = {}
        for process in processes:
            part, shard = None, process.place.shard
            if shard is not None:
                part = split_snapshot(shards, self._state, shard)
            calls[process.handle.own_shard.remote(process.place, part, accepted)] = process.member
        self._calls.gather(calls)

    def end(self) -> None:
        """Forget the state, which the shards of the new group have."""
        self._state = None
