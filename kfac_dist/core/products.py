"""Products with the matrices of an inverse, in the type that those have.

An inverse can be applied with its matrices rounded to bfloat16. The direction is only a direction:
step size and momentum are computed from the exact Fisher along it, or bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

_ROW_BYTES = 64  # a cache line


def two_sided(left: Tensor, matrix: Tensor, right: Tensor) -> Tensor:
    """Return `left V right` in the type of V, computed in the type of the two sides.

    A diagonal `right` is a vector. With sides in bfloat16, V and the product that is between are
    rounded to it; sums are accumulated in float32.
    """
    product = aligned_product(left, matrix.to(left.dtype))
    both = product.mul_(right) if right.dim() == 1 else aligned_product(product, right)
    return both.to(matrix.dtype)


class HasMatrices(Protocol):
    """Something that multiplies by matrices."""

    def map_matrices(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return it with every matrix that it multiplies by changed."""


T = TypeVar("T", bound=HasMatrices)


class RoundedCopies:
    """The matrices of the inverses in use in bfloat16, each rounded once."""

    def __init__(self) -> None:
        # By the identity of the original, which is held so that no other tensor can take its place.
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, inverses: Sequence[Mapping[str, T]]) -> list[dict[str, T]]:
        """Return the inverses with rounded matrices; copies of all others are forgotten."""
        kept: dict[int, tuple[Tensor, Tensor]] = {}

        def rounded(matrix: Tensor) -> Tensor:
            if id(matrix) not in kept:
                known = self._copies.get(id(matrix))
                kept[id(matrix)] = known or (matrix, matrix.to(torch.bfloat16))
            return kept[id(matrix)][1]

        copies = [
            {name: inverse.map_matrices(rounded) for name, inverse in by_layer.items()}
            for by_layer in inverses
        ]
        self._copies = kept
        return copies


def aligned_empty(like: Tensor, rows: int, columns: int) -> Tensor:
    """Return a new matrix [rows, columns], of any content, whose rows begin at cache lines.

    A view of a wider one. Layers with a bias have odd orders such as 785; a product that is
    written to rows of such a length takes a quarter to a half more time.
    """
    per_line = _ROW_BYTES // like.element_size()
    width = -(-columns // per_line) * per_line
    padded = like.new_empty((rows, width))
    # oneDNN's bfloat16 kernels for AMX multiply what lies behind a row of odd length by zero: a NaN
    # that happens to be there would spread.
    padded[:, columns:] = 0
    return padded[:, :columns]


def aligned_product(left: Tensor, right: Tensor) -> Tensor:
    """Return the product of two matrices, its rows aligned; no gradient goes through it."""
    with torch.no_grad():
        return torch.mm(left, right, out=aligned_empty(left, left.shape[0], right.shape[1]))
