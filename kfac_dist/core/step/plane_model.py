"""The quadratic model on a plane (docs/algorithm.md#step-size-and-momentum; paper 6.4 and 7).

With Delta the negative direction and delta_0 the previous update, an update is
`delta = alpha Delta + mu delta_0`. On the plane of the two vectors, the quadratic model

    M(delta) - M(0) = grad.delta + 1/2 delta^T (F + (damping + l2) I) delta

is a quadratic in (alpha, mu), with F the exact Fisher on the current batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from kfac_dist.core.step.block_numbers import DirectionNumbers

# Below this relative determinant the two vectors are parallel to working precision.
_PARALLEL = 1e-12


@dataclass(frozen=True, kw_only=True)
class PlaneModel:
    """The quadratic model on the plane of Delta (index 0) and delta_0 (index 1).

    `slopes` are the products with the gradient, `squares` the plain inner products (00, 01, 11),
    `fisher` the products through F (00, 01, 11), means over cases.
    """

    slopes: tuple[float, float]
    squares: tuple[float, float, float]
    fisher: tuple[float, float, float]

    def curvature(self, ridge: float) -> tuple[float, float, float]:
        """Return the products through `F + ridge I` (00, 01, 11)."""
        q00, q01, q11 = (f + ridge * s for f, s in zip(self.fisher, self.squares, strict=True))
        return q00, q01, q11

    def minimum(self, ridge: float) -> tuple[float, float]:
        """Return (alpha, mu) at the minimum of the model, `ridge` = damping + l2.

        mu is 0 if there is no previous update or if it is parallel to Delta; both are 0 if the
        gradient vanishes.
        """
        q00, q01, q11 = self.curvature(ridge)
        b0, b1 = self.slopes
        if q00 <= 0:
            return 0.0, 0.0
        determinant = q00 * q11 - q01 * q01
        if determinant <= _PARALLEL * q00 * q11:
            return -b0 / q00, 0.0
        return (q01 * b1 - q11 * b0) / determinant, (q01 * b0 - q00 * b1) / determinant

    def change(self, alpha: float, mu: float, ridge: float) -> float:
        """Return M(delta) - M(0)."""
        return (
            alpha * self.slopes[0]
            + mu * self.slopes[1]
            + _form(self.curvature(ridge), alpha, mu) / 2
        )

    def square_norm(self, alpha: float, mu: float) -> float:
        """Return ||delta||^2."""
        # Rounding can make the square of two vectors that cancel slightly negative.
        return max(_form(self.squares, alpha, mu), 0.0)

    def is_finite(self) -> bool:
        """Return whether all numbers are finite."""
        return all(map(math.isfinite, (*self.slopes, *self.squares, *self.fisher)))


def _form(matrix: tuple[float, float, float], x: float, y: float) -> float:
    return matrix[0] * x * x + 2 * matrix[1] * x * y + matrix[2] * y * y


def plane_models(numbers: DirectionNumbers, gram: Tensor | None) -> list[PlaneModel]:
    """Return the model on the plane of each direction and the previous update.

    `gram` [C + 1, C + 1] holds the Fisher products of the C directions and, last, the previous
    update, means over cases. If it is None, the Fisher products of the models are 0.
    """
    size = len(numbers.directions) + 1
    products = [[0.0] * size] * size if gram is None else gram.tolist()
    # Delta is minus the direction, hence the signs.
    return [
        PlaneModel(
            slopes=(-with_gradient, numbers.gradient_previous),
            squares=(square, -with_previous, numbers.previous_previous),
            fisher=(products[c][c], -products[c][-1], products[-1][-1]),
        )
        for c, (with_gradient, square, with_previous) in enumerate(numbers.directions)
    ]
