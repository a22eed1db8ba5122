"""Products with the matrices of an inverse, in the dtype of these matrices.

An inverse can be applied with its matrices rounded to bfloat16. That only changes the direction a
little: step size and momentum are computed from the exact Fisher along it, or bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

_ROW_BYTES = 64  # a cache line


def two_sided(left: Tensor, matrix: Tensor, right: Tensor) -> Tensor:
    """Return `left V right` in the dtype of V, computed in the dtype of the two sides.

    A diagonal `right` is a vector. With sides in bfloat16, V and the intermediate product are
    rounded to bfloat16; sums are accumulated in float32.
    """
    product = aligned_product(left, matrix.to(left.dtype))
    both = product.mul_(right) if right.dim() == 1 else aligned_product(product, right)
    return both.to(matrix.dtype)


class HasMatrices(Protocol):
    """An inverse that is applied by multiplying with matrices."""

    def map_matrices(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy in which every matrix that it multiplies with is changed."""


T = TypeVar("T", bound=HasMatrices)


class RoundedCopies:
    """Copies in bfloat16 of the matrices of the inverses in use, each rounded only once."""

    def __init__(self) -> None:
        # The keys are ids of the originals. These are held too, so that no id can be reused.
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def round(self, inverses: Sequence[Mapping[str, T]]) -> list[dict[str, T]]:
        """Return the inverses with rounded matrices, and forget all copies but theirs."""
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
    """Return a new uninitialised matrix [rows, columns] whose rows begin at cache lines.

    It is a view of a wider one. Layers with a bias have odd orders such as 785, and a product that
    is written to rows of such a length takes a quarter to a half more time.
    """
    per_line = _ROW_BYTES // like.element_size()
    width = -(-columns // per_line) * per_line
    padded = like.new_empty((rows, width))
    # oneDNN's bfloat16 kernels for AMX multiply what lies behind a row of odd length by zero: a NaN
    # that happens to be there would spread.
    padded[:, columns:] = 0
    return padded[:, :columns]


def aligned_product(left: Tensor, right: Tensor) -> Tensor:
    """Return the product of two matrices, its rows aligned; autograd does not record it."""
    with torch.no_grad():
        return torch.mm(left, right, out=aligned_empty(left, left.shape[0], right.shape[1]))
