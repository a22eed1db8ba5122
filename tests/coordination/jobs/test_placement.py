from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.coordination.jobs.placement import (
    Room,
    check_admitted,
    check_placement,
    machine_room,
    room_needed,
)
from kfac_dist.errors import InvalidSpecError, JobFailedError


@dataclass(frozen=True, kw_only=True)
class Workers:
    gradient: int = 1
    inverse: int = 1
    threads: int | None = None
    device: str = "auto"
    inverse_device: str = "auto"


@given(st.integers(1, 9), st.integers(1, 9), st.none() | st.integers(1, 4), st.integers(1, 12))
def test_accepted_exactly_when_there_is_room(
    gradient: int, inverse: int, threads: int | None, num_cpus: int
) -> None:
    workers = Workers(gradient=gradient, inverse=inverse, threads=threads)
    fits = gradient * (threads or 1) <= num_cpus and inverse <= num_cpus
    try:
        check_placement(workers, machine_room(num_cpus))
    except InvalidSpecError:
        assert not fits
    else:
        assert fits


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        (
            Workers(gradient=64),
            "workers.gradient: needs 64 CPUs (64 gradient workers x 1 thread), "
            "this machine has 2; set it to at most 2",
        ),
        (
            Workers(gradient=1, threads=4),
            "workers.gradient: needs 4 CPUs (1 gradient worker x 4 threads), "
            "this machine has 2; set workers.threads to at most 2",
        ),
        (
            Workers(inverse=5),
            "workers.inverse: needs room for 5 inverse workers, "
            "this machine has room for 2 (1 for each CPU)",
        ),
    ],
)
def test_the_message_says_what_is_missing(workers: Workers, message: str) -> None:
    with pytest.raises(InvalidSpecError) as caught:
        check_placement(workers, machine_room(2))
    assert caught.value.message == message


def test_what_a_job_reserves() -> None:
    workers = Workers(gradient=3, inverse=2, threads=4, device="cuda")
    assert room_needed(workers) == Room(num_cpus=12, num_gpus=1, num_inverse_slots=2)
    alone = Workers(inverse_device="cuda")
    assert room_needed(alone) == Room(num_cpus=1, num_gpus=1, num_inverse_slots=1)
    assert room_needed(Workers()) == Room(num_cpus=1, num_gpus=0, num_inverse_slots=1)


def test_a_cluster_may_have_fewer_inverse_slots_than_cpus() -> None:
    room = Room(num_cpus=4, num_gpus=0, num_inverse_slots=1)
    with pytest.raises(InvalidSpecError, match="has room for 1 "):
        check_placement(Workers(inverse=2), room)


def test_the_message_names_the_cluster_where_it_is_one() -> None:
    room = Room(num_cpus=2, num_gpus=0, num_inverse_slots=1)
    with pytest.raises(InvalidSpecError, match="the cluster has 2; set it to at most 2"):
        check_placement(Workers(gradient=3), room, where="the cluster")
    with pytest.raises(InvalidSpecError, match=r"the cluster has room for 1$"):
        check_placement(Workers(inverse=2), room, where="the cluster")


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        (Workers(gradient=3), "needs 3 CPUs, the cluster has 2"),
        (Workers(device="cuda"), "needs 1 GPU, the cluster has 0"),
        (Workers(inverse_device="cuda"), "needs 1 GPU, the cluster has 0"),
        (Workers(inverse=2), "needs 2 inverse workers, the cluster has 1"),
    ],
)
def test_a_cluster_that_shrank_is_not_the_fault_of_the_job(workers: Workers, message: str) -> None:
    room = Room(num_cpus=2, num_gpus=0, num_inverse_slots=1)
    with pytest.raises(JobFailedError) as caught:
        check_admitted(workers, room)
    assert caught.value.reason == "no_room"
    assert caught.value.message == f"{message}; it had more when the job was admitted"
    check_admitted(Workers(gradient=2), room)
