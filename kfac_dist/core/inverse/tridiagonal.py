"""The block-tridiagonal inverse (docs/algorithm.md#block-tridiagonal; paper 4.3).

`Fhat^{-1} = Xi^T Lambda Xi`. Lambda is block-diagonal with the blocks `Sigma_{i|i+1}^{-1}`. Xi is
the identity with `-Psi_{i,i+1} = -PsiA_{i-1,i} (x) PsiG_{i,i+1}` on the first superdiagonal. Each
layer's part of the two comes from one snapshot of the factors of that layer and the next, and is
positive on its own. So the parts of two layers may come from different steps without making the
product indefinite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_dist.core.factors import (
    KroneckerPair,
    LayerFactors,
    LayerSnapshot,
    Link,
    factors_from_tensors,
)
from kfac_dist.core.inverse.damped import (
    NUM_RAISES,
    RAISE_BY,
    InversionFailedError,
    Inverted,
    PiNorm,
    damping_split,
    invert_layer,
    redamp_layer,
)
from kfac_dist.core.inverse.kronecker_sum import KroneckerSumInverse, invert_kronecker_sum
from kfac_dist.core.inverse.precondition import precondition_layers
from kfac_dist.core.products import two_sided
from kfac_dist.core.vector import all_finite


@dataclass(frozen=True, kw_only=True)
class ChainInverse:
    """One layer's part of the inverse.

    `conditional` applies `Sigma_{i|i+1}^{-1}`. `psi` has PsiA_{i-1,i} [dim_A, next dim_A] and
    PsiG_{i,i+1} [dim_G, next dim_G]; it is None for a layer that is not linked with a next one.
    """

    conditional: LayerFactors | KroneckerSumInverse
    psi: KroneckerPair | None

    def apply(self, matrix: Tensor) -> Tensor:
        """Return `Sigma_{i|i+1}^{-1}` times V [dim_G, dim_A]."""
        return self.conditional.apply(matrix)

    def map_matrices(self, change: Callable[[Tensor], Tensor]) -> ChainInverse:
        """Return the part with `change` applied to the matrices of `conditional` and `psi`."""
        psi = None if self.psi is None else self.psi.map_matrices(change)
        return ChainInverse(conditional=self.conditional.map_matrices(change), psi=psi)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, not copied: factors, or K1, K2, denominators and psi."""
        if not isinstance(self.conditional, KroneckerSumInverse):
            return self.conditional.tensors()
        assert self.psi is not None, "only a linked layer has a sum to invert"
        return {
            "K1": self.conditional.K1,
            "K2": self.conditional.K2,
            "denominators": self.conditional.denominators,
            "psi_A": self.psi.A,
            "psi_G": self.psi.G,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> ChainInverse:
        """Return the part that has these tensors; they are kept, not copied."""
        if "K1" not in tensors:
            return cls(conditional=factors_from_tensors(tensors), psi=None)
        return cls(
            conditional=KroneckerSumInverse(
                K1=tensors["K1"], K2=tensors["K2"], denominators=tensors["denominators"]
            ),
            psi=KroneckerPair(A=tensors["psi_A"], G=tensors["psi_G"]),
        )


def invert_conditional(
    snapshot: LayerSnapshot, gamma: float, pi_norm: PiNorm = "trace"
) -> Inverted[ChainInverse]:
    """Return one layer's part under the factored damping of strength `gamma`.

    Every diagonal factor is damped with its own layer's pi, in Psi and Sigma too; cross factors
    are not damped. Candidates for gamma cannot share a decomposition, since what is diagonalised
    is already damped.

    Raises:
        InversionFailedError: a factor is not finite, or no amount of damping helped.
    """
    pair = snapshot.pair
    if snapshot.next_pair is None or snapshot.cross is None:
        own = invert_layer(pair, gamma, pi_norm)
        last = ChainInverse(conditional=own.inverse, psi=None)
        return Inverted(inverse=last, pi=own.pi, gamma=gamma, rungs=own.rungs)
    assert isinstance(pair, KroneckerPair), "only layers with two factors are linked"
    linked = _Linked(pair, snapshot.next_pair, snapshot.cross)
    if not all_finite(tensor for factors in linked for tensor in factors.tensors().values()):
        raise InversionFailedError("a factor has elements that are not finite")
    inverse, rungs = _climb(linked, gamma, pi_norm)
    return Inverted(
        inverse=inverse, pi=damping_split(linked.own, pi_norm), gamma=gamma, rungs=rungs
    )


class _Linked(NamedTuple):
    """Factors of a layer, of the next one, and the cross factors between them."""

    own: KroneckerPair
    following: KroneckerPair
    cross: KroneckerPair


def _climb(linked: _Linked, gamma: float, pi_norm: PiNorm) -> tuple[ChainInverse, tuple[str, ...]]:
    """Make the part: as it is, then in float64, then with more and more damping."""
    dtype = linked.own.A.dtype
    rungs: list[str] = []
    for _ in range(NUM_RAISES + 2):
        try:
            return _attempt(linked, gamma, pi_norm, dtype), tuple(rungs)
        except InversionFailedError:
            if rungs:
                gamma = max(gamma * RAISE_BY, torch.finfo(dtype).tiny)
            rungs.append("raised_damping" if rungs else "float64")
            linked = _Linked(*(KroneckerPair(A=p.A.double(), G=p.G.double()) for p in linked))
    raise InversionFailedError(f"no conditional inverse up to a damping of {gamma:g}")


def _attempt(linked: _Linked, gamma: float, pi_norm: PiNorm, dtype: torch.dtype) -> ChainInverse:
    own, following = (_damped(pair, gamma, pi_norm) for pair in (linked.own, linked.following))
    cross = linked.cross
    psi = _times_inverses(cross, following)
    conditional = invert_kronecker_sum(
        # PsiA A_{i,i} PsiA^T = PsiA A_{i-1,i}^T, since PsiA = A_{i-1,i} A_{i,i}^{-1}.
        own.A,
        own.G,
        psi.A @ cross.A.T,
        psi.G @ cross.G.T,
        sign=-1,
    )
    tensors = ChainInverse(conditional=conditional, psi=psi).tensors()
    tensors = {name: value.to(dtype) for name, value in tensors.items()}
    if not all_finite(tensors.values()):
        raise InversionFailedError("the inverse has elements that are not finite")
    return ChainInverse.from_tensors(tensors)


def _damped(pair: KroneckerPair, gamma: float, pi_norm: PiNorm) -> KroneckerPair:
    pi = damping_split(pair, pi_norm)
    damped = KroneckerPair(A=pair.A.clone(), G=pair.G.clone())
    damped.A.diagonal().add_(pi * gamma)
    damped.G.diagonal().add_(gamma / pi)
    return damped


def _times_inverses(matrices: KroneckerPair, factors: KroneckerPair) -> KroneckerPair:
    """Return `matrix factor^{-1}` for A and for G, contiguous."""
    (root_A, failed_A), (root_G, failed_G) = map(torch.linalg.cholesky_ex, (factors.A, factors.G))
    failed: list[int] = torch.stack((failed_A, failed_G)).tolist()
    for factor, info in zip((factors.A, factors.G), failed, strict=True):
        if info:
            raise InversionFailedError(f"a factor of order {len(factor)} has no Cholesky factor")
    return KroneckerPair(
        A=torch.cholesky_solve(matrices.A.T, root_A).T.contiguous(),
        G=torch.cholesky_solve(matrices.G.T, root_G).T.contiguous(),
    )


def redamp_conditional(inverted: Inverted[ChainInverse], gamma: float) -> Inverted[ChainInverse]:
    """Return a layer's part at a larger `gamma`, from the part alone.

    The conditional covariance cannot be damped again without the factors. But `K1 K1^T` and
    `K2 K2^T` are the inverses of the layer's own damped factors, so the layer becomes
    block-diagonal: it is no longer linked with the next.
    """
    conditional = inverted.inverse.conditional
    if isinstance(conditional, KroneckerSumInverse):
        K1, K2 = conditional.K1, conditional.K2
        conditional = KroneckerPair(A=K1 @ K1.T, G=K2 @ K2.T)
    own = Inverted[LayerFactors](
        inverse=conditional, pi=inverted.pi, gamma=inverted.gamma, rungs=inverted.rungs
    )
    heavier = redamp_layer(own, gamma)
    return Inverted(
        inverse=ChainInverse(conditional=heavier.inverse, psi=None),
        pi=heavier.pi,
        gamma=gamma,
        rungs=heavier.rungs,
    )


def precondition_chain(
    matrices: Mapping[str, Tensor],
    inverses: Mapping[str, ChainInverse],
    links: Iterable[Link],
    gamma: float,
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the direction of each layer [dim_G, dim_A], and the layers that fell back.

    `Fhat^{-1}` is applied to the gradients V_i [dim_G, dim_A] of all layers in three passes:

    (1) `V1_i = V_i - PsiG_{i,i+1} V_{i+1} PsiA_{i-1,i}^T`, all from the original V;
    (2) `V2_i = Sigma_{i|i+1}^{-1} V1_i`;
    (3) `V3_i = V2_i - PsiG_{i-1,i}^T V2_{i-1} PsiA_{i-2,i-1}`, from V2.

    The product of gradient and direction is the sum of `V1_i . V2_i`. Each of these must be
    positive, so a layer for which it is not falls back in (2), by `precondition_layers`. A layer
    without an inverse is treated as not linked with the next.
    """
    psis = [
        (link, psi)
        for link in links
        if link.name in inverses and (psi := inverses[link.name].psi) is not None
    ]
    first = dict(matrices)
    for (name, next_name), psi in psis:
        first[name] = matrices[name] - two_sided(psi.G, matrices[next_name], psi.A.T)
    second, fallen = precondition_layers(first, inverses, gamma)
    third = dict(second)
    for (name, next_name), psi in psis:
        third[next_name] = second[next_name] - two_sided(psi.G.T, second[name], psi.A)
    return third, fallen
