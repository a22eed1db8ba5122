"""Preconditioning: from gradients to directions (docs/algorithm.md#block-diagonal)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kfac_dist.core.blocks.block import LayerBlock
from kfac_dist.core.products import HasMatrices


class LayerInverse(HasMatrices, Protocol):
    """The inverse of one layer's curvature, in a form that multiplies gradients."""

    def apply(self, matrix: Tensor) -> Tensor:
        """Return the inverse times V [dim_G, dim_A], as a new matrix."""


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
    """Write each layer's matrix [dim_G, dim_A] into its part of `vector` [P], in place."""
    for block in blocks:
        block.write(matrices[block.name], vector)


def precondition_layers(
    matrices: Mapping[str, Tensor], inverses: Mapping[str, LayerInverse], gamma: float
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the direction of each layer [dim_G, dim_A], and the layers that fell back.

    A layer falls back to its gradient if it has no inverse, or if its inverse gives a direction
    that is not finite or does not descend. Its direction is then V / gamma^2, which is what the
    factored damping alone gives.
    """
    tried = {
        name: inverses[name].apply(matrix) if name in inverses else None
        for name, matrix in matrices.items()
    }
    products = _products(list(matrices.values()), list(tried.values()))
    directions, fallen = {}, []
    for (name, matrix), product in zip(matrices.items(), products, strict=True):
        direction = tried[name]
        # A zero gradient has a zero product and needs no fallback.
        if direction is None or not 0 <= product < float("inf"):
            direction = matrix / gamma**2
            fallen.append(name)
        directions[name] = direction
    return directions, tuple(fallen)


def _products(matrices: Sequence[Tensor], directions: Sequence[Tensor | None]) -> list[float]:
    """Return the product of each gradient and its direction, in one transfer to the host."""
    products = [
        matrix.new_zeros(()) if direction is None else (matrix * direction).sum()
        for matrix, direction in zip(matrices, directions, strict=True)
    ]
    numbers: list[float] = torch.stack(products).tolist()
    return numbers
