"""The torch.distributed group of the gradient workers and the parameter server.

Ranks 0..N-1 are gradient workers, rank N is the parameter server. A group is a value and not the
process-wide default group, so a process can leave it and join another one, and tests run its
members as threads.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

# torch.distributed re-exports these names, but type checkers do not see that.
from torch._C import _distributed_c10d as c10d

from workers.device import Backend
from workers.exchange.messages import Rendezvous, Traffic


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
    """Connect to the store that the parameter server hosts."""
    return c10d.TCPStore(
        rendezvous.host,
        rendezvous.port,
        is_master=False,
        timeout=timedelta(seconds=rendezvous.timeout_seconds),
    )


class Group:
    """One member's end of a group: sums go to the parameter server, broadcasts come from it.

    Workers send their parts of a sum straight to the server, which adds them in the order of the
    ranks. So the result does not depend on how a collective would split it, each worker sends its
    part once, and the server sends nothing, where in a ring it would pass on its own zeros. What
    the server can receive limits the number of workers.

    Tensors may be on any device; they are moved to the one that the backend works on.
    """

    def __init__(self, backend: c10d.Backend, *, rank: int, size: int, device: torch.device):
        self._backend: c10d.Backend | None = backend
        self.rank = rank
        self.size = size
        self.device = device
        self._sending: list[tuple[Any, Tensor]] = []
        self._num_sums = 0
        self._traffic = Traffic()

    @property
    def server(self) -> int:
        """Rank of the parameter server."""
        return self.size - 1

    def send(self, tensor: Tensor) -> None:
        """Send this worker's part of a sum, and return at once.

        The caller must leave `tensor` unchanged until the next broadcast.
        """
        tensor = tensor.to(self.device).contiguous()
        work = self._start("send", [tensor], self.server, self._next_tag())
        self._sending.append((work, tensor))
        self._count(sent=tensor.nbytes)

    def receive_sum(self, like: Tensor) -> Tensor:
        """Return, at the server, the sum of what all workers send, as a new tensor.

        `like` gives its shape and dtype.
        """
        return self.receive_sum_into(self.new_parts(like))

    def new_parts(self, like: Tensor) -> list[Tensor]:
        """Return memory for the parts of all workers, to be used by `receive_sum_into`."""
        return [torch.empty_like(like, device=self.device) for _ in range(self.server)]

    def receive_sum_into(self, parts: Sequence[Tensor]) -> Tensor:
        """Return, at the server, the sum of what all workers send.

        `parts` is memory that is overwritten; the sum is the first of them.
        """
        tag = self._next_tag()
        works = [self._start("recv", [part], rank, tag) for rank, part in enumerate(parts)]
        for work in works:
            self._wait("recv", work)
        self._count(received=sum(part.nbytes for part in parts), messages=len(parts))
        total, *others = parts
        for part in others:
            total.add_(part)
        return total

    def _next_tag(self) -> int:
        """Return the number of the next sum; all members count the sums in the same order."""
        self._num_sums += 1
        return self._num_sums

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Return the server's tensor; the other members' `tensor` gives its shape and dtype."""
        self._finish_sending()
        options = c10d.BroadcastOptions()
        options.rootRank = self.server
        tensor = tensor.to(self.device)
        self._wait("broadcast", self._start("broadcast", [tensor], options))
        if self.rank == self.server:
            self._count(sent=tensor.nbytes * self.server, messages=self.server)
        else:
            self._count(received=tensor.nbytes)
        return tensor

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

    def _finish_sending(self) -> None:
        for work, _ in self._sending:
            self._wait("send", work)
        self._sending.clear()

    def _start(self, call: str, tensors: Sequence[Tensor], *arguments: Any) -> Any:
        if self._backend is None:
            raise PeerLostError("the process group has been left")
        try:
            return getattr(self._backend, call)(tensors, *arguments)
        except torch.AcceleratorError:
            raise  # a device is lost, not a peer
        except RuntimeError as error:
            raise self._lost(call, error) from error

    def _wait(self, call: str, work: Any) -> None:
        try:
            work.wait()
        except torch.AcceleratorError:
            raise  # a device is lost, not a peer
        except RuntimeError as error:
            raise self._lost(call, error) from error

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
    size = rendezvous.num_gradient_workers + 1
    numbered = c10d.PrefixStore(f"group-{rendezvous.epoch}", store)
    timeout = timedelta(seconds=rendezvous.timeout_seconds)
    try:
        if backend == "nccl":
            nccl = c10d.ProcessGroupNCCL.Options()
            nccl._timeout = timeout
            member: c10d.Backend = c10d.ProcessGroupNCCL(numbered, rank, size, nccl)
            return Group(member, rank=rank, size=size, device=device)
        # torch keeps the options that name the address private and out of its stubs; the public
        # way to set the address is an environment variable of the whole process.
        gloo: Any = c10d.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        gloo._devices = [c10d.ProcessGroupGloo.create_device(hostname=own_host)]
        gloo._timeout = timeout
        member = c10d.ProcessGroupGloo(numbered, rank, size, gloo)
    except RuntimeError as error:
        raise PeerLostError(
            f"rank {rank} could not join group {rendezvous.epoch}: {error}"
        ) from error
    return Group(member, rank=rank, size=size, device=torch.device("cpu"))
