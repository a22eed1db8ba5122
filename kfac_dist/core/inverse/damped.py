"""Damped inverses of Kronecker factors (docs/algorithm.md#factored-damping; paper 6.3).

Factored Tikhonov damping replaces `A (x) G + gamma^2 I` by
`(A + pi gamma I) (x) (G + (gamma / pi) I)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from kfac_dist.core.factors import KroneckerPair, LayerFactors, UnitMoments
from kfac_dist.core.vector import all_finite, is_finite

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
        _check_finite([factors.M])
        ((inverse, rungs),) = _invert_factors([factors.M], [gamma**2])
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
    sizes = torch.stack([_size(factor, norm) for factor in (pair.A, pair.G)]).tolist()
    return _pi(pair, norm, sizes)


def _pi(pair: KroneckerPair, norm: PiNorm, sizes: Sequence[float]) -> float:
    size_A, size_G = sizes
    if norm == "frobenius":
        size_A, size_G = (
            size if factor.dim() == 1 else size / math.sqrt(factor.shape[0])
            for size, factor in ((size_A, pair.A), (size_G, pair.G))
        )
    if not (size_A > 0 and size_G > 0):
        return 1.0
    low, high = _PI_BOUNDS
    return min(max(math.sqrt(size_A / size_G), low), high)


def _size(factor: Tensor, norm: PiNorm) -> Tensor:
    """Return the mean of the diagonal, or the Frobenius norm; of a diagonal its mean square root.

    Its shape is [], on the device of the factor.
    """
    if factor.dim() == 1:
        return factor.mean() if norm == "trace" else factor.square().mean().sqrt()
    if norm == "trace":
        return factor.diagonal().mean()
    size: Tensor = torch.linalg.matrix_norm(factor)
    return size


def invert_pair(pair: KroneckerPair, gamma: float, pi_norm: PiNorm = "trace") -> InvertedPair:
    """Invert a layer's factors under the factored damping of strength `gamma`.

    Numbers leave the device twice, for both factors together: sizes, then what was inverted.

    Raises:
        InversionFailedError: a factor is not finite, or no amount of damping helped.
    """
    factors = (pair.A, pair.G)
    sizes = [_size(factor, pi_norm) for factor in factors]
    numbers = torch.stack([*sizes, *(factor.sum() for factor in factors)]).tolist()
    if not all(map(math.isfinite, numbers[2:])):  # a finite sum has finite terms
        _check_finite(factors)
    pi = _pi(pair, pi_norm, numbers[:2])
    (inverse_A, rungs_A), (inverse_G, rungs_G) = _invert_factors(factors, (pi * gamma, gamma / pi))
    return InvertedPair(
        inverse=KroneckerPair(A=inverse_A, G=inverse_G),
        pi=pi,
        gamma=gamma,
        rungs=rungs_A + rungs_G,
    )


def _check_finite(factors: Sequence[Tensor]) -> None:
    if not all_finite(factors):
        raise InversionFailedError("the factor has elements that are not finite")


_Climbed = tuple[Tensor, tuple[str, ...]]
"""An inverse, and the rungs of the ladder that were climbed for it."""


def _invert_factors(factors: Sequence[Tensor], dampings: Sequence[float]) -> list[_Climbed]:
    """Invert finite factors, each with its damping.

    A factor is a matrix [k, k], several [units, k, k], or the vector of a diagonal [k]. One
    transfer to the host says which of them could be inverted as they are; the others climb.
    """
    attempts = [
        _try_to_invert(factor, damping) for factor, damping in zip(factors, dampings, strict=True)
    ]
    passed: list[bool] = torch.stack([attempt.passed for attempt in attempts]).tolist()
    return [
        (attempt.inverse, ()) if is_inverted else _climb(factor, damping)
        for attempt, is_inverted, factor, damping in zip(
            attempts, passed, factors, dampings, strict=True
        )
    ]


def _climb(factor: Tensor, damping: float) -> _Climbed:
    """Invert a factor: as it is, then in float64, then with more and more damping.

    The CPU does this, whose routines are the most robust; the inverse goes back to the device.
    """
    host = factor.cpu()
    inverse = _inverse_if_passed(host, damping)
    if inverse is not None:
        # Its elements are finite and only their sum is not, or only the GPU's routine has failed.
        return inverse.to(factor.device), ()
    rungs = ["float64"]
    wide = host.double()
    for _ in range(NUM_RAISES + 1):
        inverse = _inverse_if_passed(wide, damping)
        if inverse is not None and is_finite(inverse.to(factor.dtype)):
            return inverse.to(factor), tuple(rungs)
        damping = max(damping * RAISE_BY, torch.finfo(factor.dtype).tiny)
        rungs.append("raised_damping")
    raise InversionFailedError(
        f"a factor of order {factor.shape[-1]} is not positive up to a damping of {damping:g}"
    )


class _Tried(NamedTuple):
    """What may be an inverse, and whether it is one.

    `passed` (bool, shape []) is True only for an inverse with a finite sum; `is_positive` (bool,
    shape []) says whether the damped factor was positive. Both are on the device.
    """

    inverse: Tensor
    passed: Tensor
    is_positive: Tensor


def _try_to_invert(factor: Tensor, damping: float) -> _Tried:
    """Try to invert a damped factor, without a transfer to the host."""
    if factor.dim() == 1 or factor.shape[-1] == 1:
        damped = factor + damping
        is_positive = (damped > 0).all()
        return _Tried(damped.reciprocal(), is_positive, is_positive)
    damped = factor.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping)
    root, failed = torch.linalg.cholesky_ex(damped)
    inverse = _inverse_of_root(root, failed == 0)
    inverse = (inverse + inverse.mT) / 2
    is_positive = (failed == 0).all()
    return _Tried(inverse, is_positive & torch.isfinite(inverse.sum()), is_positive)


def _inverse_of_root(root: Tensor, is_root: Tensor) -> Tensor:
    """Return the inverse of each matrix with a Cholesky `root`, and of others the identity."""
    identity = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
    # An incomplete root may have zeros on its diagonal, at which torch raises.
    root = torch.where(is_root[..., None, None], root, identity)
    # On a GPU cholesky_inverse is this solve, and a transfer to the host that tests the diagonal.
    inverse = (
        torch.cholesky_solve(identity.expand(root.shape), root)
        if root.is_cuda
        else torch.cholesky_inverse(root)
    )
    # Stored by rows, as after a transfer between processes: BLAS rounds the layouts differently.
    return inverse.contiguous()


def _inverse_if_passed(factor: Tensor, damping: float) -> Tensor | None:
    attempt = _try_to_invert(factor, damping)
    is_inverse = bool(attempt.passed) or (bool(attempt.is_positive) and is_finite(attempt.inverse))
    return attempt.inverse if is_inverse else None


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
    shifted: Tensor = torch.linalg.solve_ex(system, inverse).result  # never singular
    return (shifted + shifted.mT) / 2
