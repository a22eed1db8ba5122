"""Which inverse worker is started with which layers."""

from __future__ import annotations

import pytest
import torch

from kfac_dist.config import KFACSpec
from kfac_dist.core.blocks.registration import register
from kfac_dist.core.factors import Link
from kfac_dist.core.inverse.structure import structure_for
from tests.workers.whole_jobs.local_job import chain_spec
from workers.planning import (
    inverse_setups,
    layer_costs,
    measure_cost_model,
    probe_snapshot,
    rescaled_setups,
)

MODEL = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(5)])


@pytest.mark.parametrize("num_workers", [1, 2, 3, 7])
def test_a_chain_is_cut_into_runs_with_the_links_of_their_layers(num_workers, tmp_path):
    options = {"inverse": "block_tridiagonal"}
    spec = chain_spec(tmp_path, optimizer=options, workers={"inverse": num_workers})
    setups = inverse_setups(spec, register(MODEL, spec.optimizer), applied_step=3)
    names = [[layer.name for layer in setup.layers] for setup in setups]
    assert [name for own in names for name in own] == ["0", "1", "2", "3", "4"]
    assert all(names)
    links = [link for setup in setups for link in setup.links]
    assert links == [Link(str(i), str(i + 1)) for i in range(4)]
    for setup, own in zip(setups, names, strict=True):
        assert {link.name for link in setup.links} == set(own) - {"4"}
        assert setup.applied_step == 3


@pytest.mark.parametrize("inverse", ["block_diagonal", "block_tridiagonal", "ekfac"])
def test_the_cost_model_is_measured_on_inversions_without_numeric_trouble(inverse):
    settings, link = KFACSpec(inverse=inverse), Link("a", "b")
    structure = structure_for(settings, link, [link])
    snapshot = probe_snapshot(20, torch.float32, linked=bool(structure.links))
    (prepared,) = structure.invert_at_gammas(snapshot, [1.0])
    assert prepared.rungs == ()
    expected = {"block_diagonal": "A", "block_tridiagonal": "psi_A", "ekfac": "Q_A"}
    assert expected[inverse] in prepared.inverse.tensors()
    assert measure_cost_model(settings, torch.float32).matrix_seconds(100) > 0


def test_few_layers_move_when_the_number_of_inverse_workers_changes(tmp_path):
    spec = chain_spec(tmp_path, workers={"inverse": 2})
    registration = register(MODEL, spec.optimizer)
    layers = layer_costs(registration)
    two = {setup.rank: setup for setup in inverse_setups(spec, registration, applied_step=0)}
    one = rescaled_setups(two, layers, 1, statistics_step=7)
    assert [layer.name for layer in one[0].layers] == list(registration.names)
    assert (one[0].assignment_epoch, one[0].applied_step, one[0].exact_step) == (2, 7, 7)
    again = rescaled_setups(one, layers, 2, statistics_step=9)
    assert sorted(again) == [0, 1]
    owned = [layer.name for setup in again.values() for layer in setup.layers]
    assert sorted(owned) == sorted(registration.names)
    assert rescaled_setups(two, layers, 2, statistics_step=9) == two
    many = rescaled_setups(two, layers, 9, statistics_step=9)
    assert len(many) == len(layers), "workers without layers are left out"
