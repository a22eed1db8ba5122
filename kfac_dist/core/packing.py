"""Symmetric matrices as packed lower triangles: half the bytes on the wire and on disk.

Among tensors by name, a matrix named A or G, after any path, is symmetric (a factor, or its
inverse); packed, its name ends with `:lower`. All else goes as it is, so that packed tensors can be
unpacked without knowing what they are of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

# Orders whose indices are kept: they are as large as a matrix in float32.
_NUM_ORDERS = 32
_SYMMETRIC = ("A", "G")
LOWER = ":lower"


def packed_size(order: int) -> int:
    """Return the number of elements of the packed triangle of a matrix of this order."""
    return order * (order + 1) // 2


@lru_cache(maxsize=_NUM_ORDERS)
def _lower_indices(order: int, device: torch.device) -> Tensor:
    rows, columns = torch.tril_indices(order, order, device=device)
    indices: Tensor = rows * order + columns
    return indices.to(torch.int32)


@lru_cache(maxsize=_NUM_ORDERS)
def _mirror_indices(order: int, device: torch.device) -> Tensor:
    """Return for each element of the matrix, by rows, its place in the triangle."""
    rows = torch.arange(order, device=device).unsqueeze(1)
    low, high = torch.minimum(rows, rows.T), torch.maximum(rows, rows.T)
    return (high * (high + 1) // 2 + low).reshape(-1).to(torch.int32)


def pack(matrix: Tensor) -> Tensor:
    """Return the lower triangle of `matrix` [d, d], by rows, as a new vector [d (d + 1) / 2]."""
    # index_select takes a third of the time of fancy indexing, in `unpack` less than a tenth.
    indices = _lower_indices(matrix.shape[0], matrix.device)
    return torch.index_select(matrix.reshape(-1), 0, indices)


def unpack(triangle: Tensor) -> Tensor:
    """Return the symmetric matrix [d, d] whose lower triangle is `triangle`; exact inverse."""
    order = (math.isqrt(8 * triangle.numel() + 1) - 1) // 2
    if packed_size(order) != triangle.numel():
        raise ValueError(f"{triangle.numel()} elements are no packed triangle of any order")
    indices = _mirror_indices(order, triangle.device)
    return torch.index_select(triangle, 0, indices).view(order, order)


def mirror_lower(matrix: Tensor) -> Tensor:
    """Return the symmetric matrix that has the lower triangle of `matrix` [..., d, d]."""
    lower = matrix.tril()
    return lower + lower.tril(-1).mT


def pack_symmetric(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with symmetric matrices packed; the others are not copied."""
    packed = {}
    for name, tensor in tensors.items():
        if name.rpartition("/")[2] in _SYMMETRIC and tensor.dim() == 2:
            packed[name + LOWER] = pack(tensor)
        else:
            packed[name] = tensor
    return packed


def unpack_symmetric(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that were packed; those that were not are not copied."""
    return {
        name.removesuffix(LOWER): unpack(tensor) if name.endswith(LOWER) else tensor
        for name, tensor in tensors.items()
    }
