"""Damped inverses of Kronecker factors (docs/algorithm.md#factored-damping; paper 6.3).

Factored Tikhonov damping replaces `A (x) G + gamma^2 I` by
`(A + pi gamma I) (x) (G + (gamma / pi) I)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from kfac_dist.core.factors import KroneckerPair, LayerFactors, UnitMoments
from kfac_dist.core.vector import is_finite

PiNorm = Literal["trace", "frobenius"]
T_co = TypeVar("T_co", covariant=True)

# A nearly empty factor would put all the damping on the other one, so pi is bounded, far outside
# the values that real layers have.
_PI_BOUNDS = (1e-6, 1e6)
NUM_RAISES = 6
RAISE_BY = 10.0


class InversionFailedError(ArithmeticError):
    """No rung of the ladder of numeric trouble gave a finite inverse."""


@dataclass(frozen=True, kw_only=True)
class Inverted(Generic[T_co]):
    """The inverse of one layer's curvature, and how it was damped.

    `rungs` names the rungs of the ladder of numeric trouble (docs/algorithm.md#ladder) that were
    climbed, in order; usually it is empty.
    """

    inverse: T_co
    pi: float
    gamma: float
    rungs: tuple[str, ...]


InvertedPair = Inverted[KroneckerPair]
"""`inverse.A` is `(A + pi gamma I)^-1` and `inverse.G` is `(G + gamma / pi I)^-1`."""


def invert_layer(
    factors: LayerFactors, gamma: float, pi_norm: PiNorm = "trace"
) -> Inverted[LayerFactors]:
    """Invert the curvature of a layer of any kind under damping of strength `gamma`.

    Raises:
        InversionFailedError: a factor is not finite, or no amount of damping helped.
    """
    if isinstance(factors, UnitMoments):
        # With one factor only, the damping is not split.
        inverse, rungs = _invert_factor(factors.M, gamma**2)
        return Inverted(inverse=UnitMoments(M=inverse), pi=1.0, gamma=gamma, rungs=rungs)
    return invert_pair(factors, gamma, pi_norm)


def redamp_layer(inverted: Inverted[LayerFactors], gamma: float) -> Inverted[LayerFactors]:
    """Return the inverse of a layer at a larger `gamma`, from the inverse alone; pi stays.

    Raises:
        ValueError: `gamma` is smaller.
    """
    inverse = inverted.inverse
    if isinstance(inverse, UnitMoments):
        _check_raised(inverted.gamma, gamma)
        shifted = _shift_inverse(inverse.M, gamma**2 - inverted.gamma**2)
        return replace(inverted, inverse=UnitMoments(M=shifted), gamma=gamma)
    own = InvertedPair(inverse=inverse, pi=inverted.pi, gamma=inverted.gamma, rungs=inverted.rungs)
    return redamp(own, gamma)


def damping_split(pair: KroneckerPair, norm: PiNorm) -> float:
    """Return pi, which splits the damping between A and G by their mean size.

    `trace`: pi^2 = (tr A / dim_A) / (tr G / dim_G); `frobenius`: the same with
    `||.||_F / sqrt(dim)`. It is 1 if a factor is zero, and bounded to [1e-6, 1e6].
    """
    size_A, size_G = (_mean_size(factor, norm) for factor in (pair.A, pair.G))
    if not (size_A > 0 and size_G > 0):
        return 1.0
    low, high = _PI_BOUNDS
    return min(max(math.sqrt(size_A / size_G), low), high)


def _mean_size(factor: Tensor, norm: PiNorm) -> float:
    if factor.dim() == 1:
        return float(factor.mean() if norm == "trace" else factor.square().mean().sqrt())
    if norm == "trace":
        return float(factor.diagonal().mean())
    return float(torch.linalg.matrix_norm(factor)) / math.sqrt(factor.shape[0])


def invert_pair(pair: KroneckerPair, gamma: float, pi_norm: PiNorm = "trace") -> InvertedPair:
    """Invert a layer's factors under the factored damping of strength `gamma`.

    Raises:
        InversionFailedError: a factor is not finite, or no amount of damping helped.
    """
    pi = damping_split(pair, pi_norm)
    inverse_A, rungs_A = _invert_factor(pair.A, pi * gamma)
    inverse_G, rungs_G = _invert_factor(pair.G, gamma / pi)
    return InvertedPair(
        inverse=KroneckerPair(A=inverse_A, G=inverse_G),
        pi=pi,
        gamma=gamma,
        rungs=rungs_A + rungs_G,
    )


def _invert_factor(factor: Tensor, damping: float) -> tuple[Tensor, tuple[str, ...]]:
    """Invert a factor: as it is, then in float64, then with more and more damping.

    A factor is a matrix [k, k], several [units, k, k], or the vector of a diagonal [k]. Returns
    the inverse and the rungs that were climbed.
    """
    if not is_finite(factor):
        raise InversionFailedError("the factor has elements that are not finite")
    attempt = _reciprocal if factor.dim() == 1 or factor.shape[-1] == 1 else _cholesky_inverse
    inverse = attempt(factor, damping)
    if inverse is not None:
        return inverse, ()
    rungs = ["float64"]
    wide = factor.double()
    for _ in range(NUM_RAISES + 1):
        inverse = attempt(wide, damping)
        if inverse is not None and is_finite(inverse.to(factor.dtype)):
            return inverse.to(factor.dtype), tuple(rungs)
        damping = max(damping * RAISE_BY, torch.finfo(factor.dtype).tiny)
        rungs.append("raised_damping")
    raise InversionFailedError(
        f"a factor of order {factor.shape[-1]} is not positive up to a damping of {damping:g}"
    )


def _reciprocal(factor: Tensor, damping: float) -> Tensor | None:
    damped = factor + damping
    return damped.reciprocal() if bool((damped > 0).all()) else None


def _cholesky_inverse(factor: Tensor, damping: float) -> Tensor | None:
    damped = factor.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping)
    root, failed = torch.linalg.cholesky_ex(damped)
    if failed.any():
        return None
    # Stored by rows, as after a transfer between processes: BLAS rounds the layouts differently.
    inverse = torch.cholesky_inverse(root).contiguous()
    inverse = (inverse + inverse.mT) / 2
    return inverse if is_finite(inverse) else None


def redamp(inverted: InvertedPair, gamma: float) -> InvertedPair:
    """Return the inverses at a larger `gamma`, from the inverses alone.

    With P = (M + a I)^-1, `(M + b I)^-1 = (I + (b - a) P)^-1 P`; pi stays.
    """
    _check_raised(inverted.gamma, gamma)
    extra = gamma - inverted.gamma
    inverse = KroneckerPair(
        A=_shift_inverse(inverted.inverse.A, inverted.pi * extra),
        G=_shift_inverse(inverted.inverse.G, extra / inverted.pi),
    )
    return InvertedPair(inverse=inverse, pi=inverted.pi, gamma=gamma, rungs=inverted.rungs)


def _check_raised(old: float, new: float) -> None:
    if new < old:
        raise ValueError(f"gamma can only be raised from {old:g}; got {new:g}")


def _shift_inverse(inverse: Tensor, shift: float) -> Tensor:
    if inverse.dim() == 1 or inverse.shape[-1] == 1:
        return inverse / (1 + shift * inverse)
    system = shift * inverse
    system.diagonal(dim1=-2, dim2=-1).add_(1.0)
    shifted: Tensor = torch.linalg.solve(system, inverse)
    return (shifted + shifted.mT) / 2
