"""A group over real gloo connections: order, sums, and the errors when a member is gone."""

from __future__ import annotations

import time

import pytest
import torch

from tests.waiting import wait_until
from tests.workers.whole_jobs.local_job import in_threads, make_group
from workers.exchange.process_group import Group, Kind, PeerLostError
from workers.heartbeat import Heartbeat


def test_messages_of_a_kind_stay_in_order_and_kinds_do_not_wait_for_each_other():
    worker, shard = make_group(1)

    def send() -> None:
        for number in range(3):
            worker.send(Kind.GRADIENT, torch.full((4,), float(number)), shard.rank)
        worker.send_numbers(Kind.SUMS, [1 / 3, -1e-300], [shard.rank])
        worker.finish_sending()

    def receive() -> tuple:
        numbers = shard.receive_numbers(Kind.SUMS, 2, 0)  # it was sent last
        return numbers, [shard.receive(Kind.GRADIENT, torch.empty(4), 0) for _ in range(3)]

    _, (numbers, tensors) = in_threads([send, receive])
    assert numbers == [1 / 3, -1e-300]
    assert [tensor.tolist() for tensor in tensors] == [[float(n)] * 4 for n in range(3)]


def test_a_sum_is_added_in_the_order_of_the_ranks():
    parts = [1e16, 1.0, -1e16, 1.0]  # any other order gives another sum
    *workers, shard = make_group(len(parts))
    calls = [
        lambda w=w, part=part: w.send_numbers(Kind.SUMS, [part], [shard.rank])
        for w, part in zip(workers, parts, strict=True)
    ]
    calls.reverse()
    *_, total = in_threads([*calls, lambda: shard.sum_numbers(Kind.SUMS, 1)])
    assert total == [1.0]


@pytest.mark.parametrize(("num_workers", "num_shards"), [(1, 1), (3, 2), (2, 4)])
def test_ranks_are_the_workers_and_then_the_shards(num_workers, num_shards):
    for rank, group in enumerate(make_group(num_workers, num_shards)):
        assert (group.rank, group.size) == (rank, num_workers + num_shards)
        assert list(group.workers) == list(range(num_workers))
        assert list(group.shards) == list(range(num_workers, num_workers + num_shards))
        assert group.decider == num_workers


def take_part_in_sum(group: Group) -> None:
    if group.rank == group.decider:
        group.receive_sum(Kind.GRADIENT, group.new_parts(torch.zeros(3)))
    else:
        group.send(Kind.GRADIENT, torch.zeros(3), group.decider)
        group.receive(Kind.DIRECTIONS, torch.zeros(3), group.decider)


def test_the_others_see_at_once_that_a_member_has_left():
    groups = make_group(2, timeout_seconds=60.0)
    groups[0].leave()
    started = time.monotonic()

    def others(group: Group) -> None:
        # A worker notices it in the first of its calls that needs the shard.
        with pytest.raises(PeerLostError, match=rf"(recv|send) in rank {group.rank}"):
            take_part_in_sum(group)
        group.leave()

    in_threads([lambda group=group: others(group) for group in groups[1:]])
    assert time.monotonic() - started < 10
    with pytest.raises(PeerLostError, match="has been left"):
        groups[0].send(Kind.GRADIENT, torch.zeros(3), 2)


def test_who_leaves_after_an_error_is_missed_at_once_while_the_error_is_kept():
    """The error of a receive that waited for several members, one of which is gone."""
    first, second, shard = make_group(2, timeout_seconds=60.0)
    heartbeat, started = Heartbeat(), time.monotonic()

    def fail() -> PeerLostError:
        with pytest.raises(PeerLostError) as caught, heartbeat.doing("step", 1):
            shard.receive_sum(Kind.GRADIENT, shard.new_parts(torch.zeros(3)))
        shard.leave()
        return caught.value

    def wait_for_the_shard() -> PeerLostError:
        with pytest.raises(PeerLostError) as caught:
            second.receive(Kind.DIRECTIONS, torch.zeros(3), shard.rank)
        return caught.value

    def leave() -> None:
        wait_until(lambda: heartbeat.pulse().waits, "the shard to wait for the workers")
        first.leave()

    *errors, _ = in_threads([fail, wait_for_the_shard, leave])
    assert time.monotonic() - started < 20
    assert "recv in rank 2" in str(errors[0])
    assert "recv in rank 1" in str(errors[1])


def test_a_silent_member_is_an_error_at_the_timeout():
    _worker, shard = make_group(1, timeout_seconds=1.0)
    with pytest.raises(PeerLostError):
        shard.receive_sum(Kind.GRADIENT, shard.new_parts(torch.zeros(3)))


def test_members_of_different_epochs_never_meet():
    first, second = make_group(1, epoch=1), make_group(1, epoch=2)
    for number, (worker, shard) in enumerate((first, second)):
        worker.send_numbers(Kind.SUMS, [float(number)], [shard.rank])
    assert second[1].receive_numbers(Kind.SUMS, 1, 0) == [1.0]
    assert first[1].receive_numbers(Kind.SUMS, 1, 0) == [0.0]
