"""Tensors as numpy arrays, which Ray's object store passes between processes without a copy.

Torch tensors would be pickled: sending them takes about three times as long.
"""

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
    """Return the tensor's values on the host; a tensor on the CPU shares its memory."""
    array: Array = tensor.detach().cpu().numpy()
    return array


def to_tensor(array: Array) -> Tensor:
    """Return a copy of the array as a tensor on the CPU."""
    # Arrays from the object store are read-only, and torch has no read-only tensors.
    return torch.from_numpy(np.array(array))


def to_arrays(state: Mapping[str, Tensor]) -> dict[str, Array]:
    """Return a flat state as arrays; see `to_array`."""
    return {name: to_array(value) for name, value in state.items()}


def to_tensors(state: Arrays, device: torch.device | None = None) -> dict[str, Tensor]:
    """Return a flat state as new tensors on `device`, by default the CPU."""
    return {name: to_tensor(value).to(device) for name, value in state.items()}


def section(state: Arrays, prefix: str) -> dict[str, Array]:
    """Return the entries of a flat state whose names begin with `prefix`, without the prefix."""
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }
