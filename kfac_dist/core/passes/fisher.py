"""Products through the exact Fisher, how noisy they are, and on how many cases to compute them.

A mean of n products has a relative variance of `noise / n`, where `noise` is the relative variance
of the product of a single case. A step size from a curvature with relative error e loses about
e^2 of the decrease that the quadratic model promises.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

_FRACTIONS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
# The relative error that a curvature may have: it costs about 2 % of the decrease.
_TOLERANCE = 0.15
# On fewer cases of the gradient's own batch, the quadratic model fits the noise of the gradient.
# The reduction ratio does not show that, and the damping collapses.
_MIN_CASES = 100


@dataclass(frozen=True, kw_only=True)
class FisherSums:
    """Sums over cases n of `p_n(u, v) = (B^T J_n u) . (B^T J_n v)` for m vectors, float64.

    `gram` [m, m] has the sums of `p_n(u, v)` for all pairs, `squares` [m] those of `p_n(v, v)^2`.
    """

    gram: Tensor
    squares: Tensor

    @classmethod
    def from_roots(cls, roots: Tensor) -> FisherSums:
        """Return the sums from `B^T J_n v` [m, N, ...] of m vectors and N cases."""
        by_case = roots.reshape(*roots.shape[:2], -1).double()
        flat = by_case.reshape(len(roots), -1)
        squares = torch.linalg.vector_norm(by_case, dim=2).pow(4).sum(dim=1)
        return cls(gram=flat @ flat.T, squares=squares)

    @classmethod
    def zero(cls, num_vectors: int, like: Tensor) -> FisherSums:
        """Return the sums over an empty set of cases, on the device of `like`."""
        return cls.unpacked(like.new_zeros((num_vectors + 1, num_vectors), dtype=torch.float64))

    def packed(self) -> Tensor:
        """Return all sums as one new matrix [m + 1, m]."""
        return torch.cat([self.gram, self.squares.unsqueeze(0)])

    @classmethod
    def unpacked(cls, sums: Tensor) -> FisherSums:
        """Return the sums that `packed` has packed."""
        return cls(gram=sums[:-1], squares=sums[-1])

    def mean(self, num_cases: int) -> FisherMeans:
        """Return the means over the cases."""
        return FisherMeans(gram=self.gram / num_cases, squares=self.squares / num_cases)


@dataclass(frozen=True, kw_only=True)
class FisherMeans:
    """`FisherSums` divided by the number of cases."""

    gram: Tensor
    squares: Tensor

    def noise(self, number: int) -> float:
        """Return the relative variance over the cases of `p_n(v, v)`, for v the vector `number`.

        It is infinite if the mean is not positive, or if it is not a number.
        """
        mean, square = torch.stack((self.gram[number, number], self.squares[number])).tolist()
        noise = square / mean**2 - 1 if mean > 0 else math.inf
        return max(noise, 0.0) if math.isfinite(noise) else math.inf


def fisher_fraction(setting: float | Literal["auto"], noise: float, num_cases: int) -> float:
    """Return the fraction of a batch of `num_cases` on which a step computes its products.

    `auto` is the smallest of 1/32, 1/16, 1/8, 1/4, 1/2 and 1 that has at least a hundred cases and
    keeps the relative error of the curvature below 0.15, judged by the `noise` of the last step.
    """
    if setting != "auto":
        return setting
    needed = max(_MIN_CASES, noise / _TOLERANCE**2)
    return next((fraction for fraction in _FRACTIONS if fraction * num_cases >= needed), 1.0)
