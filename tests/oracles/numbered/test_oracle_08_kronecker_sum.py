"""Oracle 8: paper appendix B against a dense solve with `A (x) B +/- C (x) D`."""

import pytest
import torch

from kfac_dist.core.inverse.damped import InversionFailedError
from kfac_dist.core.inverse.kronecker_sum import invert_kronecker_sum
from tests.oracles.truth import dense

TOLERANCE = 1e-10
SHAPES = [(1, 1), (1, 4), (3, 3), (5, 2), (4, 6)]


def positive(size, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3 * size, size, generator=generator, dtype=torch.float64)
    return rows.T @ rows / len(rows) + 0.1 * torch.eye(size, dtype=torch.float64)


def semidefinite(size, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(rank, size, generator=generator, dtype=torch.float64)
    return rows.T @ rows


def scaled_below(C, A, largest):
    """Return C scaled so that the largest eigenvalue of A^-1 C is `largest`."""
    top = torch.linalg.eigvals(torch.linalg.solve(A, C)).real.max()
    return C * (largest / top) if top > 0 else C


def case_of(dim_A, dim_B, rank_C, rank_D, largest):
    A, B = positive(dim_A, seed=1), positive(dim_B, seed=2)
    C = scaled_below(semidefinite(dim_A, min(rank_C, dim_A), seed=3), A, largest)
    D = scaled_below(semidefinite(dim_B, min(rank_D, dim_B), seed=4), B, largest)
    return A, B, C, D


@pytest.mark.parametrize("ranks", [(9, 9), (1, 9), (9, 1), (1, 1), (0, 9), (9, 0)], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("dim_A", "dim_B"), SHAPES)
def test_applied_inverse_is_the_dense_solve(dim_A, dim_B, sign, ranks):
    # A difference is positive only if the eigenvalues are below 1; for a sum they can be any.
    A, B, C, D = case_of(dim_A, dim_B, *ranks, largest=0.9 if sign < 0 else 30.0)
    prepared = invert_kronecker_sum(A, B, C, D, sign=sign)
    system = dense.kron(A, B) + sign * dense.kron(C, D)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):  # prepared once, applied to many
        V = torch.randn(dim_B, dim_A, generator=generator, dtype=torch.float64)
        expected = torch.linalg.solve(system, V.T.flatten())
        torch.testing.assert_close(
            prepared.apply(V).T.flatten(),
            expected,
            rtol=0,
            atol=TOLERANCE * expected.abs().max().item(),
        )


def test_K1_and_K2_are_roots_of_the_inverses():
    A, B, C, D = case_of(4, 3, 2, 3, largest=0.5)
    prepared = invert_kronecker_sum(A, B, C, D, sign=-1)
    torch.testing.assert_close(prepared.K1 @ prepared.K1.T, torch.linalg.inv(A))
    torch.testing.assert_close(prepared.K2 @ prepared.K2.T, torch.linalg.inv(B))
    torch.testing.assert_close(
        prepared.K1.T @ C @ prepared.K1,
        torch.diag((prepared.K1.T @ C @ prepared.K1).diagonal()),
    )


def test_both_parts_are_symmetrised():
    A, B, C, D = case_of(4, 3, 4, 3, largest=0.5)
    skew = torch.triu(torch.full((4, 4), 1e-3, dtype=torch.float64), 1)
    expected = invert_kronecker_sum(A, B, C, D, sign=-1)
    prepared = invert_kronecker_sum(A, B, C + skew - skew.T, D, sign=-1)
    V = torch.ones(3, 4, dtype=torch.float64)
    torch.testing.assert_close(prepared.apply(V), expected.apply(V))


def test_a_difference_that_rounding_made_indefinite_is_clipped():
    """With C = A and D = B the difference is zero, and its denominators are set to 1."""
    A, B = positive(3, seed=1), positive(2, seed=2)
    V = torch.ones(2, 3, dtype=torch.float64)
    for factor in (1.0, 1.0 + 1e-9, 2.0):
        prepared = invert_kronecker_sum(A, B, factor * A, factor * B, sign=-1)
        assert prepared.denominators.min() >= 0
        assert torch.isfinite(prepared.apply(V)).all()
    exact = invert_kronecker_sum(A, B, 2 * A, 2 * B, sign=-1)
    assert torch.equal(exact.denominators, torch.ones(2, 3, dtype=torch.float64))
    expected = torch.linalg.solve(B, V) @ torch.linalg.inv(A)
    torch.testing.assert_close(exact.apply(V), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_stays(dtype):
    parts = [part.to(dtype) for part in case_of(4, 3, 2, 2, largest=0.5)]
    assert invert_kronecker_sum(*parts, sign=-1).apply(torch.ones(3, 4, dtype=dtype)).dtype == dtype


def test_what_has_no_root_or_is_not_finite_is_refused():
    A, B, C, D = case_of(3, 2, 3, 2, largest=0.5)
    with pytest.raises(InversionFailedError, match="Cholesky"):
        invert_kronecker_sum(-A, B, C, D, sign=-1)
    with pytest.raises(InversionFailedError, match="finite"):
        invert_kronecker_sum(A, B, C * float("nan"), D, sign=1)
