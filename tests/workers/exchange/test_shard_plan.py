"""How parameters are cut into shards, and snapshots with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kfac_dist.config import WorkersSpec, kfac_settings
from kfac_dist.core.blocks.registration import Registration, register
from workers.exchange.arrays import Array, to_array
from workers.exchange.shard_plan import (
    ShardPlan,
    merge_snapshots,
    plan_shards,
    split_snapshot,
)

COUNTS = (1, 2, 3, 4, 9)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.ones(5))
        self.head = nn.Linear(4, 6)
        self.head2 = nn.Linear(6, 3)
        self.out = nn.Linear(3, 2)


def registered(**options: Any) -> Registration:
    return register(Net(), kfac_settings(options))


def plan_of(num_shards: int, *, linked: bool = False) -> ShardPlan:
    registration = registered()
    links = registration.links if linked else ()
    return plan_shards(registration, links, registration.num_parameters, num_shards)


@pytest.mark.parametrize("num_shards", COUNTS)
def test_every_block_is_in_one_shard_and_rows_come_back_in_the_order_of_the_model(num_shards):
    plan, names = plan_of(num_shards), registered().names
    assert len(plan) == min(num_shards, len(names))
    assert sorted(place for own in plan.places for place in own) == list(range(len(names)))
    for layout, places in zip(plan.layouts, plan.places, strict=True):
        assert layout.names == tuple(names[place] for place in places)
    rows = [torch.tensor([[10.0 * place, 1.0] for place in own]) for own in plan.places]
    assert plan.in_model_order(rows)[:, 0].tolist() == [10.0 * n for n in range(len(names))]


@pytest.mark.parametrize("num_shards", COUNTS)
def test_a_vector_is_whole_again(num_shards):
    plan = plan_of(num_shards)
    vector = torch.randn(plan.num_parameters)
    assert torch.equal(plan.whole([layout.gather(vector) for layout in plan.layouts]), vector)


def test_linked_layers_stay_together_and_there_are_fewer_shards():
    plan = plan_of(9, linked=True)
    links = registered().links
    assert links, "the model has links"
    owner = {name: k for k, layout in enumerate(plan.layouts) for name in layout.names}
    assert all(owner[link.name] == owner[link.next_name] for link in links)
    assert len(plan) == len(registered().names) - len(links)


@pytest.mark.parametrize("size", [1, 65_536, 65_537, 300_000])
def test_a_vector_without_blocks_is_cut_into_pieces(size):
    plan = plan_shards(None, (), size, 4)
    assert len(plan) == min(4, -(-size // 65_536))
    vector = torch.arange(float(size))
    assert torch.equal(plan.whole([layout.gather(vector) for layout in plan.layouts]), vector)


@pytest.mark.parametrize(
    ("gradient", "given", "wanted", "shared"),
    [
        (1, "auto", 1, False),
        (2, "auto", 1, False),
        (3, "auto", 3, True),
        (8, "auto", 8, True),
        (8, 2, 2, False),
        (1, 4, 4, False),
    ],
)
def test_the_number_of_shards_that_a_job_gets(gradient, given, wanted, shared):
    workers = WorkersSpec(gradient=gradient, parameter_server=given)
    assert (workers.num_shards, workers.has_colocated_shards) == (wanted, shared)


def kfac_snapshot(plan: ShardPlan) -> dict[str, Array]:
    """Everything that a checkpoint of K-FAC's parameter server has, by its names."""
    generator = torch.Generator().manual_seed(0)

    def vector() -> Array:
        return to_array(torch.randn(plan.num_parameters, generator=generator).double())

    scalars = {"version": 7, "count:bad_step": 2, "count:no_inverse": 5, "stale_applied": 3}
    state: dict[str, Array] = {name: np.asarray(value) for name, value in scalars.items()}
    state |= {
        name: vector() for name in ("parameters", "average:average", "update:previous_update")
    }
    state |= {f"update:{name}": np.asarray(0.5) for name in ("damping", "gamma", "fisher_noise")}
    state["update:search"] = np.asarray([0.5, 0.25, 1.0])
    state["average:num_averaged"] = np.asarray(4)
    names = [name for layout in plan.layouts for name in layout.names]
    for number, name in enumerate(names):
        state[f"inverse:{name}/used"] = np.asarray(5)
        for step in (5, 6):
            state[f"inverse:{name}/{step}/0/gamma"] = np.asarray(0.5)
            state[f"inverse:{name}/{step}/0/A:lower"] = np.full(3, number)
    return state


def first_order_snapshot(plan: ShardPlan) -> dict[str, Array]:
    vector = np.arange(plan.num_parameters, dtype=np.float64)
    return {
        "parameters": vector,
        "version": np.asarray(9),
        "count:bad_step": np.asarray(1),
        "optimizer:exp_avg": 2 * vector,
        "optimizer:exp_avg_sq": vector**2,
        "optimizer:step": np.asarray(9.0),
    }


def assert_same(found: dict[str, Array], expected: dict[str, Array]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("num_shards", COUNTS)
@pytest.mark.parametrize("snapshot_of", [kfac_snapshot, first_order_snapshot])
def test_the_parts_of_a_snapshot_merge_to_it(snapshot_of, num_shards):
    plan = plan_of(num_shards)
    whole = snapshot_of(plan)
    parts = [split_snapshot(plan, whole, shard) for shard in range(len(plan))]
    assert_same(merge_snapshots(plan, parts), whole)
    for layout, part in zip(plan.layouts, parts, strict=True):
        assert len(part["parameters"]) == layout.size
        inverses = {name.split(":")[1].split("/")[0] for name in part if "inverse:" in name}
        assert inverses <= set(layout.names)


@pytest.mark.parametrize("before", COUNTS)
@pytest.mark.parametrize("after", COUNTS)
def test_a_snapshot_of_some_shards_is_cut_for_any_other_number(before, after):
    first, second = plan_of(before), plan_of(after)
    whole = kfac_snapshot(first)
    merged = merge_snapshots(first, [split_snapshot(first, whole, k) for k in range(len(first))])
    again = [split_snapshot(second, merged, k) for k in range(len(second))]
    assert_same(merge_snapshots(second, again), whole)


def test_what_each_shard_counted_is_added():
    plan = plan_of(3)
    parts = [split_snapshot(plan, kfac_snapshot(plan), shard) for shard in range(3)]
    parts[1]["count:no_inverse"] = np.asarray(4)
    parts[2]["count:gradient_fallback"] = np.asarray(6)
    parts[2]["stale_applied"] = np.asarray(10)
    merged = merge_snapshots(plan, parts)
    found = {name: int(merged[name]) for name in merged if name.startswith(("count:", "stale"))}
    assert found == {
        "count:bad_step": 2,
        "count:no_inverse": 9,
        "count:gradient_fallback": 6,
        "stale_applied": 13,
    }


def test_a_name_that_begins_like_another_takes_none_of_its_inverses():
    """The blocks head and head2 may be in different shards."""
    plan = plan_of(9)
    whole = kfac_snapshot(plan)
    for shard, layout in enumerate(plan.layouts):
        names = [name for name in split_snapshot(plan, whole, shard) if "inverse:" in name]
        assert sorted(names) == sorted(
            f"inverse:{layout.names[0]}/{what}"
            for what in ("used", *(f"{n}/0/{key}" for n in (5, 6) for key in ("gamma", "A:lower")))
        )
