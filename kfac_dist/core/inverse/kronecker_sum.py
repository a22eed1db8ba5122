"""The inverse of `A (x) B +/- C (x) D` (docs/algorithm.md#kronecker-sum; paper B)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kfac_dist.core.inverse.damped import InversionFailedError
from kfac_dist.core.products import two_sided
from kfac_dist.core.vector import is_finite


@dataclass(frozen=True, kw_only=True)
class KroneckerSumInverse:
    """An inverse that can be applied to any number of matrices V [dim_B, dim_A].

    `K1` [dim_A, dim_A] and `K2` [dim_B, dim_B] turn both terms into diagonal matrices at once,
    `K1^T A K1 = I` and `K1^T C K1 = diag(s1)`, so that `K1 K1^T` is the inverse of A alone.
    `denominators` [dim_B, dim_A] are `1 1^T +/- s2 s1^T`.
    """

    K1: Tensor
    K2: Tensor
    denominators: Tensor

    def apply(self, matrix: Tensor) -> Tensor:
        """Return `K2 [(K2^T V K1) / (1 1^T +/- s2 s1^T)] K1^T`."""
        inner = two_sided(self.K2.T, matrix, self.K1)
        return two_sided(self.K2, inner / self.denominators, self.K1.T)

    def map_matrices(self, change: Callable[[Tensor], Tensor]) -> KroneckerSumInverse:
        """Return the inverse with `change` applied to K1 and K2."""
        return replace(self, K1=change(self.K1), K2=change(self.K2))


def invert_kronecker_sum(
    A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, sign: Literal[1, -1]
) -> KroneckerSumInverse:
    """Return the inverse of `A (x) B + sign C (x) D`.

    A and B must be positive definite; only their lower triangles are read. C and D must be
    positive semi-definite, of any rank; they are symmetrised. For a difference, s1 and s2 are
    clipped to at most 1, which they exceed only by rounding if it comes from a chain of layers.

    Raises:
        InversionFailedError: A or B has no Cholesky factor, or a number is not finite.
    """
    K1, s1 = _diagonalise(A, C)
    K2, s2 = _diagonalise(B, D)
    if sign < 0:
        s1, s2 = s1.clamp(max=1), s2.clamp(max=1)
    denominators = 1 + sign * torch.outer(s2, s1)
    denominators[denominators == 0] = 1  # the sum is singular there; 1 keeps the inverse finite
    return KroneckerSumInverse(K1=K1, K2=K2, denominators=denominators)


def _diagonalise(A: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Return K [d, d] and s [d] with `K^T A K = I` and `K^T C K = diag(s)`.

    The paper writes `A^{1/2}`, but any root of A will do: with `A = L L^T` and
    `L^{-1} C L^{-T} = E S E^T`, `K = L^{-T} E`. A Cholesky root costs a tenth of a symmetric one.
    """
    root, failed = torch.linalg.cholesky_ex(A)
    if failed:
        raise InversionFailedError(f"a matrix of order {len(A)} has no Cholesky factor")
    half = torch.linalg.solve_triangular(root, C, upper=False)
    whitened = torch.linalg.solve_triangular(root, half.T, upper=False)
    s, E = eigendecompose((whitened + whitened.T) / 2)
    return torch.linalg.solve_triangular(root.T, E, upper=True).contiguous(), s


def eigendecompose(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues [d], ascending, and eigenvectors [d, d] of a symmetric matrix.

    Raises:
        InversionFailedError: a number is not finite, or the iteration did not converge.
    """
    if not is_finite(matrix):
        raise InversionFailedError("the matrix has elements that are not finite")
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except RuntimeError as error:  # torch.linalg.LinAlgError, which has no type stub
        raise InversionFailedError(f"order {len(matrix)}: {error}") from error
    return values, vectors.contiguous()
