import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.coordination.steps.sampling import (
    BatchWindow,
    SamplerCursor,
    SubsetRule,
    next_window,
    subset_positions,
    worker_part,
)
from kfac_dist.errors import InvalidSpecError

START = SamplerCursor(epoch=0, offset=0)


@st.composite
def epochs(draw: st.DrawFn) -> tuple[int, list[int]]:
    """A number of cases, and batch sizes that do not exceed it."""
    num_cases = draw(st.integers(1, 200))
    sizes = draw(st.lists(st.integers(1, num_cases), min_size=1, max_size=60))
    return num_cases, sizes


def windows(num_cases: int, sizes: list[int]) -> list[BatchWindow]:
    cursor, found = START, []
    for size in sizes:
        window, cursor = next_window(cursor, size, num_cases)
        found.append(window)
    return found


@given(epochs())
def test_no_case_comes_twice_in_an_epoch_and_only_a_tail_is_skipped(
    drawn: tuple[int, list[int]],
) -> None:
    num_cases, sizes = drawn
    found = windows(num_cases, sizes)
    assert [window.size for window in found] == sizes
    assert found[0].start == 0
    assert all(window.stop <= num_cases for window in found)
    for before, after in pairwise(found):
        if after.epoch == before.epoch:
            assert after.start == before.stop
        else:
            assert (after.epoch, after.start) == (before.epoch + 1, 0)
            assert before.stop + after.size > num_cases


@given(st.integers(1, 20), st.integers(1, 20))
def test_equal_batches_that_divide_the_data_cover_every_epoch(size: int, num_batches: int) -> None:
    num_cases = size * num_batches
    found = windows(num_cases, [size] * (2 * num_batches))
    for epoch in (0, 1):
        taken = [i for w in found if w.epoch == epoch for i in range(w.start, w.stop)]
        assert taken == list(range(num_cases))


@given(epochs(), st.data())
def test_a_cursor_from_a_checkpoint_continues_with_the_same_windows(
    drawn: tuple[int, list[int]], data: st.DataObject
) -> None:
    num_cases, sizes = drawn
    stop = data.draw(st.integers(0, len(sizes)))
    cursor = START
    for size in sizes[:stop]:
        _, cursor = next_window(cursor, size, num_cases)
    restored = SamplerCursor(epoch=cursor.epoch, offset=cursor.offset)
    rest = []
    for size in sizes[stop:]:
        window, restored = next_window(restored, size, num_cases)
        rest.append(window)
    assert rest == windows(num_cases, sizes)[stop:]


@pytest.mark.parametrize("batch_size", [0, -1, 101])
def test_a_batch_that_does_not_fit_names_the_interval(batch_size: int) -> None:
    with pytest.raises(InvalidSpecError, match=f"between 1 and .* 100; got {batch_size}"):
        next_window(START, batch_size, 100)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epoch": -1, "offset": 0}, "epoch must be at least 0; got -1"),
        ({"epoch": 0, "offset": -5}, "offset must be at least 0; got -5"),
    ],
)
def test_a_cursor_is_checked_at_birth(fields: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidSpecError, match=message):
        SamplerCursor(**fields)


def test_an_empty_window_cannot_be_made() -> None:
    with pytest.raises(InvalidSpecError, match="stop must be at least 4; got 3"):
        BatchWindow(epoch=0, start=3, stop=3)


@given(st.integers(0, 500), st.integers(1, 40))
def test_parts_cover_the_batch_once_and_differ_by_at_most_one(size: int, num_workers: int) -> None:
    parts = [worker_part(size, num_workers, rank) for rank in range(num_workers)]
    assert [i for part in parts for i in part] == list(range(size))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("rank", [-1, 3])
def test_a_rank_outside_of_the_group_is_refused(rank: int) -> None:
    with pytest.raises(InvalidSpecError, match=f"rank must be between 0 and 2; got {rank}"):
        worker_part(10, 3, rank)


@given(st.integers(0, 500), st.floats(0.001, 1))
def test_a_subset_is_evenly_strided(size: int, fraction: float) -> None:
    positions = subset_positions(size, fraction)
    assert len(positions) == pytest.approx(fraction * size, abs=1)
    assert len(positions) >= fraction * size * (1 - 1e-12)
    assert all(0 <= position < size for position in positions)
    strides = {after - before for before, after in pairwise(positions)}
    assert not strides or max(strides) - min(strides) <= 1
    assert 0 not in strides


@pytest.mark.parametrize(
    ("size", "fraction", "count"),
    [(1000, 0.125, 125), (1000, 0.25, 250), (100, 0.07, 7), (30, 0.1, 3), (7, 1.0, 7), (3, 0.1, 1)],
)
def test_the_fraction_is_the_decimal_it_was_written_as(
    size: int, fraction: float, count: int
) -> None:
    assert len(subset_positions(size, fraction)) == count
    assert subset_positions(size, fraction) == [j * size // count for j in range(count)]


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, math.nan])
def test_a_fraction_outside_of_its_interval_is_refused(fraction: float) -> None:
    with pytest.raises(InvalidSpecError, match="above 0 and at most 1; got"):
        subset_positions(10, fraction)


@given(st.integers(1, 200), st.floats(0.001, 1), st.integers(1, 9), st.integers(1, 3))
def test_every_worker_has_enough_cases_of_a_subset_or_none(
    size: int, fraction: float, num_workers: int, least: int
) -> None:
    plain = subset_positions(size, fraction)
    rule = SubsetRule(least_cases=least, num_workers=num_workers)
    positions = rule.positions(size, fraction)
    assert positions == [j * size // len(positions) for j in range(len(positions))]
    assert len(positions) >= len(plain)
    if least == 1:
        assert positions == plain
        return
    for rank in range(num_workers):
        part = worker_part(size, num_workers, rank)
        own = sum(position in part for position in positions)
        assert own == 0 or own >= min(least, len(part))


@pytest.mark.parametrize(
    ("size", "num_workers", "count"), [(8, 1, 2), (8, 2, 4), (7, 2, 2), (1, 1, 1), (64, 2, 8)]
)
def test_a_subset_grows_no_more_than_two_cases_a_worker_need(
    size: int, num_workers: int, count: int
) -> None:
    rule = SubsetRule(least_cases=2, num_workers=num_workers)
    assert len(rule.positions(size, 0.125)) == count
