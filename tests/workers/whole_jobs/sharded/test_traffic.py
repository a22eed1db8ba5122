"""The counted traffic is what the kernel sends, and no more than the algorithm needs."""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.waiting import wait_until
from tests.workers.whole_jobs.local_job import LocalJob, in_threads, make_group, small_spec

_BYTES_ACKED = 120  # offset in the kernel's struct tcp_info


def acknowledged_bytes() -> dict[int, int]:
    """Return how many bytes each socket of this process has sent, by inode.

    The kernel counts them.
    """
    sent = {}
    for entry in list(Path("/proc/self/fd").iterdir()):
        number = int(entry.name)
        try:
            status = os.fstat(number)
            if not stat.S_ISSOCK(status.st_mode):
                continue
            copy = os.dup(number)
        except OSError:  # it was closed meanwhile
            continue
        # A copy that stayed open would keep the other end from noticing that ours was closed.
        with socket.socket(fileno=copy) as duplicate:
            try:
                info = duplicate.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
            except OSError:  # not a TCP socket
                continue
        (sent[status.st_ino],) = struct.unpack_from("Q", info, _BYTES_ACKED)
    return sent


def acknowledged_since(before: dict[int, int]) -> int:
    """Return how many bytes the sockets that are open now have sent since `before`."""
    return sum(count - before.get(inode, 0) for inode, count in acknowledged_bytes().items())


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_the_bytes_counted_are_those_that_the_kernel_sends(num_workers):
    *workers, server = make_group(num_workers)
    vector = torch.ones(250_000)

    def work(rank: int) -> None:
        workers[rank].send(vector)
        workers[rank].broadcast(torch.empty(3, len(vector)))

    def serve() -> torch.Tensor:
        total = server.receive_sum(vector)
        return server.broadcast(total.expand(3, -1).contiguous())

    before = acknowledged_bytes()
    *_, directions = in_threads([*(lambda r=r: work(r) for r in range(num_workers)), serve])
    assert torch.equal(directions, num_workers * torch.ones(3, len(vector)))
    traffics = [group.take_traffic() for group in (*workers, server)]
    counted = sum(traffic.sent_bytes for traffic in traffics)
    assert counted == num_workers * 4 * vector.nbytes
    wait_until(lambda: acknowledged_since(before) >= counted, "the kernel to count all bytes")
    assert acknowledged_since(before) <= 1.01 * counted
    for traffic in traffics[:-1]:
        assert (traffic.sent_bytes, traffic.received_bytes) == (vector.nbytes, 3 * vector.nbytes)
        assert traffic.num_messages == 2
    assert traffics[-1].received_bytes == num_workers * vector.nbytes
    assert server.take_traffic().num_messages == 0


@pytest.fixture
def job(tmp_path) -> Iterator[LocalJob]:
    job = LocalJob(small_spec(workers={"gradient": 2}), tmp_path)
    yield job
    job.close()


def test_each_worker_exchanges_two_vectors_a_step_and_four_where_gamma_is_searched(job):
    vector_bytes = job.parameters.nbytes
    for _ in range(7):
        job.steps(1)
        plan = job.schedule.plan(job.step_count)
        vectors = 4 if plan.search_gamma else 2
        for report in job.worker_reports:
            traffic = report.traffic
            small = traffic.sent_bytes + traffic.received_bytes - vectors * vector_bytes
            assert 0 < small < 400, plan
            assert traffic.sent_bytes - vector_bytes < 200
            # Sent: gradient, its numbers, usable, Fisher products, and the loss where it is due.
            # Received: header, directions, choice.
            assert traffic.num_messages == 7 + plan.measure
