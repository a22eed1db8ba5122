"""Deliveries are made in order, beside the caller; their errors are not lost."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path

import pytest
import torch

from tests.gpu.streams_of_the_cpu import stand_in
from tests.waiting import wait_until
from tests.workers.whole_jobs.local_job import LocalJob, chain_spec
from workers.exchange.host_copies import HostBuffers, HostCopies
from workers.gradient_worker.courier import Courier


def test_deliveries_keep_their_order_and_do_not_hold_up_the_caller():
    courier, may_deliver, delivered = Courier(), threading.Event(), []
    courier.deliver(lambda: delivered.append(may_deliver.wait(30)))
    for number in (2, 3):
        courier.deliver(lambda number=number: delivered.append(number))
    assert delivered == []
    may_deliver.set()
    courier.finish()
    assert delivered == [True, 2, 3]


def test_what_a_delivery_raised_is_raised_at_the_next_one():
    def fail() -> None:
        raise ValueError("the post office is closed")

    courier, delivered = Courier(), []
    courier.deliver(fail)
    wait_until(lambda: courier._open[0].done(), "the failure")
    with pytest.raises(ValueError, match="closed"):
        courier.deliver(lambda: delivered.append(1))
    assert delivered == []
    courier.deliver(fail)
    with pytest.raises(ValueError, match="closed"):
        courier.finish()


def trained(folder: Path, *, as_on_a_gpu: bool) -> str:
    """The checksum of a job whose statistics may leave as they do from a GPU."""
    job = LocalJob(chain_spec(folder, workers={"gradient": 2, "inverse": 2}), folder)
    senders = [worker._sender for worker in job.workers]
    try:
        if as_on_a_gpu:
            for sender in senders:
                sender._copies, sender._courier = HostCopies(torch.device("cuda", 0)), Courier()
                # Ray has read the arrays when a call returns.
                send = sender._send
                sender._send = lambda worker, message, send=send: send(
                    worker, pickle.loads(pickle.dumps(message))
                )
        job.steps(6)
        for sender in senders:
            if as_on_a_gpu:
                sender._courier.finish()
        return job.server.checksum()
    finally:
        job.close()


def test_a_job_whose_statistics_leave_by_pinned_buffers_is_the_same_to_the_last_bit(
    tmp_path, monkeypatch
):
    expected = trained(tmp_path, as_on_a_gpu=False)
    made = stand_in(monkeypatch)
    give_back = HostBuffers.give_back

    def poison(buffers, number):
        buffers._memory[number].fill_(255)  # NaN, as floats
        give_back(buffers, number)

    monkeypatch.setattr(HostBuffers, "give_back", poison)
    assert trained(tmp_path, as_on_a_gpu=True) == expected
    assert len(made) == 4  # two for each gradient worker
