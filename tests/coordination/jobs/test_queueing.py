from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.coordination.jobs.placement import NO_ROOM, Room
from kfac_dist.coordination.jobs.queueing import Waiting, admit_jobs

CLUSTER = Room(num_cpus=4, num_gpus=0, num_inverse_slots=2)
ROOMS = st.builds(
    Room,
    num_cpus=st.integers(0, 6),
    num_gpus=st.integers(0, 1),
    num_inverse_slots=st.integers(0, 3),
)


def waiting(number: int, *, priority: int = 0, cpus: int = 1, inverse: int = 0) -> Waiting:
    needs = Room(num_cpus=cpus, num_gpus=0, num_inverse_slots=inverse)
    return Waiting(job=f"j{number}", number=number, priority=priority, needs=needs)


def started(*queue: Waiting, used: Room = NO_ROOM) -> list[str]:
    return [verdict.job for verdict in admit_jobs(queue, CLUSTER, used) if verdict.reason is None]


def test_priority_first_then_age() -> None:
    queue = [waiting(1, cpus=2), waiting(2, cpus=2, priority=5), waiting(3, cpus=2, priority=5)]
    assert started(*queue) == ["j2", "j3"]


def test_a_job_that_does_not_fit_now_blocks_those_behind_it() -> None:
    used = Room(num_cpus=2, num_gpus=0, num_inverse_slots=0)
    first, second = admit_jobs([waiting(1, cpus=3), waiting(2)], CLUSTER, used)
    assert first.reason == "waiting_for_room"
    assert first.message == "needs 3 CPUs, 2 of the cluster's 4 are in use"
    assert (second.reason, second.job) == ("waiting_for_turn", "j2")
    assert second.message == "jobs before it in the queue wait for room"


def test_a_job_that_never_fits_says_what_is_missing_and_blocks_nobody() -> None:
    first, second = admit_jobs([waiting(1, cpus=5, inverse=5), waiting(2)], CLUSTER, NO_ROOM)
    assert first.reason == "insufficient_resources"
    assert first.message == (
        "needs 5 CPUs, the cluster has 4; needs 5 inverse workers, the cluster has 2; each inverse "
        "worker takes 1 of Ray's resource `inverse`, which a node has if it is started with ray "
        "start --resources='{\"inverse\": N}'"
    )
    (verdict,) = admit_jobs([waiting(1, cpus=5)], CLUSTER, NO_ROOM)
    assert verdict.message == "needs 5 CPUs, the cluster has 4"
    assert second.reason is None


@given(st.lists(st.tuples(ROOMS, st.integers(-2, 2)), max_size=12), ROOMS)
def test_admitted_jobs_fit_and_none_behind_a_blocked_job_is_admitted(
    jobs: list[tuple[Room, int]], used: Room
) -> None:
    queue = [
        Waiting(job=str(number), number=number, priority=priority, needs=needs)
        for number, (needs, priority) in enumerate(jobs)
    ]
    verdicts = admit_jobs(queue, CLUSTER, used)
    assert sorted(verdict.job for verdict in verdicts) == sorted(job.job for job in queue)
    needs = {job.job: job.needs for job in queue}
    admitted = [needs[verdict.job] for verdict in verdicts if verdict.reason is None]
    if admitted:
        assert not sum(admitted, used).exceeding(CLUSTER)
    reasons = [verdict.reason for verdict in verdicts]
    if "waiting_for_room" in reasons:
        after = reasons[reasons.index("waiting_for_room") + 1 :]
        assert None not in after
