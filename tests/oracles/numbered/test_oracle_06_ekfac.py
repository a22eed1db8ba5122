"""Oracle 6: EKFAC is no further from the exact block than K-FAC, in the Frobenius norm.

Its moments are the diagonal of the exact block in the Kronecker eigenbasis, and no other diagonal
matrix in that basis is closer to the block.
"""

from dataclasses import replace

import pytest
import torch

from kfac_dist.core.factors import KroneckerPair
from kfac_dist.core.inverse.ekfac import eigen_inverse
from tests.oracles.truth import dense
from tests.oracles.truth.cases import DEEP_LINEAR, NONLINEAR_BATCH, ONE_CASE, Case, layer_names
from tests.oracles.truth.library import computer_for

SHARED = tuple(
    Case(
        widths=(3, 4, 2),
        activation="tanh",
        distribution=distribution,
        num_cases=5,
        shared=shared,
        seed=11,
    )
    for distribution in ("categorical", "gaussian")
    for shared in ((3,), (2, 2))
)
CASES = (*NONLINEAR_BATCH, *DEEP_LINEAR, *ONE_CASE[::4], *SHARED)
TYPES = ["exact", "empirical"]


def exact_fisher(case, model, inputs, targets, fisher_type):
    if fisher_type == "exact":
        return dense.fisher(case.distribution, model, inputs)
    return dense.empirical_fisher(case.distribution, model, inputs, targets)


def observed(case, model, inputs, targets, fisher_type):
    """Return the mean factors of each layer, and its inverse with the moments of the batch."""
    computer = computer_for(case.distribution, model, fisher_type)
    n = len(inputs)
    sums = computer.statistics(inputs, targets, step=1).factors
    pairs = {name: KroneckerPair(A=pair.A / n, G=pair.G / n) for name, pair in sums.items()}
    inverses = {name: eigen_inverse(pair, 0.1).inverse for name, pair in pairs.items()}
    statistics = computer.statistics(
        inputs, targets, step=1, bases={name: inverse.basis for name, inverse in inverses.items()}
    )
    for name, inverse in inverses.items():
        # With a decay of 0, the moments are those of this batch alone.
        inverses[name] = inverse.updated(statistics.moments[name], n, decay=0.0)
    return pairs, inverses


def dense_curvature(inverse):
    """Return the undamped matrix that EKFAC stands for, vec by columns."""
    basis = dense.kron(inverse.basis.A, inverse.basis.G)
    return basis @ torch.diag(inverse.moments.T.flatten()) @ basis.T


@pytest.mark.parametrize("fisher_type", TYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_moments_are_the_diagonal_and_the_error_is_no_larger(case, fisher_type):
    model, (inputs, targets) = case.model(), case.data()
    fisher = exact_fisher(case, model, inputs, targets, fisher_type)
    pairs, inverses = observed(case, model, inputs, targets, fisher_type)
    for layer in layer_names(model):
        block = dense.layer_block(fisher, model, layer, "columns")
        inverse, pair = inverses[layer], pairs[layer]
        basis = dense.kron(inverse.basis.A, inverse.basis.G)
        diagonal = (basis.T @ block @ basis).diagonal()
        size = block.norm().item()
        torch.testing.assert_close(
            inverse.moments.T.flatten(), diagonal, rtol=0, atol=1e-10 * max(size, 1e-12)
        )
        error = (block - dense_curvature(inverse)).norm()
        kfac_error = (block - dense.kron(pair.A, pair.G)).norm()
        assert error <= kfac_error + 1e-10 * size


def test_the_error_is_smaller_where_the_kronecker_product_is_not_exact():
    case = NONLINEAR_BATCH[0]
    model, (inputs, targets) = case.model(), case.data()
    fisher = exact_fisher(case, model, inputs, targets, "exact")
    pairs, inverses = observed(case, model, inputs, targets, "exact")
    name = layer_names(model)[0]
    block = dense.layer_block(fisher, model, name, "columns")
    error = (block - dense_curvature(inverses[name])).norm()
    assert error < 0.999 * (block - dense.kron(pairs[name].A, pairs[name].G)).norm()
    for factor in (0.9, 1.1):
        other = replace(inverses[name], moments=factor * inverses[name].moments)
        assert error < (block - dense_curvature(other)).norm()


@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("gamma", [0.05, 2.0])
def test_applied_inverse_is_the_dense_solve(gamma, order):
    """Adding gamma^2 to the moments means adding gamma^2 I to the block."""
    case = NONLINEAR_BATCH[0]
    model, (inputs, targets) = case.model(), case.data()
    _, inverses = observed(case, model, inputs, targets, "exact")
    for inverse in inverses.values():
        at = replace(inverse, gamma=gamma)
        V = torch.linspace(-1, 2, inverse.moments.numel(), dtype=torch.float64)
        V = V.reshape(inverse.moments.shape)
        left, right = inverse.basis.A, inverse.basis.G
        basis = dense.kron(left, right) if order == "columns" else dense.kron(right, left)
        moments = inverse.moments.T.flatten() if order == "columns" else inverse.moments.flatten()
        system = basis @ torch.diag(moments + gamma**2) @ basis.T
        flat = V.T.flatten() if order == "columns" else V.flatten()
        U = at.apply(V)
        torch.testing.assert_close(
            U.T.flatten() if order == "columns" else U.flatten(), torch.linalg.solve(system, flat)
        )


def test_without_observations_it_is_kfac_with_the_damping_added_to_the_product():
    generator = torch.Generator().manual_seed(0)
    A, G = (
        rows.T @ rows / 9
        for rows in (
            torch.randn(9, size, generator=generator, dtype=torch.float64) for size in (4, 3)
        )
    )
    inverse = eigen_inverse(KroneckerPair(A=A, G=G), 0.3).inverse
    V = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    system = dense.kron(A, G) + 0.3**2 * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(
        inverse.apply(V).T.flatten(), torch.linalg.solve(system, V.T.flatten())
    )


def test_moments_carried_to_another_basis_are_its_diagonal():
    """The diagonal in the new basis of the matrix that was diagonal in the old; the trace stays."""
    generator = torch.Generator().manual_seed(1)

    def some_inverse():
        A, G = (
            rows.T @ rows
            for rows in (
                torch.randn(9, size, generator=generator, dtype=torch.float64) for size in (4, 3)
            )
        )
        return eigen_inverse(KroneckerPair(A=A, G=G), 0.3).inverse

    old = replace(some_inverse(), num_updates=7)
    new = some_inverse()
    carried = new.carrying(old)
    basis = dense.kron(new.basis.A, new.basis.G)
    expected = (basis.T @ dense_curvature(old) @ basis).diagonal()
    torch.testing.assert_close(carried.moments.T.flatten(), expected)
    torch.testing.assert_close(carried.moments.sum(), old.moments.sum())
    assert carried.num_updates == 7
    same = old.carrying(old)
    torch.testing.assert_close(same.moments, old.moments)
