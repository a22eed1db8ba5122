"""The inverse of `A (x) B +/- C (x) D` (docs/algorithm.md#kronecker-sum; paper B)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kfac_dist.core.inverse.damped import InversionFailedError
from kfac_dist.core.products import two_sided
from kfac_dist.core.vector import all_finite, is_finite

_LOG = logging.getLogger(__name__)


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
    whitened_A, whitened_B = _whiten(A, C), _whiten(B, D)
    _check((whitened_A, whitened_B))
    K1, s1 = whitened_A.diagonalise()
    K2, s2 = whitened_B.diagonalise()
    if sign < 0:
        s1, s2 = s1.clamp(max=1), s2.clamp(max=1)
    denominators = 1 + sign * torch.outer(s2, s1)
    # The sum is singular where it is 0; 1 keeps the inverse finite.
    denominators.masked_fill_(denominators == 0, 1)
    return KroneckerSumInverse(K1=K1, K2=K2, denominators=denominators)


class _Whitened(NamedTuple):
    """`A = L L^T` and `L^{-1} C L^{-T}` [d, d]; `failed` is not 0 if A has no such root L."""

    root: Tensor
    matrix: Tensor
    failed: Tensor

    def diagonalise(self) -> tuple[Tensor, Tensor]:
        """Return K [d, d] and s [d] with `K^T A K = I` and `K^T C K = diag(s)`.

        The paper writes `A^{1/2}`, but any root of A will do: with `A = L L^T` and
        `L^{-1} C L^{-T} = E S E^T`, `K = L^{-T} E`. A Cholesky root costs a tenth of a symmetric
        one.
        """
        s, E = eigendecompose(self.matrix)
        return torch.linalg.solve_triangular(self.root.T, E, upper=True).contiguous(), s


def _whiten(A: Tensor, C: Tensor) -> _Whitened:
    root, failed = torch.linalg.cholesky_ex(A)
    half = torch.linalg.solve_triangular(root, C, upper=False)
    whitened = torch.linalg.solve_triangular(root, half.T, upper=False)
    return _Whitened(root, (whitened + whitened.T) / 2, failed)


def _check(pair: Sequence[_Whitened]) -> None:
    """Raise InversionFailedError unless both have a root and are finite, by one transfer."""
    usable: list[bool] = torch.stack(
        [
            ok
            for whitened in pair
            for ok in (whitened.failed == 0, torch.isfinite(whitened.matrix.sum()))
        ]
    ).tolist()
    for whitened, has_root, has_finite_sum in zip(pair, usable[::2], usable[1::2], strict=True):
        if not has_root:
            order = len(whitened.root)
            raise InversionFailedError(f"a matrix of order {order} has no Cholesky factor")
        if not has_finite_sum and not is_finite(whitened.matrix):
            raise InversionFailedError("the matrix has elements that are not finite")


def eigendecompose(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues [d], ascending, and eigenvectors [d, d] of a finite symmetric matrix.

    A GPU's routine fails on some matrices of low rank that the CPU's can decompose, and sometimes
    its context is lost then. So the CPU gets a copy that was made before.

    Raises:
        InversionFailedError: the iteration did not converge.
    """
    spare = matrix.cpu() if matrix.is_cuda else None
    try:
        values, vectors = torch.linalg.eigh(matrix)
        if spare is None or all_finite((values, vectors)):
            return values, vectors.contiguous()
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # nothing that another matrix or routine could change
    except RuntimeError as error:  # torch.linalg.LinAlgError, which has no type stub
        if spare is None:
            raise InversionFailedError(f"order {len(matrix)}: {error}") from error
    _LOG.warning("a GPU could not decompose a matrix of order %d; the CPU does it", len(matrix))
    assert spare is not None, "the CPU's routine returns finite numbers, or raises"
    values, vectors = eigendecompose(spare)
    return values.to(matrix.device), vectors.to(matrix.device)
