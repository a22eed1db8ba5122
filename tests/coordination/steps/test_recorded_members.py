"""Where the number of gradient workers of a recorded run changes, and what no replay can repeat."""

from __future__ import annotations

import pytest

from kfac_dist.coordination.steps.recorded_members import (
    RecordedChange,
    changed_numbers,
    obstacles,
)


def change(after_step: int, workers_before: int, **facts: bool) -> RecordedChange:
    nothing = {"repeats_step": False, "undoes_step": False, "loses_buffers": False}
    return RecordedChange(after_step=after_step, workers_before=workers_before, **(nothing | facts))


@pytest.mark.parametrize(
    ("workers", "changed"),
    [
        ([], {}),
        ([2], {}),
        ([2, 2, 3, 3, 1], {3: 3, 5: 1}),
        ([None, None], {}),
        ([None, 2, 2], {2: 2}),  # written by an earlier version, then by this one
    ],
)
def test_a_number_is_listed_at_the_step_where_it_changes(
    workers: list[int | None], changed: dict[int, int]
) -> None:
    assert changed_numbers(workers) == changed


def test_only_what_is_not_recorded_is_an_obstacle() -> None:
    workers = {1: 2, 2: 2, 3: 1, 4: 2, 5: 2}
    assert list(obstacles([change(3, 1), change(4, 2, repeats_step=True)], workers)) == []
    repeated, undone, lost = (
        obstacle
        for obstacle in obstacles(
            [
                change(2, 2, repeats_step=True),
                change(3, 1, repeats_step=True, undoes_step=True),
                change(4, 2, loses_buffers=True),
            ],
            workers,
        )
    )
    assert repeated[0] == 3
    assert "with 1 instead of 2 gradient workers" in repeated[1]
    assert undone[0] == 4
    assert "undone only to rounding" in undone[1]
    assert lost[0] == 5
    assert "buffers of its model" in lost[1]
