"""`npz`: the user's own arrays `x_train`, `y_train`, `x_test`, `y_test` in one npz file.

`x` is `[N, features]`, `[N, height, width]`, `[N, channels, height, width]` or, with one, three
or four channels, `[N, height, width, channels]`. 8-bit values are scaled to [0, 1]; other values
are used as they are. `y` holds class indices `[N]`; only a classifier needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kfac_dist.data.dataset import ArrayDataset, BatchedDataset, ImageDataset, Split, num_limited
from kfac_dist.data.decoded import decoded_arrays
from kfac_dist.data.formats.npz_file import NpzFile
from kfac_dist.data.places import Places
from kfac_dist.errors import DataError, InvalidSpecError

_CHANNELS = (1, 3, 4)  # gray; red, green, blue; the same with opacity


@dataclass(frozen=True, kw_only=True)
class NpzSource:
    """The arrays of `data.npz`, or of the only npz file, in `places` or a subfolder `npz/`."""

    limit: int | None
    places: Places
    dtype: torch.dtype

    name = "npz"

    def case_shape(self) -> tuple[int, ...]:
        """Return (features,) or (channels, height, width), the shape of a case of `x_train`."""
        path = self._path()
        return _case_shape(_header(path, "x_train").shape, f"{path}: x_train")

    def num_classes(self) -> int:
        """Return one more than the largest label in `y_train`."""
        return int(self._labels(self._path(), "train").max()) + 1

    def reconstruction(self, split: Split) -> BatchedDataset:
        """Return cases `[N, features]` that are their own targets."""
        inputs = self._inputs(self._path(), split)
        inputs = inputs.reshape(len(inputs), prod(inputs.shape[1:]))
        if inputs.dtype == torch.uint8:
            return ImageDataset(inputs, None, self.dtype)
        return ArrayDataset(inputs, inputs, input_dtype=self.dtype, target_dtype=self.dtype)

    def classification(self, split: Split) -> BatchedDataset:
        """Return cases `[N, *case_shape]` and their labels."""
        path = self._path()
        inputs, labels = self._inputs(path, split), self._labels(path, split)
        num_cases = _header(path, f"x_{split}").shape[0]
        if len(labels) != num_cases:
            raise DataError(
                f"{path}: x_{split} has {num_cases} cases but y_{split} has {len(labels)}; "
                "the numbers must be the same"
            )
        if split == "test" and (num_classes := self.num_classes()) <= labels.max():
            raise DataError(
                f"{path}: y_test has the label {labels.max()}, y_train only 0 to {num_classes - 1}"
            )
        targets = torch.from_numpy(labels[: len(inputs)])
        if inputs.dtype == torch.uint8:
            return ImageDataset(inputs, targets, self.dtype)
        return ArrayDataset(inputs, targets, input_dtype=self.dtype, target_dtype=torch.int64)

    def _path(self) -> Path:
        return self.places.find("npz", folders=["npz"], names=["data.npz"], patterns=["*.npz"])

    def _inputs(self, path: Path, split: Split) -> Tensor:
        """Return the first cases, channels first, in the type that the file has them in."""
        name, header = f"x_{split}", _header(path, f"x_{split}")
        shape, dtype = header.shape, header.dtype
        expected, found = self.case_shape(), _case_shape(shape, f"{path}: {name}")
        if found != expected:
            raise DataError(f"{path}: a case of {name} has shape {found}, of x_train {expected}")
        kept = num_limited(split, shape[0], self.limit, str(path))
        if dtype.kind not in "fiub":
            raise DataError(f"{path}: {name} holds {dtype}; it must hold numbers")
        is_last = len(shape) == 4 and shape[1:] != expected

        def normal(array: NDArray[Any]) -> NDArray[Any]:
            return _readable(np.moveaxis(array, 3, 1) if is_last else array)

        array = self._array(path, name, normal, as_it_is=_is_readable(dtype) and not is_last)
        return torch.from_numpy(array[:kept].reshape(kept, *expected))

    def _array(
        self,
        path: Path,
        name: str,
        normal: Callable[[NDArray[Any]], NDArray[Any]],
        *,
        as_it_is: bool,
    ) -> NDArray[Any]:
        """Map `normal` of an array: from the file, if it is there `as_it_is`, or from the cache."""
        file = NpzFile(path=path)
        if as_it_is and file.is_mapped(name):
            return file.array(name)
        arrays = decoded_arrays(
            self.places.cache_dir,
            [path],
            f"npz {name}",
            lambda: {"values": normal(file.array(name))},
        )
        return arrays["values"]

    def _labels(self, path: Path, split: Split) -> NDArray[Any]:
        name, file = f"y_{split}", NpzFile(path=path)
        if name not in file.names():
            raise InvalidSpecError(
                f"task: {path} has no {name}, and a classifier needs labels; "
                "task: autoencoder needs none"
            )
        header = file.header(name)
        shape, dtype = header.shape, header.dtype
        is_column = len(shape) == 2 and shape[1] == 1
        if not (len(shape) == 1 or is_column) or shape[0] == 0 or dtype.kind not in "iu":
            raise DataError(
                f"{path}: {name} is an array of {dtype} with shape {shape}; "
                "it must hold class indices, integers of shape (N,)"
            )
        labels = self._array(
            path, name, lambda array: array.astype(np.int64), as_it_is=_is_readable(dtype)
        ).reshape(-1)
        if labels.min() < 0:
            raise DataError(f"{path}: {name} has the label {labels.min()}; classes count from 0")
        return labels


def _header(path: Path, name: str) -> Any:
    file = NpzFile(path=path)
    names = file.names()
    if name not in names:
        raise DataError(
            f"{path}: the array {name} is missing (it has {', '.join(names) or 'nothing'}); "
            "x_train and x_test are needed, and y_train and y_test for a classifier"
        )
    return file.header(name)


def _case_shape(shape: tuple[int, ...], what: str) -> tuple[int, ...]:
    if len(shape) not in (2, 3, 4) or 0 in shape:
        raise DataError(
            f"{what} has shape {shape}; it must be (N, features), (N, height, width) or "
            "(N, channels, height, width), with no dimension 0"
        )
    if len(shape) == 3:
        return (1, *shape[1:])
    if len(shape) == 4 and shape[3] in _CHANNELS and shape[1] not in _CHANNELS:
        return (shape[3], *shape[1:3])
    return shape[1:]


def _is_readable(dtype: np.dtype[Any]) -> bool:
    """Return whether torch has this element type, in the byte order of this machine."""
    is_wide_unsigned = dtype.kind == "u" and dtype.itemsize > 1
    return dtype.isnative and not is_wide_unsigned and dtype.itemsize <= 8


def _readable(array: NDArray[Any]) -> NDArray[Any]:
    """Return `array` in an element type that torch has, in the byte order of this machine."""
    native = array.dtype.newbyteorder("=")
    if not _is_readable(native):
        return array.astype(np.float64)
    return np.ascontiguousarray(array, dtype=native)
