"""What is kept for the successor of an inverse worker, and what it can catch up with."""

from __future__ import annotations

import pytest

from kfac_dist.coordination.steps.kept_statistics import (
    CatchUp,
    KeptMessage,
    KeptStatistics,
    plan_catch_up,
)


def message(step: int, rank: int = 0, content: str = "", num_bytes: int = 10) -> KeptMessage[str]:
    return KeptMessage(
        step=step, inverse_worker=rank, layers=("a",), num_bytes=num_bytes, content=content
    )


def kept_steps(kept: KeptStatistics[str], rank: int, step: int = 0) -> list[int]:
    return [message.step for message in kept.newer_than(rank, step)]


def test_what_is_in_a_copy_is_forgotten_for_that_worker_alone() -> None:
    kept: KeptStatistics[str] = KeptStatistics(1000)
    for step in (3, 1, 2):
        kept.add(message(step))
    kept.add(message(1, rank=1))
    kept.forget(0, 1)
    assert (kept_steps(kept, 0), kept_steps(kept, 1)) == ([2, 3], [1])
    assert kept_steps(kept, 0, step=2) == [3]


def test_a_repeated_step_replaces_its_messages() -> None:
    kept: KeptStatistics[str] = KeptStatistics(1000)
    kept.add(message(1, content="first"))
    kept.add(message(1, content="again"))
    assert [m.content for m in kept.newer_than(0, 0)] == ["again"]


def test_the_oldest_steps_go_when_there_is_no_room_but_never_the_newest() -> None:
    kept: KeptStatistics[str] = KeptStatistics(25)
    for step in range(1, 5):
        kept.add(message(step))
    assert (kept_steps(kept, 0), kept.num_bytes) == ([3, 4], 20)
    kept.add(message(5, num_bytes=100))
    assert kept_steps(kept, 0) == [5]


@pytest.mark.parametrize(
    ("sent", "done", "plan"),
    [
        ([{3: "ab", 5: "ab"}, {4: "ab"}], 5, CatchUp(steps=(3, 4, 5), lost=())),
        ([{3: "a", 4: "ab", 5: "a"}, {3: "b", 5: "b"}], 5, CatchUp(steps=(3, 4, 5), lost=())),
        # The worker that had step 4 and half of 3 is gone.
        ([{3: "a", 5: "ab"}], 5, CatchUp(steps=(5,), lost=(3, 4))),
        # Step 5 is in hand: what is missing of it is still to come.
        ([{3: "ab", 4: "ab", 5: "a"}], 4, CatchUp(steps=(3, 4, 5), lost=())),
        ([], 5, CatchUp(steps=(), lost=(3, 4, 5))),
    ],
)
def test_steps_that_are_not_whole_are_lost(
    sent: list[dict[int, str]], done: int, plan: CatchUp
) -> None:
    assert plan_catch_up([3, 4, 5], "ab", sent, done) == plan
