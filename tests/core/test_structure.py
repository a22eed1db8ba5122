"""What the structures of the inverse promise alike."""

import math
from dataclasses import replace

import pytest
import torch

from kfac_dist.config import kfac_settings
from kfac_dist.core import kronecker_sum
from kfac_dist.core.factors import KroneckerPair, LayerSnapshot, Link
from kfac_dist.core.inverse import InversionFailedError
from kfac_dist.core.structure import structure_for
from kfac_dist.core.tridiagonal import invert_conditional, solve_chain

STRUCTURES = ("block_diagonal", "block_tridiagonal", "ekfac")
NAMES = ("first", "second", "third")
SIZES = {"first": (4, 3), "second": (3, 3), "third": (4, 2)}
GAMMAS = (0.3, 0.2, 0.45)


def structure_of(inverse, names=NAMES, **options):
    return structure_for(kfac_settings({"inverse": inverse, **options}), names)


def snapshots(dtype=torch.float64, seed=0, num_cases=30):
    generator = torch.Generator().manual_seed(seed)

    def rows(which):
        common = torch.randn(num_cases, 4, generator=generator, dtype=torch.float64)
        return {
            name: (
                common[:, : size[which]]
                + torch.randn(num_cases, size[which], generator=generator, dtype=torch.float64)
            ).to(dtype)
            for name, size in SIZES.items()
        }

    inputs, gradients = rows(0), rows(1)

    def pair(left, right):
        return KroneckerPair(
            A=inputs[left].T @ inputs[right] / num_cases,
            G=gradients[left].T @ gradients[right] / num_cases,
        )

    following = dict(zip(NAMES, (*NAMES[1:], None), strict=True))
    return {
        name: LayerSnapshot(
            step=5,
            pair=pair(name, name),
            next_pair=pair(after, after) if after else None,
            cross=pair(name, after) if after else None,
        )
        for name, after in following.items()
    }


def gradients(seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(dim_G, dim_A, generator=generator, dtype=torch.float64).to(dtype)
        for name, (dim_A, dim_G) in SIZES.items()
    }


def prepared(structure, gammas=GAMMAS, **options):
    return {
        name: structure.prepare(snapshot, gammas) for name, snapshot in snapshots(**options).items()
    }


def at(inverted_by_layer, number):
    return {name: inverted[number].inverse for name, inverted in inverted_by_layer.items()}


@pytest.mark.parametrize("inverse", STRUCTURES)
def test_a_candidate_is_what_its_gamma_gives_alone(inverse):
    structure = structure_of(inverse)
    together = prepared(structure)
    for number, gamma in enumerate(GAMMAS):
        alone = prepared(structure, (gamma,))
        for name in NAMES:
            one = together[name][number]
            assert (one.gamma, one.pi) == (gamma, alone[name][0].pi)
            expected = alone[name][0].inverse.tensors()
            for key, tensor in one.inverse.tensors().items():
                assert torch.equal(tensor, expected[key])
        mine, _ = structure.solve(gradients(), at(together, number), gamma)
        other, _ = structure.solve(gradients(), at(alone, 0), gamma)
        assert all(torch.equal(mine[name], other[name]) for name in NAMES)


@pytest.mark.parametrize("inverse", STRUCTURES)
def test_tensors_depend_on_gamma_where_the_structure_says_so(inverse):
    structure = structure_of(inverse)
    for one, other, _ in prepared(structure).values():
        left, right = one.inverse.tensors(), other.inverse.tensors()
        same = all(torch.equal(left[key], right[key]) for key in left)
        assert same is not structure.depends_on_gamma


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inverse", ["block_tridiagonal", "ekfac"])
def test_an_inverse_that_travelled_as_arrays_gives_the_same_bits(inverse, dtype):
    structure = structure_of(inverse)
    sent = prepared(structure, dtype=dtype)
    received = {
        name: [
            structure.restore(
                {k: torch.from_numpy(v.numpy().copy()) for k, v in one.inverse.tensors().items()},
                one.pi,
                one.gamma,
            )
            for one in inverted
        ]
        for name, inverted in sent.items()
    }
    for number, gamma in enumerate(GAMMAS):
        one, _ = structure.solve(gradients(dtype=dtype), at(sent, number), gamma)
        other, _ = structure.solve(gradients(dtype=dtype), at(received, number), gamma)
        for name in NAMES:
            assert one[name].dtype == dtype
            assert torch.equal(one[name], other[name])


@pytest.mark.parametrize("inverse", STRUCTURES)
def test_the_direction_descends_and_is_shorter_with_more_damping(inverse):
    structure, V = structure_of(inverse), gradients()
    norms = []
    for gamma in (0.01, 0.1, 1.0, 10.0, 1e4):
        solved, fallen = structure.solve(V, at(prepared(structure, (gamma,)), 0), gamma)
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
    heavy = {name: structure.redamp(one, 3.0) for name, (one,) in light.items()}
    assert all(one.gamma == 3.0 for one in heavy.values())
    short, fallen = structure.solve(V, {name: one.inverse for name, one in heavy.items()}, 3.0)
    assert fallen == ()
    long, _ = structure.solve(V, at(light, 0), 0.3)
    assert sum(U.norm() for U in short.values()) < sum(U.norm() for U in long.values())


@pytest.mark.parametrize("inverse", STRUCTURES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_factors_that_are_not_finite_have_no_inverse(inverse, bad):
    structure, snapshot = structure_of(inverse), snapshots()["first"]
    snapshot.pair.A[0, 0] = bad
    assert structure.prepare(snapshot, GAMMAS) == [None] * 3


@pytest.mark.parametrize("which", ["next_pair", "cross"])
def test_neither_has_a_link_whose_other_half_is_not_finite(which):
    snapshot = snapshots()["first"]
    getattr(snapshot, which).G[0, 0] = math.nan
    assert structure_of("block_tridiagonal").prepare(snapshot, GAMMAS) == [None] * 3


@pytest.mark.parametrize("inverse", STRUCTURES)
def test_a_layer_without_inverse_falls_back_to_the_gradient(inverse):
    structure, V = structure_of(inverse), gradients()
    inverses = at(prepared(structure), 0)
    del inverses["second"]
    solved, fallen = structure.solve(V, inverses, 0.5)
    assert fallen == ("second",)
    assert all(torch.isfinite(U).all() for U in solved.values())
    assert sum((V[name] * solved[name]).sum() for name in NAMES) > 0
    if inverse != "block_tridiagonal":
        torch.testing.assert_close(solved["second"], V["second"] / 0.25)


def test_a_chain_with_a_part_that_does_not_descend_still_does():
    structure, V = structure_of("block_tridiagonal"), gradients()
    inverses = at(prepared(structure), 0)
    good = inverses["second"].conditional
    for spoiled in (-good.denominators, good.denominators * math.nan):
        broken = inverses | {
            "second": replace(inverses["second"], conditional=replace(good, denominators=spoiled))
        }
        solved, fallen = structure.solve(V, broken, 0.5)
        assert fallen == ("second",)
        assert sum((V[name] * solved[name]).sum() for name in NAMES) > 0


def test_links_join_neighbours_in_the_order_of_the_model():
    assert structure_of("block_diagonal").links == structure_of("ekfac").links == ()
    links = structure_of("block_tridiagonal").links
    assert links == (Link("first", "second"), Link("second", "third"))
    assert structure_of("block_tridiagonal", ("alone",)).links == ()


def test_a_chain_of_one_layer_is_block_diagonal():
    snapshot = snapshots()["third"]
    (one,) = structure_of("block_tridiagonal").prepare(snapshot, (0.2,))
    (other,) = structure_of("block_diagonal").prepare(snapshot, (0.2,))
    V = {"third": gradients()["third"]}
    solved, _ = solve_chain(V, {"third": one.inverse}, (), 0.2)
    torch.testing.assert_close(solved["third"], other.inverse.apply(V["third"]))


def failing_in_float32(A, *args):
    if A.dtype == torch.float32:
        raise InversionFailedError("made to fail")
    return real_diagonalise(A, *args)


real_diagonalise = kronecker_sum._diagonalise


def test_a_link_that_fails_is_tried_in_float64(monkeypatch):
    snapshot = snapshots(torch.float32)["first"]
    expected = invert_conditional(snapshot, 0.3)
    monkeypatch.setattr(kronecker_sum, "_diagonalise", failing_in_float32)
    inverted = invert_conditional(snapshot, 0.3)
    assert inverted.rungs == ("float64",)
    V = gradients(dtype=torch.float32)["first"]
    U = inverted.inverse.apply(V)
    assert U.dtype == torch.float32
    torch.testing.assert_close(U, expected.inverse.apply(V), rtol=1e-4, atol=1e-5)


def test_an_indefinite_factor_raises_the_damping_of_its_link():
    snapshot = snapshots()["first"]
    snapshot.pair.A.diagonal().sub_(3.0)
    inverted = invert_conditional(snapshot, 0.3)
    assert inverted.rungs[0] == "float64"
    assert set(inverted.rungs[1:]) == {"raised_damping"}
    V = gradients()["first"]
    assert (V * inverted.inverse.apply(V)).sum() > 0


def test_ekfac_decomposes_once_for_all_candidates(monkeypatch):
    calls = []
    real = kronecker_sum.eigendecompose

    def counted(matrix):
        calls.append(len(matrix))
        return real(matrix)

    monkeypatch.setattr("kfac_dist.core.eigenbasis.eigendecompose", counted)
    prepared(structure_of("ekfac"))
    assert len(calls) == 2 * len(NAMES)


def test_ekfac_takes_the_moments_along_to_a_new_basis():
    structure = structure_of("ekfac", factor_decay=0.5)
    current = {name: one for name, (one,) in prepared(structure, (0.3,)).items()}
    sixes = {name: torch.full_like(one.inverse.moments, 6.0) for name, one in current.items()}
    observed = structure.observe(current, sixes, 3)
    for name, one in observed.items():
        expected = current[name].inverse.moments * 0.5 + 2.0 * 0.5
        torch.testing.assert_close(one.inverse.moments, expected)
        assert one.inverse.num_updates == 2
        (new,) = structure.prepare(snapshots(seed=4)[name], (0.7,))
        installed = structure.install(new, one)
        assert installed.gamma == installed.inverse.gamma == 0.7
        assert torch.equal(installed.inverse.basis.A, new.inverse.basis.A)
        torch.testing.assert_close(installed.inverse.moments.sum(), one.inverse.moments.sum())
        assert structure.install(new, None) is new


@pytest.mark.parametrize("inverse", ["block_diagonal", "block_tridiagonal"])
def test_the_other_structures_have_no_moments(inverse):
    structure = structure_of(inverse)
    current = {name: one for name, (one,) in prepared(structure, (0.3,)).items()}
    assert structure.bases(current) == {}
    assert structure.observe(current, {}, 3) == current
    assert structure.install(current["first"], None) is current["first"]
