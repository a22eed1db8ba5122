"""Where members and shards go in the next group."""

from __future__ import annotations

from typing import Any

import pytest

from workers.driver.crew.processes import GroupProcess, member_at, place_members
from workers.exchange.messages import MemberPlace

NO_ACTOR: Any = None


def process(number: int, worker: int | None, shard: int | None) -> GroupProcess:
    place = MemberPlace(worker=worker, shard=shard, num_shards=2)
    member = member_at(place)
    return GroupProcess(number=number, place=place, handle=NO_ACTOR, member=member, log=member)


def shards(members: list[GroupProcess], alone: list[GroupProcess], *, shared: bool) -> Any:
    """Return the shard of each process by its number, with two shards wished for."""
    places = place_members(members, alone, 2, shared=shared)
    assert [places[p.number].worker for p in members] == list(range(len(members)))
    return {number: place.shard for number, place in places.items()}


def test_shards_of_gradient_workers_are_those_of_the_first() -> None:
    members = [process(4, 3, None), process(1, 1, 1), process(2, 2, None)]
    assert shards(members, [], shared=True) == {4: 0, 1: 1, 2: None}


def test_a_shard_stays_and_one_that_is_lost_moves_into_a_gradient_worker() -> None:
    members = [process(2, 0, None), process(3, 1, None)]
    assert shards(members, [process(1, None, 1)], shared=False) == {1: 1, 2: 0, 3: None}


def test_a_shard_that_has_moved_stays_there() -> None:
    members = [process(2, 0, None), process(3, 1, 0)]
    assert shards(members, [process(1, None, 1)], shared=False) == {1: 1, 2: None, 3: 0}


def test_there_are_never_more_shards_than_processes() -> None:
    assert shards([process(3, 0, 1)], [], shared=False) == {3: 0}


@pytest.mark.parametrize(
    ("worker", "shard", "name"),
    [(1, 0, "gradient worker 1"), (None, 1, "parameter server 1")],
)
def test_a_process_is_known_as_a_gradient_worker_if_it_is_one(
    worker: int | None, shard: int, name: str
) -> None:
    assert str(process(0, worker, shard).member) == name
