"""The counted traffic is what the kernel sends, and no more than the algorithm needs."""

from __future__ import annotations

import os
import socket
import stat
import struct
from contextlib import closing
from pathlib import Path

import pytest
import torch

from kfac_dist.core.packing import packed_size
from tests.waiting import wait_until
from tests.workers.whole_jobs.local_job import LocalJob, in_threads, make_group, small_spec
from workers.exchange.process_group import Kind

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
    *workers, shard = make_group(num_workers)
    vector = torch.ones(250_000)

    def work(rank: int) -> torch.Tensor:
        workers[rank].send(Kind.GRADIENT, vector, shard.rank)
        directions = torch.empty(3, len(vector))
        return workers[rank].receive(Kind.DIRECTIONS, directions, shard.rank)

    def serve() -> None:
        total = shard.receive_sum(Kind.GRADIENT, shard.new_parts(vector))
        for rank in shard.workers:
            shard.send(Kind.DIRECTIONS, total.expand(3, -1), rank)
        shard.finish_sending()

    before = acknowledged_bytes()
    *received, _ = in_threads([*(lambda r=r: work(r) for r in range(num_workers)), serve])
    for directions in received:
        assert torch.equal(directions, num_workers * torch.ones(3, len(vector)))
    traffics = [group.take_traffic() for group in (*workers, shard)]
    counted = sum(traffic.sent_bytes for traffic in traffics)
    assert counted == num_workers * 4 * vector.nbytes
    wait_until(lambda: acknowledged_since(before) >= counted, "the kernel to count all bytes")
    assert acknowledged_since(before) <= 1.01 * counted
    for traffic in traffics[:-1]:
        assert (traffic.sent_bytes, traffic.received_bytes) == (vector.nbytes, 3 * vector.nbytes)
        assert traffic.num_messages == 2
    assert traffics[-1].sent_bytes == num_workers * 3 * vector.nbytes
    assert traffics[-1].received_bytes == num_workers * vector.nbytes
    assert shard.take_traffic().num_messages == 0


@pytest.mark.parametrize("num_workers", [1, 2])
def test_each_worker_exchanges_two_vectors_a_step_and_four_where_gamma_is_searched(
    num_workers: int, tmp_path: Path
) -> None:
    """Two workers also exchange statistics: one sends what the other adds up."""
    # Blocks of one layer would share a factor, which is sent once.
    optimizer = {"max_factor_dim": None}
    spec = small_spec(workers={"gradient": num_workers}, optimizer=optimizer)
    with closing(LocalJob(spec, tmp_path)) as job:
        assert job.registration is not None
        (layout,) = job.plan.layouts
        vector_bytes = 8 * layout.size
        orders = [order for block in job.registration.blocks for order in block.orders]
        factor_bytes = 8 * sum(packed_size(order) for order in orders)
        statistics_bytes = (factor_bytes + 16) * (num_workers - 1)  # 16: whether they are usable
        for _ in range(7):
            job.steps(1)
            plan = job.schedule.plan(job.step_count)
            assert plan.update_factors
            vectors = 4 if plan.search_gamma else 2
            for report in job.worker_reports:
                traffic = report.traffic
                total = traffic.sent_bytes + traffic.received_bytes
                assert 0 < total - vectors * vector_bytes - statistics_bytes < 600, plan
                # Sent: gradient, its numbers, usable, Fisher products, and the loss where it is
                # due. Received: header, directions, choice.
                statistics = 2 * (num_workers - 1)
                assert traffic.num_messages == 7 + plan.measure + statistics
