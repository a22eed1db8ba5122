"""Kills a member of a process group: the others must notice within the timeout of the group.

The members are processes of this module. Each one exchanges as in a step, over and over.
"""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import ExitStack

import torch

from tests.gpu.checks import Table
from tests.paths import ROOT
from workers.device import Backend
from workers.exchange.messages import Rendezvous
from workers.exchange.process_group import (
    Kind,
    PeerLostError,
    host_store,
    join_group,
    join_store,
)

HOST = "127.0.0.1"
NUM_ROUNDS = 5
NOTICED = 3  # the exit code of a member that got an error; NCCL's watchdog may end it first


def killed_member(
    backend: Backend, num_workers: int, timeout_seconds: float, slack_seconds: float = 15.0
) -> Table:
    """Check that the server and the other workers end when gradient worker 0 is killed.

    `slack_seconds` is for the ending of processes.
    """
    with ExitStack() as stack:
        members = _start(stack, backend, num_workers, timeout_seconds)
        for member in members:
            assert _line(member) == "exchanging", f"a member has ended: {member.poll()}"
        killed, *others = members
        killed.kill()
        started = time.monotonic()
        codes = [member.wait(timeout_seconds + slack_seconds) for member in others]
        seconds = time.monotonic() - started
    assert 0 not in codes, "a member has not noticed"
    row = (backend, str(len(others)), f"{seconds:.1f}", f"{timeout_seconds:g}")
    return Table("A killed member", ("backend", "others", "s until they end", "limit, s"), [row])


def _start(
    stack: ExitStack, backend: Backend, num_workers: int, timeout_seconds: float
) -> list[subprocess.Popen[str]]:
    """Start the members; gradient worker 0 is the first, the server the last."""

    def start(rank: int, port: int) -> subprocess.Popen[str]:
        arguments = [backend, str(num_workers), str(rank), str(port), str(timeout_seconds)]
        member = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", __name__, *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                cwd=ROOT,
            )
        )
        stack.callback(member.kill)
        return member

    server = start(num_workers, 0)
    port = int(_line(server))
    return [*(start(rank, port) for rank in range(num_workers)), server]


def _line(member: subprocess.Popen[str]) -> str:
    assert member.stdout is not None
    return member.stdout.readline().strip()


def _exchange(backend: Backend, num_workers: int, rank: int, port: int, timeout: float) -> None:
    """Be a member of the group, and exchange until a peer is lost."""
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    is_server = rank == num_workers
    store = host_store(HOST, timeout) if is_server else None
    meet = Rendezvous(
        host=HOST,
        port=store.port if store else port,
        epoch=1,
        num_gradient_workers=num_workers,
        num_shards=1,
        step=0,
        timeout_seconds=timeout,
    )
    if store:
        print(store.port, flush=True)
    group = join_group(
        meet, store or join_store(meet), rank=rank, own_host=HOST, backend=backend, device=device
    )
    values, number = torch.ones(1000, device=device), 0
    while True:
        if is_server:
            total = group.receive_sum(Kind.GRADIENT, group.new_parts(values))
            for worker in group.workers:
                group.send(Kind.DIRECTIONS, total, worker)
        else:
            group.send(Kind.GRADIENT, values, group.decider)
            total = group.receive(Kind.DIRECTIONS, torch.empty_like(values), group.decider)
        # NCCL returns before the values are there. Reading them waits for them.
        assert total.sum().item() == 1000 * num_workers
        group.finish_sending()
        number += 1
        if number == NUM_ROUNDS:
            print("exchanging", flush=True)


if __name__ == "__main__":
    given = sys.argv[1:]
    assert given[0] in ("gloo", "nccl")
    try:
        _exchange(given[0], int(given[1]), int(given[2]), int(given[3]), float(given[4]))
    except PeerLostError:
        sys.exit(NOTICED)
