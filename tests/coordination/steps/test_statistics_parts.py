from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.coordination.steps.statistics_parts import layer_groups
from kfac_dist.errors import InvalidSpecError


@st.composite
def models(draw: st.DrawFn) -> tuple[dict[int, tuple[str, ...]], dict[str, int]]:
    """An assignment, in which a worker may have no layers, and the sizes of the statistics."""
    owners = draw(st.lists(st.integers(0, 3), min_size=1, max_size=12))
    assignment: dict[int, tuple[str, ...]] = dict.fromkeys(range(4), ())
    for number, rank in enumerate(owners):
        assignment[rank] = (*assignment[rank], f"layer{number}")
    sizes = {f"layer{number}": draw(st.integers(0, 1000)) for number in range(len(owners))}
    return assignment, sizes


@given(models(), st.integers(1, 9))
def test_every_layer_is_in_exactly_one_group_of_its_owner(
    model: tuple[dict[int, tuple[str, ...]], dict[str, int]], num_workers: int
) -> None:
    assignment, sizes = model
    groups = layer_groups(assignment, sizes, num_workers)
    for rank, layers in assignment.items():
        own = [name for group in groups if group.inverse_worker == rank for name in group.layers]
        assert own == list(layers), "neighbours stay neighbours"
    assert [group.number for group in groups] == list(range(len(groups)))
    assert all(group.layers for group in groups)


@given(st.integers(1, 4), st.integers(1, 9))
def test_there_is_a_group_for_each_worker_where_there_are_enough_layers(
    num_owners: int, num_workers: int
) -> None:
    assignment = {
        rank: tuple(f"layer{rank}-{n}" for n in range(num_workers)) for rank in range(num_owners)
    }
    sizes = {name: 10 for layers in assignment.values() for name in layers}
    groups = layer_groups(assignment, sizes, num_workers)
    assert num_workers <= len(groups) < num_workers + num_owners
    # Each has as much to add up as any other, but for one layer.
    lengths = {len(group.layers) for group in groups}
    assert max(lengths) - min(lengths) <= 1


@given(st.integers(1, 9))
def test_the_workers_share_the_sums(num_workers: int) -> None:
    assignment = {0: tuple(f"layer{n}" for n in range(2 * num_workers))}
    groups = layer_groups(assignment, dict.fromkeys(assignment[0], 5), num_workers)
    assert sorted(g.summed_by(num_workers) for g in groups) == list(range(num_workers))


@given(models(), st.integers(1, 9))
def test_no_worker_adds_up_many_more_groups_than_another(
    model: tuple[dict[int, tuple[str, ...]], dict[str, int]], num_workers: int
) -> None:
    groups = layer_groups(*model, num_workers)
    counts = Counter(group.summed_by(num_workers) for group in groups)
    assert max(counts.values()) <= min(counts[rank] for rank in range(num_workers)) + 1


def test_a_run_is_cut_where_its_bytes_are_and_not_its_layers() -> None:
    sizes = {"big": 90, "b": 10, "c": 10, "d": 10, "e": 60}
    groups = layer_groups({3: tuple(sizes)}, sizes, 2)
    assert [group.layers for group in groups] == [("big",), ("b", "c", "d", "e")]
    assert {group.inverse_worker for group in groups} == {3}


def test_no_worker_at_all_is_refused() -> None:
    with pytest.raises(InvalidSpecError, match="num_workers must be at least 1; got 0"):
        layer_groups({0: ("a",)}, {"a": 1}, 0)
