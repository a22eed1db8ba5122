"""What all structures of the inverse have in common, and what only some have."""

import math

import pytest
import torch

from kfac_dist.core.inverse import kronecker_sum
from tests.core.inverse.layers_of_a_chain import (
    GAMMAS,
    NAMES,
    STRUCTURES,
    at,
    gradients,
    prepared,
    snapshots,
    structure_of,
)


@pytest.mark.parametrize("inverse", STRUCTURES)
def test_a_candidate_is_what_its_gamma_gives_alone(inverse):
    structure = structure_of(inverse)
    together = prepared(structure)
    for number, gamma in enumerate(GAMMAS):
        alone = prepared(structure, (gamma,))
        for name in NAMES:
            candidate = together[name][number]
            assert (candidate.gamma, candidate.pi) == (gamma, alone[name][0].pi)
            tensors = alone[name][0].inverse.tensors()
            for key, tensor in candidate.inverse.tensors().items():
                assert torch.equal(tensor, tensors[key])
        direction, _ = structure.precondition(gradients(), at(together, number), gamma)
        expected, _ = structure.precondition(gradients(), at(alone, 0), gamma)
        assert all(torch.equal(direction[name], expected[name]) for name in NAMES)


@pytest.mark.parametrize("inverse", STRUCTURES)
def test_tensors_depend_on_gamma_except_in_an_eigenbasis(inverse):
    structure = structure_of(inverse)
    for first, second, _ in prepared(structure).values():
        left, right = first.inverse.tensors(), second.inverse.tensors()
        same = all(torch.equal(left[key], right[key]) for key in left)
        assert same is (inverse == "ekfac")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inverse", ["block_tridiagonal", "ekfac"])
def test_an_inverse_that_travelled_as_arrays_gives_the_same_bits(inverse, dtype):
    structure = structure_of(inverse)
    sent = prepared(structure, dtype=dtype)
    received = {
        name: [
            structure.restore(
                {k: torch.from_numpy(v.numpy().copy()) for k, v in layer.inverse.tensors().items()},
                layer.pi,
                layer.gamma,
            )
            for layer in inverted
        ]
        for name, inverted in sent.items()
    }
    for number, gamma in enumerate(GAMMAS):
        expected, _ = structure.precondition(gradients(dtype=dtype), at(sent, number), gamma)
        found, _ = structure.precondition(gradients(dtype=dtype), at(received, number), gamma)
        for name in NAMES:
            assert found[name].dtype == dtype
            assert torch.equal(found[name], expected[name])


@pytest.mark.parametrize("inverse", STRUCTURES)
def test_the_direction_descends_and_is_shorter_with_more_damping(inverse):
    structure, V = structure_of(inverse), gradients()
    norms = []
    for gamma in (0.01, 0.1, 1.0, 10.0, 1e4):
        solved, fallen = structure.precondition(V, at(prepared(structure, (gamma,)), 0), gamma)
        assert fallen == ()
        assert sum((V[name] * solved[name]).sum() for name in NAMES) > 0
        norms.append(sum(U.square().sum() for U in solved.values()).sqrt().item())
    assert norms == sorted(norms, reverse=True)
    for name in NAMES:  # a large damping leaves the scaled gradient
        torch.testing.assert_close(solved[name] * 1e8, V[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("inverse", STRUCTURES)
def test_redamping_shortens_the_direction(inverse):
    structure, V = structure_of(inverse), gradients()
    light = prepared(structure, (0.3,))
    heavy = {name: structure.redamp(layer, 3.0) for name, (layer,) in light.items()}
    assert all(layer.gamma == 3.0 for layer in heavy.values())
    short, fallen = structure.precondition(
        V, {name: layer.inverse for name, layer in heavy.items()}, 3.0
    )
    assert fallen == ()
    long, _ = structure.precondition(V, at(light, 0), 0.3)
    assert sum(U.norm() for U in short.values()) < sum(U.norm() for U in long.values())


@pytest.mark.parametrize("inverse", STRUCTURES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_factors_that_are_not_finite_have_no_inverse(inverse, bad):
    structure, snapshot = structure_of(inverse), snapshots()["first"]
    snapshot.pair.A[0, 0] = bad
    assert structure.invert_at_gammas(snapshot, GAMMAS) == [None] * 3


@pytest.mark.parametrize("inverse", STRUCTURES)
def test_a_layer_without_inverse_falls_back_to_the_gradient(inverse):
    structure, V = structure_of(inverse), gradients()
    inverses = at(prepared(structure), 0)
    del inverses["second"]
    solved, fallen = structure.precondition(V, inverses, 0.5)
    assert fallen == ("second",)
    assert all(torch.isfinite(U).all() for U in solved.values())
    assert sum((V[name] * solved[name]).sum() for name in NAMES) > 0
    if inverse != "block_tridiagonal":
        torch.testing.assert_close(solved["second"], V["second"] / 0.25)


def test_ekfac_decomposes_once_for_all_candidates(monkeypatch):
    calls = []
    real = kronecker_sum.eigendecompose

    def counted(matrix):
        calls.append(len(matrix))
        return real(matrix)

    monkeypatch.setattr("kfac_dist.core.inverse.ekfac.eigendecompose", counted)
    prepared(structure_of("ekfac"))
    assert len(calls) == 2 * len(NAMES)


def test_ekfac_takes_the_moments_along_to_a_new_basis():
    structure = structure_of("ekfac", factor_decay=0.5)
    current = {name: layer for name, (layer,) in prepared(structure, (0.3,)).items()}
    sixes = {name: torch.full_like(layer.inverse.moments, 6.0) for name, layer in current.items()}
    observed = structure.observe(current, sixes, 3)
    for name, layer in observed.items():
        expected = current[name].inverse.moments * 0.5 + 2.0 * 0.5
        torch.testing.assert_close(layer.inverse.moments, expected)
        assert layer.inverse.num_updates == 2
        (new,) = structure.invert_at_gammas(snapshots(seed=4)[name], (0.7,))
        installed = structure.install(new, layer)
        assert installed.gamma == installed.inverse.gamma == 0.7
        assert torch.equal(installed.inverse.basis.A, new.inverse.basis.A)
        torch.testing.assert_close(installed.inverse.moments.sum(), layer.inverse.moments.sum())
        assert structure.install(new, None) is new


@pytest.mark.parametrize("inverse", ["block_diagonal", "block_tridiagonal"])
def test_the_other_structures_have_no_moments(inverse):
    structure = structure_of(inverse)
    current = {name: layer for name, (layer,) in prepared(structure, (0.3,)).items()}
    assert structure.bases(current) == {}
    assert structure.observe(current, {}, 3) == current
    assert structure.install(current["first"], None) is current["first"]
