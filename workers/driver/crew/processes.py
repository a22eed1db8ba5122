"""The processes of a group as the driver holds them: gradient workers, shards, or both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from workers.actor import Handle, Ref, gpu_options
from workers.device import DevicePlan
from workers.driver.crew.failures import Member
from workers.driver.crew.health import patience_seconds
from workers.exchange.arrays import Array
from workers.exchange.messages import InverseSetup, JobContext, MemberPlace
from workers.exchange.shard_plan import ShardPlan
from workers.member.actor import GradientWorkerActor, ParameterServerActor

Calls = dict[Ref, Member]
"""Open calls, and the member that each was made to."""

SERVER_ROLE = "parameter_server"
WORKER_ROLE = "gradient_worker"


@dataclass(frozen=True, kw_only=True)
class CrewPlan:
    """Which actors to start, and the state they start from.

    `host` is the address that all members share, None where each node has its own. `shards` says
    how the parameters are cut at first, `plan_shards` how for another number. `layers` are all
    layers in the order of the model.
    `server_snapshot`, `averages` and `buffers` come from a checkpoint, if the run resumes.
    `has_buffers`: the model has buffers. `has_mirrors`: the gradient workers mirror all that a
    shard has beside its inverses. `start_step` is the step after which training starts.
    `catch_up_logs` brings what members on other nodes have written into the run folder.
    """

    devices: DevicePlan
    host: str | None
    plan_shards: Callable[[int], ShardPlan]
    shards: ShardPlan
    layers: Sequence[str]
    setups: Sequence[InverseSetup]
    server_snapshot: Mapping[str, Array] | None
    averages: Mapping[str, Array]
    buffers: Mapping[str, Array]
    has_buffers: bool
    has_mirrors: bool
    start_step: int
    catch_up_logs: Callable[[], None]


@dataclass(kw_only=True, eq=False)
class GroupProcess:
    """A process of the group; `member` is how people know it.

    `number` is its own for the whole attempt, whatever its place.
    """

    number: int
    place: MemberPlace
    handle: Handle
    member: Member
    log: Member
    """As whom it writes its log, which is what it was started as."""


class GroupCalls(Protocol):
    """What a change of the group needs: ways to wait for calls, and to form a group."""

    def gather(self, calls: Calls) -> list[Any]:
        """Wait for all `calls` and return their results in order."""

    def settle(self, calls: Calls) -> list[GroupProcess]:
        """Wait until all calls have ended, however they end; return the processes that died."""

    def wait(self) -> None:
        """Let a moment pass, and handle what has happened."""

    def form_group(self, processes: Sequence[GroupProcess], shards: ShardPlan, step: int) -> int:
        """Form a group of these processes after `step`, and return its epoch."""

    def forget(self, process: GroupProcess) -> None:
        """Forget all about a process that is gone, and end it if it is not."""


@dataclass(frozen=True, kw_only=True)
class GroupShape:
    """How large a group is, for the records of its steps; `epoch` counts from 1."""

    epoch: int
    gradient_workers: int
    shards: int


def first_places(job: JobContext, num_shards: int) -> list[MemberPlace]:
    """Return the roles of each process at the start: the shards first, then the workers."""
    shared = job.spec.workers.has_colocated_shards
    alone = [
        MemberPlace(worker=None, shard=shard, num_shards=num_shards)
        for shard in range(0 if shared else num_shards)
    ]
    workers = [
        MemberPlace(
            worker=rank,
            shard=rank if shared and rank < num_shards else None,
            num_shards=num_shards,
        )
        for rank in range(job.spec.workers.gradient)
    ]
    return alone + workers


def start_process(job: JobContext, plan: CrewPlan, place: MemberPlace, number: int) -> GroupProcess:
    """Start a process for this place, without waiting until it is there."""
    threads = job.spec.workers.threads or 1
    if place.worker is None:
        actor, threads = ParameterServerActor, 1
        options: dict[str, Any] = {}
    else:
        actor = GradientWorkerActor
        options = {"num_cpus": threads}
    patience = patience_seconds(job.spec.faults)
    options |= gpu_options(plan.devices.gpus_per_member)
    handle = actor.options(**options).remote(job, place, plan.devices, plan.host, threads, patience)
    member = member_at(place)
    return GroupProcess(number=number, place=place, handle=handle, member=member, log=member)


def member_at(place: MemberPlace, pid: int = 0) -> Member:
    """Return how people know the process at this place."""
    if place.worker is None:
        return Member(role=SERVER_ROLE, rank=place.shard or 0, pid=pid)
    return Member(role=WORKER_ROLE, rank=place.worker, pid=pid)


def call(processes: Sequence[GroupProcess], method: str, arguments: Sequence[Any]) -> Calls:
    """Call a method of each process."""
    return {
        getattr(process.handle, method).remote(*arguments): process.member for process in processes
    }


def with_worker(processes: Sequence[GroupProcess]) -> list[GroupProcess]:
    """Return the processes that are gradient workers, in the order of their ranks."""
    found = [process for process in processes if process.place.worker is not None]
    return sorted(found, key=lambda process: process.place.worker or 0)


def with_shard(processes: Sequence[GroupProcess]) -> list[GroupProcess]:
    """Return the processes that have a shard, in the order of the shards."""
    found = [process for process in processes if process.place.shard is not None]
    return sorted(found, key=lambda process: process.place.shard or 0)


def place_members(
    members: Sequence[GroupProcess],
    alone: Sequence[GroupProcess],
    num_shards: int,
    *,
    shared: bool,
) -> dict[int, MemberPlace]:
    """Return the next place of each process, by its number.

    Shards stay where they are if they can. One whose process is gone moves into that of a gradient
    worker; only if there are fewer processes than shards, there are fewer shards from then on.

    Args:
        members: the gradient workers in the order of their ranks.
        alone: processes that only have a shard.
        num_shards: the number of shards that there shall be.
        shared: whether the shards are those of the first gradient workers.
    """
    if shared:
        owners: dict[int, int] = {members[s].number: s for s in range(num_shards)}
    else:
        processes = [*alone, *members]
        num_shards = min(num_shards, len(processes))
        owners = {
            process.number: process.place.shard
            for process in processes
            if process.place.shard is not None and process.place.shard < num_shards
        }
        free = [process for process in processes if process.number not in owners]
        for shard in sorted(set(range(num_shards)) - set(owners.values())):
            owners[free.pop(0).number] = shard
    ranks: dict[int, int | None] = {process.number: None for process in alone}
    ranks |= {process.number: rank for rank, process in enumerate(members)}
    return {
        number: MemberPlace(worker=rank, shard=owners.get(number), num_shards=num_shards)
        for number, rank in ranks.items()
    }
