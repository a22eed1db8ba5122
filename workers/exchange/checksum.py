"""One word for the values of tensors: equal on all holders of the parameters, or they diverged."""

from __future__ import annotations

import hashlib

from torch import Tensor

from workers.exchange.arrays import to_array


def checksum(*tensors: Tensor) -> str:
    """Return the sha256 of the values of `tensors`, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        # Adding zero turns -0.0 into 0.0: equal numbers have equal bytes.
        digest.update(to_array(tensor + 0.0).tobytes())
    return digest.hexdigest()
