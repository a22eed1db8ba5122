"""The torch.distributed group of the gradient workers and the parameter server.

Ranks 0..N-1 are gradient workers, rank N is the parameter server. A group is a value, not the
process-wide default group: it can be left and another one joined, and tests run its members as
threads.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

# torch.distributed re-exports these, but not for type checkers.
from torch._C import _distributed_c10d as c10d

from workers.device import Backend
from workers.messages import Rendezvous


class PeerLostError(RuntimeError):
    """A collective failed: some other member is gone or late. Seldom the cause, mostly an echo."""


def host_store(host: str, timeout_seconds: float) -> c10d.TCPStore:
    """Open the store at which the members meet, on a free port of the address `host` alone.

    The store by itself would listen on all interfaces.
    """
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
    """One member's end of a group: two collectives, both with the parameter server as root.

    Tensors are handed in on any device and moved to the one the backend works on.
    """

    def __init__(self, backend: c10d.Backend, *, rank: int, size: int, device: torch.device):
        self._backend: c10d.Backend | None = backend
        self.rank = rank
        self.size = size
        self.device = device

    @property
    def server(self) -> int:
        """Rank of the parameter server."""
        return self.size - 1

    def reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum over the members, at the server; elsewhere the result means nothing.

        `tensor` may be overwritten.
        """
        options = c10d.ReduceOptions()
        options.rootRank = self.server
        tensor = tensor.to(self.device)
        self._run("reduce", [tensor], options)
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Return the server's tensor; at the other members `tensor` gives shape and dtype."""
        options = c10d.BroadcastOptions()
        options.rootRank = self.server
        tensor = tensor.to(self.device)
        self._run("broadcast", [tensor], options)
        return tensor

    def _run(self, collective: str, tensors: list[Tensor], options: Any) -> None:
        if self._backend is None:
            raise PeerLostError("the process group has been left")
        try:
            getattr(self._backend, collective)(tensors, options).wait()
        except RuntimeError as error:
            raise PeerLostError(f"{collective} in rank {self.rank}: {error}") from error

    def leave(self) -> None:
        """Close the connections, so that members waiting for this one fail at once."""
        self._backend = None


def join_group(
    rendezvous: Rendezvous,
    store: c10d.Store,
    *,
    rank: int,
    own_host: str,
    backend: Backend,
    device: torch.device,
) -> Group:
    """Join the group `rendezvous.epoch`; returns when all members are there.

    `own_host` is the address on which this member listens.

    Raises:
        PeerLostError: some member did not come within the timeout.
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
        # The options that name the address are private in torch's Python and left out of its
        # stubs; the public way is an environment variable.
        gloo: Any = c10d.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        gloo._devices = [c10d.ProcessGroupGloo.create_device(hostname=own_host)]
        gloo._timeout = timeout
        member = c10d.ProcessGroupGloo(numbered, rank, size, gloo)
    except RuntimeError as error:
        raise PeerLostError(
            f"rank {rank} could not join group {rendezvous.epoch}: {error}"
        ) from error
    return Group(member, rank=rank, size=size, device=torch.device("cpu"))
