"""Applying the inverses to a gradient (algorithm.md section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kfac_dist.core.blocks.block import LayerBlock
from kfac_dist.core.factors import KroneckerPair
from kfac_dist.core.products import HasMatrices


class LayerInverse(HasMatrices, Protocol):
    """The inverse of one layer's curvature, prepared to be applied."""

    def apply(self, matrix: Tensor) -> Tensor:
        """Return the inverse times V [dim_G, dim_A], as a new matrix."""


def precondition(matrix: Tensor, inverse: KroneckerPair) -> Tensor:
    """Return `U = G^-1 V A^-1` for the gradient matrix V [dim_G, dim_A] of one layer."""
    return inverse.apply(matrix)


def direction(
    gradient: Tensor,
    blocks: Sequence[LayerBlock],
    inverses: Mapping[str, LayerInverse],
    gamma: float,
) -> tuple[Tensor, tuple[str, ...]]:
    """Return the preconditioned gradient [P] and the layers that fell back to the gradient.

    See `solve_layers` for when they do.
    """
    solved, fallen = solve_layers(matrices_of(gradient, blocks), inverses, gamma)
    return vector_of(solved, blocks, gradient), fallen


def matrices_of(vector: Tensor, blocks: Sequence[LayerBlock]) -> dict[str, Tensor]:
    """Return each layer's part of `vector` [P] as a matrix [dim_G, dim_A], by name."""
    return {block.name: block.matrix(vector) for block in blocks}


def vector_of(matrices: Mapping[str, Tensor], blocks: Sequence[LayerBlock], like: Tensor) -> Tensor:
    """Return the vector [P] whose parts are `matrices`."""
    vector = torch.empty_like(like)
    write_matrices(matrices, blocks, vector)
    return vector


def write_matrices(
    matrices: Mapping[str, Tensor], blocks: Sequence[LayerBlock], vector: Tensor
) -> None:
    """Write the parts of `vector` [P], in place."""
    for block in blocks:
        block.write(matrices[block.name], vector)


def solve_layers(
    matrices: Mapping[str, Tensor], inverses: Mapping[str, LayerInverse], gamma: float
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Apply each layer's inverse to its matrix [dim_G, dim_A].

    A layer falls back when it has no inverse, or when its inverse gives a direction that is not
    finite or does not descend. Then its curvature counts as zero: V / gamma^2, which is what the
    factored damping alone would do. The names of those layers are returned too.
    """
    tried = {
        name: inverses[name].apply(matrix) if name in inverses else None
        for name, matrix in matrices.items()
    }
    products = _products(list(matrices.values()), list(tried.values()))
    solved, fallen = {}, []
    for (name, matrix), product in zip(matrices.items(), products, strict=True):
        preconditioned = tried[name]
        # Zero is the product of a zero gradient, which any inverse may leave as it is.
        if preconditioned is None or not 0 <= product < float("inf"):
            preconditioned = matrix / gamma**2
            fallen.append(name)
        solved[name] = preconditioned
    return solved, tuple(fallen)


def _products(matrices: Sequence[Tensor], tried: Sequence[Tensor | None]) -> list[float]:
    """Return the products of gradients and directions, in one transfer to the host."""
    products = [
        matrix.new_zeros(()) if preconditioned is None else (matrix * preconditioned).sum()
        for matrix, preconditioned in zip(matrices, tried, strict=True)
    ]
    numbers: list[float] = torch.stack(products).tolist()
    return numbers
