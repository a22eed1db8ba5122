"""The torch.distributed group of the gradient workers and the shards of the parameter server.

Ranks 0..N-1 are gradient workers, ranks N..N+S-1 the shards. A shard that shares the process of a
gradient worker is a member of its own. A group is a value and not the process-wide default group,
so a process can leave it and join another one, and tests run its members as threads.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from datetime import timedelta
from enum import IntEnum, auto
from typing import Any

import torch
from torch import Tensor

# torch.distributed re-exports these names, but type checkers do not see that.
from torch._C import _distributed_c10d as c10d

from workers.device import Backend
from workers.exchange.messages import Rendezvous, Traffic
from workers.heartbeat import waiting

# How long connecting to all others may take, once all have been asked to.
_CONNECTING = timedelta(seconds=15)


class PeerLostError(RuntimeError):
    """A collective failed because another member is gone or late.

    It is seldom the cause of a failure, mostly an echo of a failure in another member.
    """


def host_store(host: str, timeout_seconds: float) -> c10d.TCPStore:
    """Open the store at which the members meet, on a free port of the address `host` alone."""
    # A store that opens its own socket listens on all interfaces.
    listening = socket.create_server((host, 0))
    port = listening.getsockname()[1]
    return c10d.TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_seconds),
        master_listen_fd=listening.detach(),
    )


def join_store(rendezvous: Rendezvous) -> c10d.TCPStore:
    """Connect to the store that the driver hosts.

    Raises:
        PeerLostError: the store has been closed, because another member is gone.
    """
    try:
        return c10d.TCPStore(
            rendezvous.host,
            rendezvous.port,
            is_master=False,
            timeout=timedelta(seconds=rendezvous.timeout_seconds),
        )
    except RuntimeError as error:
        raise PeerLostError(f"could not join group {rendezvous.epoch}: {error}") from error


class Kind(IntEnum):
    """What a message is; gloo keeps messages of different kinds apart."""

    STATE = 1
    BEGIN = auto()
    GRADIENT = auto()
    SUMS = auto()
    STATISTICS = auto()
    USABLE = auto()
    MOMENTS = auto()
    FINITE = auto()
    VERDICT = auto()
    COMPLETE = auto()
    GAMMAS = auto()
    HEADER = auto()
    DIRECTIONS = auto()
    NUMBERS = auto()
    FISHER = auto()
    CHOICE = auto()
    BASES_HEADER = auto()
    BASES = auto()
    LOSS = auto()
    SQUARES = auto()
    PARAMETERS = auto()
    AVERAGE = auto()
    AVERAGE_STATE = auto()


class Group:
    """One member's end of a group: messages from one member to another, in order by kind.

    Sums are received part by part and added in the order of the ranks. So the result does not
    depend on how a collective would split it, and each worker sends its part once.

    Tensors may be on any device; they are moved to the one that the backend works on.
    """

    def __init__(
        self,
        backend: c10d.Backend,
        *,
        rank: int,
        num_workers: int,
        num_shards: int,
        device: torch.device,
    ) -> None:
        self._backend: c10d.Backend | None = backend
        self.rank = rank
        self.workers = range(num_workers)
        self.shards = range(num_workers, num_workers + num_shards)
        self.device = device
        self.patience: timedelta | None = None  # in a wait; None for that of the backend
        self._sending: list[tuple[Any, Tensor]] = []
        self._traffic = Traffic()

    @property
    def decider(self) -> int:
        """Rank of the shard that decides for all: the first."""
        return self.shards.start

    @property
    def size(self) -> int:
        """The number of members."""
        return self.shards.stop

    def send(self, kind: Kind, tensor: Tensor, to: int) -> None:
        """Send a tensor and return at once.

        The caller must leave `tensor` unchanged until `finish_sending` has returned.
        """
        tensor = tensor.to(self.device).contiguous()
        self._sending.append((self._start("send", [tensor], to, int(kind)), tensor))
        self._count(sent=tensor.nbytes)

    def finish_sending(self) -> None:
        """Wait until everything that was sent may be overwritten."""
        sending, self._sending = self._sending, []
        self._wait_for_all("send", [work for work, _ in sending])

    def receive(self, kind: Kind, into: Tensor, source: int) -> Tensor:
        """Receive a tensor into the memory of `into`, which is on the backend's device."""
        (received,) = self.receive_all(kind, [(into, source)])
        return received

    def receive_all(self, kind: Kind, messages: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
        """Receive one tensor from each source, all at the same time, and return them in order."""
        self._wait_for_all(
            "recv", [self._start("recv", [into], source, int(kind)) for into, source in messages]
        )
        received = [into for into, _ in messages]
        self._count(received=sum(t.nbytes for t in received), messages=len(received))
        return received

    def receive_sum(self, kind: Kind, parts: Sequence[Tensor]) -> Tensor:
        """Return the sum of what all workers send.

        `parts` is memory for the part of each worker, which is overwritten; the sum is the first.
        """
        self.receive_all(kind, list(zip(parts, self.workers, strict=True)))
        total, *others = parts
        for part in others:
            total.add_(part)
        return total

    def new_parts(self, like: Tensor) -> list[Tensor]:
        """Return memory for the parts of all workers, to be used by `receive_sum`."""
        return [torch.empty_like(like, device=self.device) for _ in self.workers]

    def send_numbers(self, kind: Kind, numbers: Sequence[float], to: Sequence[int]) -> None:
        """Send a few numbers, exactly as they are, to each of some members."""
        tensor = torch.tensor(numbers, dtype=torch.float64)
        for rank in to:
            self.send(kind, tensor, rank)

    def receive_numbers(self, kind: Kind, count: int, source: int) -> list[float]:
        """Receive `count` numbers from one member."""
        into = torch.empty(count, dtype=torch.float64, device=self.device)
        numbers: list[float] = self.receive(kind, into, source).tolist()
        return numbers

    def sum_numbers(self, kind: Kind, count: int) -> list[float]:
        """Return the sums of the numbers that all workers send."""
        like = torch.empty(count, dtype=torch.float64)
        numbers: list[float] = self.receive_sum(kind, self.new_parts(like)).tolist()
        return numbers

    def take_traffic(self) -> Traffic:
        """Return what this member has sent and received since the last call."""
        taken, self._traffic = self._traffic, Traffic()
        return taken

    def _count(self, *, sent: int = 0, received: int = 0, messages: int = 1) -> None:
        so_far = self._traffic
        self._traffic = Traffic(
            sent_bytes=so_far.sent_bytes + sent,
            received_bytes=so_far.received_bytes + received,
            num_messages=so_far.num_messages + messages,
        )

    def _start(self, call: str, tensors: Sequence[Tensor], *arguments: Any) -> Any:
        if self._backend is None:
            raise PeerLostError("the process group has been left")
        try:
            return getattr(self._backend, call)(tensors, *arguments)
        except torch.AcceleratorError:
            raise  # a device is lost, not a peer
        except RuntimeError as error:
            raise self._lost(call, error) from error

    def _wait_for_all(self, call: str, works: list[Any]) -> None:
        """Wait for `works` in order, and forget them.

        A work keeps the connections of the group open, and an error keeps the frames that it went
        through. So after an error none may be left in these, or `leave` would close nothing and
        the other members would wait until the timeout.
        """
        patience = () if self.patience is None else (self.patience,)
        try:
            with waiting():
                while works:
                    works[0].wait(*patience)
                    del works[0]
        except torch.AcceleratorError:
            raise  # a device is lost, not a peer
        except RuntimeError as error:
            raise self._lost(call, error) from error
        finally:
            works.clear()

    def _lost(self, call: str, error: RuntimeError) -> PeerLostError:
        return PeerLostError(f"{call} in rank {self.rank}: {error}")

    def leave(self) -> None:
        """Close the connections, so that members that wait for this one fail at once."""
        self._backend = None
        self._sending.clear()


def join_group(
    rendezvous: Rendezvous,
    store: c10d.Store,
    *,
    rank: int,
    own_host: str,
    backend: Backend,
    device: torch.device,
) -> Group:
    """Join the group `rendezvous.epoch`, and return when all members are there.

    `own_host` is the address on which this member listens.

    Raises:
        PeerLostError: a member did not come within the timeout.
    """
    size = rendezvous.num_gradient_workers + rendezvous.num_shards
    numbered = c10d.PrefixStore(f"group-{rendezvous.epoch}", store)
    timeout = timedelta(seconds=rendezvous.timeout_seconds)
    try:
        if backend == "nccl":
            nccl = c10d.ProcessGroupNCCL.Options()
            nccl._timeout = timeout
            member: c10d.Backend = c10d.ProcessGroupNCCL(numbered, rank, size, nccl)
            return _group(member, rendezvous, rank, device)
        # torch keeps the options that name the address private and out of its stubs; the public
        # way to set the address is an environment variable of the whole process.
        gloo: Any = c10d.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        gloo._devices = [c10d.ProcessGroupGloo.create_device(hostname=own_host)]
        # A death now is noticed only by this timeout; afterwards a connection breaks.
        gloo._timeout = min(timeout, _CONNECTING)
        member = c10d.ProcessGroupGloo(numbered, rank, size, gloo)
    except RuntimeError as error:
        raise PeerLostError(
            f"rank {rank} could not join group {rendezvous.epoch}: {error}"
        ) from error
    group = _group(member, rendezvous, rank, torch.device("cpu"))
    group.patience = timeout
    return group


def _group(member: c10d.Backend, rendezvous: Rendezvous, rank: int, device: torch.device) -> Group:
    return Group(
        member,
        rank=rank,
        num_workers=rendezvous.num_gradient_workers,
        num_shards=rendezvous.num_shards,
        device=device,
    )
