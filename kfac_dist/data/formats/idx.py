"""The IDX file format of MNIST.

Layout: two zero bytes, one byte element type (0x08: unsigned byte), one byte number of
dimensions, each dimension as a big-endian 32-bit integer, then the elements, last index fastest.
"""

from __future__ import annotations

import struct
from math import prod

import numpy as np
from numpy.typing import NDArray

from kfac_dist.errors import DataError

_UNSIGNED_BYTE = 0x08


def parse_idx(content: bytes, origin: object, case_shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return the array of an IDX file of unsigned bytes, `[N, *case_shape]`, writable.

    Raises DataError if the header, the shape or the length is wrong; `origin` names the file.
    """
    num_dims = 1 + len(case_shape)
    header_bytes = 4 + 4 * num_dims
    if len(content) < header_bytes:
        raise DataError(
            f"{origin}: cut off: {len(content)} bytes, but the IDX header alone has {header_bytes}"
        )
    magic = bytes((0, 0, _UNSIGNED_BYTE, num_dims))
    if content[:4] != magic:
        raise DataError(
            f"{origin}: not an IDX file of {num_dims}-dimensional bytes: it starts with "
            f"{content[:4].hex()} instead of {magic.hex()}"
        )
    shape = struct.unpack(f">{num_dims}I", content[4:header_bytes])
    if shape[1:] != case_shape:
        raise DataError(f"{origin}: a case has shape {shape[1:]} instead of {case_shape}")
    expected = header_bytes + prod(shape)
    if len(content) != expected:
        problem = "cut off" if len(content) < expected else "too long"
        raise DataError(
            f"{origin}: {problem}: {len(content)} bytes unpacked; its header says {expected}"
        )
    return np.frombuffer(bytearray(content), np.uint8, offset=header_bytes).reshape(shape)
