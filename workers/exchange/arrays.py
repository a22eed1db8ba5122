"""Tensors as numpy arrays: what Ray's object store passes between processes without pickling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
Arrays = Mapping[str, Array]


def to_array(tensor: Tensor) -> Array:
    """Return the tensor's values on the host; shares memory with a tensor on the CPU."""
    array: Array = tensor.detach().cpu().numpy()
    return array


def to_tensor(array: Array) -> Tensor:
    """Return a copy: arrays from the object store are read-only, torch has no such tensors."""
    return torch.from_numpy(np.array(array))


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
