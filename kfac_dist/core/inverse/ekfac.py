"""EKFAC: K-FAC with corrected eigenvalues (docs/algorithm.md#ekfac; arXiv:1806.03884).

In K-FAC, the curvature is diagonal in the basis `Q_A (x) Q_G` of the factors' eigenvectors, with
the products of the eigenvalues on the diagonal. EKFAC keeps the basis and measures the diagonal,
as the second moments of the gradients of single cases. No other diagonal in this basis is nearer
to the exact block in the Frobenius norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfac_dist.core.factors import KroneckerPair, old_weight
from kfac_dist.core.inverse.damped import InversionFailedError, Inverted, PiNorm, damping_split
from kfac_dist.core.inverse.kronecker_sum import eigendecompose
from kfac_dist.core.products import two_sided


@dataclass(frozen=True, kw_only=True)
class EigenInverse:
    """The inverse of one layer's `(Q_A (x) Q_G) diag(moments + gamma^2) (Q_A (x) Q_G)^T`.

    `basis` has the eigenvectors Q_A [dim_A, dim_A] and Q_G [dim_G, dim_G] as columns; `moments`
    [dim_G, dim_A] is the running mean over cases of `(Q_G^T DW Q_A)^2`, DW the gradient of one
    case. `num_updates` counts the updates in it; K-FAC's own diagonal, the initial value, counts
    as one. gamma^2 is what the factored damping amounts to where the curvature is zero.
    """

    basis: KroneckerPair
    moments: Tensor
    num_updates: int
    gamma: float

    def apply(self, matrix: Tensor) -> Tensor:
        """Return `Q_G [(Q_G^T V Q_A) / (moments + gamma^2)] Q_A^T`."""
        Q_A, Q_G = self.basis.A, self.basis.G
        inner = two_sided(Q_G.T, matrix, Q_A)
        return two_sided(Q_G, inner / (self.moments + self.gamma**2), Q_A.T)

    def map_matrices(self, change: Callable[[Tensor], Tensor]) -> EigenInverse:
        """Return the inverse with `change` applied to the matrices of the basis."""
        return replace(self, basis=self.basis.map_matrices(change))

    def updated(self, sums: Tensor, num_cases: int, decay: float) -> EigenInverse:
        """Return the inverse with the moments of one step averaged in, weighted as factors are.

        `sums` [dim_G, dim_A] are over `num_cases` cases, in this basis.
        """
        num_updates = self.num_updates + 1
        keep = old_weight(num_updates, decay)
        moments = self.moments * keep + sums * ((1 - keep) / num_cases)
        return replace(self, moments=moments, num_updates=num_updates)

    def carrying(self, old: EigenInverse) -> EigenInverse:
        """Return the inverse with the moments of `old`, carried over to this basis.

        If the curvature is diagonal in the old basis, its diagonal in the new one is
        `(R_G . R_G) moments (R_A . R_A)^T` with `R = Q^T Q_old`; the sum of the moments stays.
        """
        R_A, R_G = self.basis.A.T @ old.basis.A, self.basis.G.T @ old.basis.G
        moments = R_G.square() @ old.moments @ R_A.square().T
        return replace(self, moments=moments, num_updates=old.num_updates)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, not copied; gamma is not among them."""
        return {
            "Q_A": self.basis.A,
            "Q_G": self.basis.G,
            "moments": self.moments,
            "num_updates": torch.tensor(self.num_updates),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], gamma: float) -> EigenInverse:
        """Return the inverse that has these tensors; they are kept, not copied."""
        return cls(
            basis=KroneckerPair(A=tensors["Q_A"], G=tensors["Q_G"]),
            moments=tensors["moments"],
            num_updates=int(tensors["num_updates"]),
            gamma=gamma,
        )


def eigen_inverse(
    pair: KroneckerPair, gamma: float, pi_norm: PiNorm = "trace"
) -> Inverted[EigenInverse]:
    """Return the inverse in the eigenbasis of a layer's factors, with K-FAC's moments.

    Its tensors do not depend on gamma, so one decomposition serves all candidates; see `at_gamma`.

    Raises:
        InversionFailedError: a factor is not finite, or has no eigendecomposition.
    """
    if not pair.is_finite():
        raise InversionFailedError("a factor has elements that are not finite")
    (values_A, Q_A, rungs_A), (values_G, Q_G, rungs_G) = map(_decompose, (pair.A, pair.G))
    inverse = EigenInverse(
        basis=KroneckerPair(A=Q_A, G=Q_G),
        moments=torch.outer(values_G, values_A),
        num_updates=1,
        gamma=gamma,
    )
    pi = damping_split(pair, pi_norm)
    return Inverted(inverse=inverse, pi=pi, gamma=gamma, rungs=rungs_A + rungs_G)


def _decompose(factor: Tensor) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Return eigenvalues, clamped at zero, eigenvectors, and the rungs that were climbed."""
    try:
        values, vectors = eigendecompose(factor)
        return values.clamp(min=0), vectors, ()
    except InversionFailedError:
        values, vectors = eigendecompose(factor.double())
        return values.clamp(min=0).to(factor.dtype), vectors.to(factor.dtype), ("float64",)


def at_gamma(inverted: Inverted[EigenInverse], gamma: float) -> Inverted[EigenInverse]:
    """Return the same inverse under another damping; all tensors are shared."""
    return replace(inverted, inverse=replace(inverted.inverse, gamma=gamma), gamma=gamma)
