"""Oracle 5: the inverse under factored damping is the dense inverse of the damped product.

`G^-1 V A^-1` of the damped factors equals a dense solve with the Kronecker product of the damped
factors, in both vec orders.
"""

import pytest
import torch

from kfac_dist.core.factors import KroneckerPair
from kfac_dist.core.inverse.damped import invert_pair, redamp
from tests.oracles.truth import dense

TOLERANCE = 1e-10
SHAPES = [(1, 1), (1, 4), (4, 1), (3, 3), (6, 2), (5, 7)]
GAMMAS = [1e-3, 0.1, 10.0]


def random_factor(size: int, rank: int, seed: int, scale: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(rank, size, generator=generator, dtype=torch.float64)
    return scale * rows.T @ rows / rank


def random_pair(dim_A: int, dim_G: int, *, full_rank: bool = True):
    rank = 20 if full_rank else 2
    return KroneckerPair(
        A=random_factor(dim_A, rank, seed=dim_A, scale=3.0),
        G=random_factor(dim_G, rank, seed=100 + dim_G, scale=0.02),
    )


def as_vec(matrix, order):
    return matrix.flatten() if order == "rows" else matrix.T.flatten()


@pytest.mark.parametrize("norm", ["trace", "frobenius"])
@pytest.mark.parametrize("full_rank", [True, False], ids=["full rank", "rank 2"])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize(("dim_A", "dim_G"), SHAPES)
def test_applied_inverse_is_the_dense_solve(dim_A, dim_G, gamma, full_rank, norm):
    pair = random_pair(dim_A, dim_G, full_rank=full_rank)
    V = torch.randn(dim_G, dim_A, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inverted = invert_pair(pair, gamma, norm)
    assert inverted.rungs == ()
    assert inverted.gamma == gamma
    assert inverted.pi == pytest.approx(dense.split_damping(pair.A, pair.G, norm), rel=1e-12)
    U = inverted.inverse.apply(V)
    for order in ("rows", "columns"):
        block = dense.damped_block(pair.A, pair.G, gamma, order, norm)
        expected = torch.linalg.solve(block, as_vec(V, order))
        torch.testing.assert_close(
            as_vec(U, order), expected, rtol=0, atol=TOLERANCE * expected.abs().max().item()
        )


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize(("dim_A", "dim_G"), SHAPES)
def test_kronecker_product_of_the_inverses_is_the_dense_inverse(dim_A, dim_G, gamma):
    pair = random_pair(dim_A, dim_G)
    inverse = invert_pair(pair, gamma).inverse
    for order in ("rows", "columns"):
        expected = torch.linalg.inv(dense.damped_block(pair.A, pair.G, gamma, order))
        actual = dense.kronecker_block(inverse.A, inverse.G, order)
        torch.testing.assert_close(
            actual, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item()
        )


@pytest.mark.parametrize("factor", [1.0, 3.0, 100.0])
def test_redamping_is_inverting_at_the_larger_gamma(factor):
    pair = random_pair(5, 4)
    redamped = redamp(invert_pair(pair, 0.1), 0.1 * factor)
    expected = invert_pair(pair, 0.1 * factor)
    assert redamped.gamma == pytest.approx(expected.gamma)
    assert redamped.pi == expected.pi
    for mine, other in (
        (redamped.inverse.A, expected.inverse.A),
        (redamped.inverse.G, expected.inverse.G),
    ):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)
