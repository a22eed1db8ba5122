"""Applying the inverses to a gradient (algorithm.md section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kfac_dist.core.factors import KroneckerPair
from kfac_dist.core.layers import LayerBlock


def precondition(matrix: Tensor, inverse: KroneckerPair) -> Tensor:
    """Return `U = G^-1 V A^-1` for the gradient matrix V [dim_G, dim_A] of one layer."""
    return inverse.G @ matrix @ inverse.A


def direction(
    gradient: Tensor,
    blocks: Sequence[LayerBlock],
    inverses: Mapping[str, KroneckerPair],
    gamma: float,
) -> tuple[Tensor, tuple[str, ...]]:
    """Return the preconditioned gradient [P] and the layers that fell back to the gradient.

    A layer falls back when it has no inverse, or when its inverse gives a direction that is not
    finite or does not descend. Then its curvature counts as zero: V / gamma^2, which is what the
    factored damping alone would do.
    """
    matrices = [block.matrix(gradient) for block in blocks]
    tried = [
        precondition(matrix, inverses[block.name]) if block.name in inverses else None
        for block, matrix in zip(blocks, matrices, strict=True)
    ]
    products = _products(matrices, tried)
    result = torch.empty_like(gradient)
    fallen = []
    for block, matrix, preconditioned, product in zip(
        blocks, matrices, tried, products, strict=True
    ):
        # Zero is the product of a zero gradient, which any inverse may leave as it is.
        if preconditioned is None or not 0 <= product < float("inf"):
            preconditioned = matrix / gamma**2
            fallen.append(block.name)
        block.write(preconditioned, result)
    return result, tuple(fallen)


def _products(matrices: Sequence[Tensor], tried: Sequence[Tensor | None]) -> list[float]:
    """Return the products of gradients and directions, in one transfer to the host."""
    products = [
        matrix.new_zeros(())
        if preconditioned is None
        else torch.dot(matrix.reshape(-1), preconditioned.reshape(-1))
        for matrix, preconditioned in zip(matrices, tried, strict=True)
    ]
    numbers: list[float] = torch.stack(products).tolist()
    return numbers
