"""Oracle 7: the block-tridiagonal inverse is that of a chain.

With two layers it is the inverse of the whole damped matrix. With more layers, its inverse `Fhat`
agrees with the approximated Fisher on the tridiagonal blocks, `Fhat Fhat^-1 = I`, and layers that
are not neighbours are independent given the others. If the cross factors are zero, it is the
block-diagonal inverse.
"""

from itertools import pairwise

import pytest
import torch

from kfac_dist.core.factors import KroneckerPair, LayerSnapshot, Link
from kfac_dist.core.inverse.damped import invert_pair
from kfac_dist.core.inverse.tridiagonal import (
    invert_conditional,
    precondition_chain,
    redamp_conditional,
)
from tests.oracles.truth import dense, dense_chain

TOLERANCE = 1e-9
# (dim_A, dim_G) of each layer.
CHAINS = {
    "one": [(3, 2)],
    "two": [(3, 4), (5, 2)],
    "three": [(3, 2), (3, 4), (2, 3)],
    "four": [(2, 3), (4, 2), (1, 3), (3, 1)],
}
GAMMAS = [1e-2, 0.3, 5.0]


class Chain:
    def __init__(self, sizes, gamma, norm="trace", num_cases=40, crossed=True):
        self.shapes = [(dim_G, dim_A) for dim_A, dim_G in sizes]
        self.names = [f"layer{i}" for i in range(len(sizes))]
        self.links = [Link(*names) for names in pairwise(self.names)]
        self.gamma, self.norm = gamma, norm
        self.A = dense_chain.joint_factors([a for a, _ in sizes], num_cases, seed=1)
        self.G = dense_chain.joint_factors([g for _, g in sizes], num_cases, seed=2)
        if not crossed:
            for i, j in self.A:
                if i != j:
                    self.A[i, j].zero_()
                    self.G[i, j].zero_()
        self.blocks = dense_chain.approximated_blocks(self.A, self.G, gamma, norm)

    def pair(self, i, j):
        return KroneckerPair(A=self.A[i, j], G=self.G[i, j])

    def inverses(self):
        prepared = {}
        for i, name in enumerate(self.names):
            last = i + 1 == len(self.names)
            snapshot = LayerSnapshot(
                step=1,
                pair=self.pair(i, i),
                next_pair=None if last else self.pair(i + 1, i + 1),
                cross=None if last else self.pair(i, i + 1),
            )
            inverted = invert_conditional(snapshot, self.gamma, self.norm)
            assert inverted.rungs == ()
            prepared[name] = inverted.inverse
        return prepared

    def apply(self, matrices, inverses=None):
        """Return the library's direction; gradients and direction are lists of matrices."""
        solved, fallen = precondition_chain(
            dict(zip(self.names, matrices, strict=True)),
            self.inverses() if inverses is None else inverses,
            self.links,
            self.gamma,
        )
        assert fallen == ()
        return [solved[name] for name in self.names]

    def dense_inverse(self, inverses=None):
        """Return the library's inverse as a matrix, computed column by column."""
        size = sum(rows * columns for rows, columns in self.shapes)
        inverses = self.inverses() if inverses is None else inverses
        columns = [
            dense_chain.stack(self.apply(dense_chain.unstack(unit, self.shapes), inverses))
            for unit in torch.eye(size, dtype=torch.float64)
        ]
        return torch.stack(columns, dim=1)

    def part(self, matrix, i, j):
        """Return block (i, j) of a matrix over all layers."""
        sizes = [rows * columns for rows, columns in self.shapes]
        return matrix.split(sizes)[i].split(sizes, dim=1)[j]


def assert_close(actual, expected, tolerance=TOLERANCE):
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("norm", ["trace", "frobenius"])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_two_layers_give_the_inverse_of_the_whole_matrix(gamma, norm):
    chain = Chain(CHAINS["two"], gamma, norm)
    b = chain.blocks
    whole = torch.cat([torch.cat([b[0, 0], b[0, 1]], 1), torch.cat([b[1, 0], b[1, 1]], 1)])
    assert_close(chain.dense_inverse(), torch.linalg.inv(whole))


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("name", CHAINS)
def test_it_is_the_inverse_of_the_chain(name, gamma):
    chain = Chain(CHAINS[name], gamma)
    Fhat = dense_chain.chain_covariance(chain.blocks, len(chain.names))
    inverse = chain.dense_inverse()
    assert_close(Fhat @ inverse, torch.eye(len(Fhat), dtype=torch.float64))
    assert_close(inverse, torch.linalg.inv(Fhat))
    assert_close(inverse, inverse.T)
    assert torch.linalg.eigvalsh((inverse + inverse.T) / 2).min() > 0


@pytest.mark.parametrize("name", ["three", "four"])
def test_tridiagonal_blocks_agree_and_the_others_of_the_inverse_are_zero(name):
    chain = Chain(CHAINS[name], 0.1)
    inverse = chain.dense_inverse()
    Fhat = torch.linalg.inv(inverse)
    for i in range(len(chain.names)):
        for j in range(len(chain.names)):
            if abs(i - j) <= 1:
                assert_close(chain.part(Fhat, i, j), chain.blocks[i, j])
            else:
                assert chain.part(inverse, i, j).abs().max() < 1e-12 * inverse.abs().max()
                assert chain.part(Fhat, i, j).abs().max() > 1e-3  # Fhat itself is dense


@pytest.mark.parametrize("name", CHAINS)
def test_zero_cross_factors_give_the_block_diagonal_inverse(name):
    chain = Chain(CHAINS[name], 0.2, crossed=False)
    generator = torch.Generator().manual_seed(3)
    matrices = [torch.randn(s, generator=generator, dtype=torch.float64) for s in chain.shapes]
    for i, (V, U) in enumerate(zip(matrices, chain.apply(matrices), strict=True)):
        inverse = invert_pair(chain.pair(i, i), 0.2).inverse
        assert_close(U, inverse.apply(V))


def test_few_cases_leave_it_positive():
    """With rank-deficient, perfectly correlated factors, only the damping keeps layers apart."""
    chain = Chain(CHAINS["four"], 1e-3, num_cases=2)
    inverse = chain.dense_inverse()
    assert torch.linalg.eigvalsh((inverse + inverse.T) / 2).min() > 0
    Fhat = dense_chain.chain_covariance(chain.blocks, 4)
    assert_close(Fhat @ inverse, torch.eye(len(Fhat), dtype=torch.float64), 1e-6)


def test_parts_of_other_gammas_stay_positive():
    """Each layer's part is positive by itself, so layers may have parts of different versions."""
    light, heavy = Chain(CHAINS["four"], 1e-3), Chain(CHAINS["four"], 2.0)
    mixed = light.inverses() | dict(list(heavy.inverses().items())[::2])
    inverse = light.dense_inverse(mixed)
    assert_close(inverse, inverse.T)
    assert torch.linalg.eigvalsh((inverse + inverse.T) / 2).min() > 0


def test_redamped_layer_is_its_own_block_with_more_damping():
    chain = Chain(CHAINS["two"], 0.1)
    snapshot = LayerSnapshot(
        step=1, pair=chain.pair(0, 0), next_pair=chain.pair(1, 1), cross=chain.pair(0, 1)
    )
    redamped = redamp_conditional(invert_conditional(snapshot, 0.1), 0.7)
    assert redamped.gamma == 0.7
    assert redamped.inverse.psi is None
    V = torch.ones(4, 3, dtype=torch.float64)
    block = dense.damped_block(chain.A[0, 0], chain.G[0, 0], 0.7, "columns")
    expected = torch.linalg.solve(block, V.T.flatten())
    assert_close(redamped.inverse.apply(V).T.flatten(), expected)
