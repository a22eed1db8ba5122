"""Tensors as numpy arrays: what Ray's object store passes between processes without pickling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kfac_dist.coordination.assignment import LayerCost
from kfac_dist.core.factors import KroneckerPair
from kfac_dist.core.packing import pack, packed_size, unpack

Array = NDArray[Any]


def to_array(tensor: Tensor) -> Array:
    """Return the tensor's values on the host; shares memory with a tensor on the CPU."""
    array: Array = tensor.detach().cpu().numpy()
    return array


def to_tensor(array: Array) -> Tensor:
    """Return a copy: arrays from the object store are read-only, torch has no such tensors."""
    return torch.from_numpy(np.array(array))


def pack_pairs(pairs: Iterable[KroneckerPair]) -> Array:
    """Return one array with the packed triangles of A and G of each pair, in order."""
    triangles = [pack(factor) for pair in pairs for factor in (pair.A, pair.G)]
    return to_array(torch.cat(triangles)) if triangles else np.empty(0)


def unpack_pairs(array: Array, layers: Sequence[LayerCost]) -> dict[str, KroneckerPair]:
    """Return the pairs of `layers` by name; `array` holds them in that order.

    Raises:
        ValueError: the array has another number of elements than the layers.
    """
    sizes = [packed_size(order) for layer in layers for order in (layer.dim_A, layer.dim_G)]
    triangles = iter(torch.split(to_tensor(array), sizes))
    return {
        layer.name: KroneckerPair(A=unpack(next(triangles)), G=unpack(next(triangles)))
        for layer in layers
    }


def to_arrays(state: Mapping[str, Tensor]) -> dict[str, Array]:
    """Return a flat state as arrays."""
    return {name: to_array(value) for name, value in state.items()}


def to_tensors(state: Mapping[str, Array], device: torch.device | None = None) -> dict[str, Tensor]:
    """Return a flat state as tensors of their own."""
    return {name: to_tensor(value).to(device) for name, value in state.items()}


def section(state: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    """Return the part of a flat state whose names begin with `prefix`, without it."""
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }
