"""Buffers of the gradient workers' models, such as the running statistics of BatchNorm.

No process owns them during training: each worker's buffers follow its own parts of the batches,
and the steps do not depend on them. Evaluations and checkpoints do, so the driver averages them
over the workers before each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from workers.exchange.arrays import Array, Arrays, to_array, to_tensor


def read_buffers(model: nn.Module) -> dict[str, Array]:
    """Return copies of all buffers, by name."""
    return {name: to_array(buffer).copy() for name, buffer in model.named_buffers()}


def write_buffers(model: nn.Module, values: Arrays) -> None:
    """Set the buffers that have a value, and leave the others."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in values:
                buffer.copy_(to_tensor(values[name]))


def mean_buffers(parts: Sequence[Arrays]) -> dict[str, Array]:
    """Return the means over the workers, all with the same weight; counters are the first's."""
    return {name: _mean([part[name] for part in parts]) for name in parts[0]}


def _mean(arrays: Sequence[Array]) -> Array:
    first = arrays[0]
    # A mean of equal values could differ by rounding; a constant must stay what it is.
    is_constant = all(np.array_equal(first, other) for other in arrays)
    if is_constant or not np.issubdtype(first.dtype, np.floating):
        return first
    mean = np.mean(np.stack(arrays), axis=0, dtype=np.float64)
    return np.asarray(mean, dtype=first.dtype)
