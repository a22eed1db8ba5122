"""Symmetric matrices as packed lower triangles: half the bytes on the wire and on disk."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def packed_size(order: int) -> int:
    """Return the number of elements of the packed triangle of a matrix of this order."""
    return order * (order + 1) // 2


@lru_cache(maxsize=64)
def _lower_indices(order: int, device: torch.device) -> Tensor:
    rows, columns = torch.tril_indices(order, order, device=device)
    indices: Tensor = rows * order + columns
    return indices


def pack(matrix: Tensor) -> Tensor:
    """Return the lower triangle of `matrix` [d, d], by rows, as a new vector [d (d + 1) / 2]."""
    return matrix.reshape(-1)[_lower_indices(matrix.shape[0], matrix.device)]


def unpack(triangle: Tensor) -> Tensor:
    """Return the symmetric matrix [d, d] whose lower triangle is `triangle`; exact inverse."""
    order = (math.isqrt(8 * triangle.numel() + 1) - 1) // 2
    if packed_size(order) != triangle.numel():
        raise ValueError(f"{triangle.numel()} elements are no packed triangle of any order")
    matrix = triangle.new_zeros(order * order)
    matrix[_lower_indices(order, triangle.device)] = triangle
    return mirror_lower(matrix.view(order, order))


def mirror_lower(matrix: Tensor) -> Tensor:
    """Return the symmetric matrix that has the lower triangle of `matrix` [..., d, d]."""
    lower = matrix.tril()
    return lower + lower.tril(-1).mT
