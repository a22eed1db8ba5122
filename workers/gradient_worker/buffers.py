"""Buffers of the gradient workers' models, such as the running statistics of BatchNorm.

Nobody owns them during training: each worker's follow its own parts of the batches, and steps do
not depend on them. They are made the same where they matter, in evaluations and checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from workers.exchange.arrays import Array, Arrays, to_array, to_tensor


def read_buffers(model: nn.Module) -> dict[str, Array]:
    """Return copies of all buffers, by name."""
    return {name: to_array(buffer).copy() for name, buffer in model.named_buffers()}


def write_buffers(model: nn.Module, values: Arrays) -> None:
    """Set the buffers that have a value."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in values:
                buffer.copy_(to_tensor(values[name]))


def mean_buffers(parts: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Return the means over the workers, each of the same weight; counters are the first's."""
    return {name: _mean([part[name] for part in parts]) for name in parts[0]}


def _mean(arrays: Sequence[Array]) -> Array:
    first = arrays[0]
    is_constant = all(np.array_equal(first, other) for other in arrays)
    if is_constant or not np.issubdtype(first.dtype, np.floating):
        return first
    mean = np.mean(np.stack(arrays), axis=0, dtype=np.float64)
    return np.asarray(mean, dtype=first.dtype)
