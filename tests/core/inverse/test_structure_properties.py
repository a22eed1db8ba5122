"""Properties of the structures for any statistics, dampings and gradients."""

from dataclasses import replace
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.config import kfac_settings
from kfac_dist.core.factors import FactorAverages, KroneckerPair, Link
from kfac_dist.core.inverse.ekfac import eigen_inverse
from kfac_dist.core.inverse.structure import structure_for
from kfac_dist.core.statistics.sums import case_moments

SEEDS = st.integers(0, 2**31)
SIZES = st.integers(1, 5)


def log_uniform(low, high):
    return st.floats(low, high).map(lambda exponent: 10.0**exponent)


@st.composite
def chains(draw):
    """Averages of a chain over a few steps of any number of cases, and its sizes."""
    generator = torch.Generator().manual_seed(draw(SEEDS))
    sizes = draw(st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=4))
    scales = [(draw(log_uniform(-2, 2)), draw(log_uniform(-2, 2))) for _ in sizes]
    names = [f"layer{i}" for i in range(len(sizes))]
    links = [Link(*pair) for pair in pairwise(names)]
    averages = FactorAverages(names, draw(st.floats(0.0, 0.99)), links)
    for step in range(1, draw(st.integers(1, 4)) + 1):
        num_cases = draw(st.integers(1, 8))
        rows = {
            name: tuple(
                scale * torch.randn(num_cases, size, generator=generator, dtype=torch.float64)
                for size, scale in zip(layer, layer_scales, strict=True)
            )
            for name, layer, layer_scales in zip(names, sizes, scales, strict=True)
        }

        def product(left, right, rows=rows):
            return KroneckerPair(
                A=rows[left][0].T @ rows[right][0], G=rows[left][1].T @ rows[right][1]
            )

        averages.update(
            step,
            {name: product(name, name) for name in names},
            num_cases,
            {link.name: product(*link) for link in links},
        )
    return averages, dict(zip(names, sizes, strict=True))


def gradients(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(dim_G, dim_A, generator=generator, dtype=torch.float64)
        for name, (dim_A, dim_G) in sizes.items()
    }


def solve(inverse, averages, matrices, gamma):
    structure = structure_for(kfac_settings({"inverse": inverse}), averages.names, averages.links)
    inverses = {}
    for name in averages.names:
        (layer,) = structure.invert_at_gammas(averages.snapshot(name), [gamma])
        inverses[name] = layer.inverse
    solved, fallen = structure.precondition(matrices, inverses, gamma)
    assert fallen == ()
    return solved


def dot(left, right):
    return sum((left[name] * right[name]).sum().item() for name in left)


@given(
    chain=chains(),
    gamma=log_uniform(-2, 2),
    inverse=st.sampled_from(["block_tridiagonal", "ekfac"]),
    seed=SEEDS,
)
def test_the_inverse_is_symmetric_and_positive(chain, gamma, inverse, seed):
    averages, sizes = chain
    V, W = gradients(sizes, seed), gradients(sizes, seed + 1)
    inverse_V, inverse_W = (solve(inverse, averages, X, gamma) for X in (V, W))
    assert dot(V, inverse_V) > 0
    size = (dot(V, inverse_V) * dot(W, inverse_W)) ** 0.5
    assert abs(dot(W, inverse_V) - dot(V, inverse_W)) <= 1e-8 * size


@given(chain=chains(), seed=SEEDS, inverse=st.sampled_from(["block_tridiagonal", "ekfac"]))
def test_large_damping_gives_the_scaled_gradient(chain, seed, inverse):
    averages, sizes = chain
    gamma = 1e9
    V = gradients(sizes, seed)
    for name, U in solve(inverse, averages, V, gamma).items():
        torch.testing.assert_close(U * gamma**2, V[name], rtol=1e-4, atol=1e-4)


@given(seed=SEEDS, num_cases=st.integers(1, 6), positions=st.integers(1, 3))
def test_moments_sum_to_the_squared_norms_of_the_gradients_in_any_basis(seed, num_cases, positions):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(num_cases, positions, 4, generator=generator, dtype=torch.float64)
    g = torch.randn(num_cases, positions, 3, generator=generator, dtype=torch.float64)
    basis = KroneckerPair(
        A=torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0],
        G=torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0],
    )
    moments = case_moments(a, g, basis)
    assert moments.min() >= 0
    torch.testing.assert_close(moments.sum(), (g.mT @ a).square().sum())


@given(chain=chains(), decay=st.floats(0.0, 0.99), seed=SEEDS)
def test_moments_stay_nonnegative_and_keep_their_sum_across_bases(chain, decay, seed):
    averages, sizes = chain
    name = averages.names[0]
    current = eigen_inverse(averages.pair(name), 0.1).inverse
    sums = gradients(sizes, seed)[name].square()
    updated = current.updated(sums, 3, decay)
    other = eigen_inverse(averages.pair(name), 0.1).inverse
    flipped = replace(other, basis=KroneckerPair(A=other.basis.A.flip(1), G=-other.basis.G.flip(1)))
    carried = flipped.carrying(updated)
    assert updated.moments.min() >= 0
    # Other order and signs of the same basis: the same moments in the other order.
    close = {"rtol": 1e-8, "atol": 1e-8 * updated.moments.max().item()}
    torch.testing.assert_close(carried.moments.flip(0, 1), updated.moments, **close)
