"""`faces`: patches of the Olivetti faces, with real-valued pixels for Gaussian outputs.

Two files are common:

- `newfaces_rot_single.mat`, variable `newfaces_single`: the 165,600 patches of 25x25 pixels of
  Hinton and Salakhutdinov (2006), already standardised. The values are used as they are. The split
  is that of Martens (2010), which the K-FAC paper follows: the first 103,500 patches are training
  cases, the last 41,400 test cases.
- `olivettifaces.mat`, or any other array of 25x25 patches or 64x64 faces. The last quarter (ten of
  forty people) are test cases. The values are standardised as Hinton and Salakhutdinov did: each
  pixel is shifted to zero mean, and all are divided by one number that makes the mean variance of
  a pixel 1. Mean and variance are those of the training cases.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.io import loadmat, whosmat
from scipy.io.matlab import MatReadError

from kfac_dist.data.dataset import ArrayDataset, Split, num_limited
from kfac_dist.data.decoded import Arrays, decoded_arrays
from kfac_dist.data.formats.npz_file import NpzFile
from kfac_dist.data.places import Places
from kfac_dist.errors import DataError, InvalidSpecError

_NAMES = ("newfaces_rot_single.mat", "olivettifaces.mat", "faces.mat", "faces.npz")
_NUM_PIXELS = (25 * 25, 64 * 64)
_STANDARDISED = "newfaces_single"
_PEOPLE, _TRAIN_PEOPLE, _TEST_PEOPLE = 40, 25, 10
_DAMAGED = (ValueError, TypeError, EOFError, OSError, MatReadError, struct.error, zlib.error)


@dataclass(frozen=True, kw_only=True)
class FacesSource:
    """The largest two-dimensional array of a .mat or .npz file in `places` or `faces/`."""

    limit: int | None
    places: Places
    dtype: torch.dtype

    name = "faces"

    def case_shape(self) -> tuple[int, ...]:
        """Return (625,) or (4096,)."""
        path = self._path()
        return (_num_pixels(_largest(path)[1], path),)

    def num_classes(self) -> int:
        """Raise InvalidSpecError: the files do not say whose face it is."""
        raise InvalidSpecError("data.name: faces has no labels to classify")

    def reconstruction(self, split: Split) -> ArrayDataset:
        """Return faces `[N, num_pixels]` that are their own targets."""
        path = self._path()

        def decode() -> Arrays:
            return {"faces": torch.from_numpy(_standardised(path, split)).to(self.dtype).numpy()}

        what = f"faces {split} {self.dtype}"
        faces = decoded_arrays(self.places.cache_dir, [path], what, decode)["faces"]
        kept = num_limited(split, len(faces), self.limit, self.name)
        cases = torch.from_numpy(faces[:kept])
        return ArrayDataset(cases, cases)

    def classification(self, split: Split) -> ArrayDataset:
        """Raise InvalidSpecError: the files have no labels."""
        raise InvalidSpecError("data.name: faces has no labels to classify")

    def _path(self) -> Path:
        return self.places.find(
            self.name, folders=["faces"], names=_NAMES, patterns=["*.mat", "*.npz"]
        )


def _standardised(path: Path, split: Split) -> NDArray[np.float64]:
    """Return the faces of a split, `[N, num_pixels]`."""
    name, shape = _largest(path)
    faces = _load(path, name)
    if shape[1] != _num_pixels(shape, path):
        faces = faces.T
    train, test = _split(faces, name)
    values = np.ascontiguousarray(train if split == "train" else test, dtype=np.float64)
    if name == _STANDARDISED:
        return values
    mean, std = _scale(train, path)
    return (values - mean) / std


def _split(faces: NDArray[Any], name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Split `[N, num_pixels]` into training and test cases; faces of a person are neighbours."""
    num_test = len(faces) * _TEST_PEOPLE // _PEOPLE
    is_martens = name == _STANDARDISED
    num_train = len(faces) * _TRAIN_PEOPLE // _PEOPLE if is_martens else len(faces) - num_test
    return faces[:num_train], faces[len(faces) - num_test :]


def _scale(train: NDArray[Any], path: Path) -> tuple[NDArray[np.float64], float]:
    mean = train.mean(axis=0, dtype=np.float64)
    variance = float(train.var(axis=0, dtype=np.float64).mean())
    if variance == 0:
        raise DataError(f"{path}: all training faces are the same, so they cannot be standardised")
    return mean, variance**0.5


def _largest(path: Path) -> tuple[str, tuple[int, ...]]:
    """Return name and shape of the largest two-dimensional array of numbers."""
    arrays = _npz_arrays(path) if path.suffix == ".npz" else _mat_arrays(path)
    tables = {name: shape for name, shape in arrays.items() if len(shape) == 2}
    if not tables:
        found = ", ".join(f"{name} {shape}" for name, shape in arrays.items()) or "none"
        raise DataError(f"{path}: it has no two-dimensional array of numbers; its arrays: {found}")
    return max(tables.items(), key=lambda item: item[1][0] * item[1][1])


def _npz_arrays(path: Path) -> dict[str, tuple[int, ...]]:
    file = NpzFile(path=path)
    headers = {name: file.header(name) for name in file.names()}
    return {name: header.shape for name, header in headers.items() if header.dtype.kind in "fiu"}


def _mat_arrays(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        return {
            name: tuple(shape)
            for name, shape, kind in whosmat(path)
            if kind in ("double", "single") or kind.startswith(("int", "uint"))
        }
    except NotImplementedError as error:
        raise DataError(
            f"{path}: MATLAB's version 7.3 cannot be read; save it with -v7, or as npz"
        ) from error
    except _DAMAGED as error:
        raise DataError(f"{path}: a damaged .mat file: {error}") from error


def _load(path: Path, name: str) -> NDArray[Any]:
    if path.suffix == ".npz":
        return NpzFile(path=path).array(name)
    try:
        array: NDArray[Any] = loadmat(path, variable_names=[name])[name]
    except _DAMAGED as error:
        raise DataError(f"{path}: {name} cannot be read: {error}") from error
    return array


def _num_pixels(shape: tuple[int, ...], path: Path) -> int:
    sides = [side for side in shape if side in _NUM_PIXELS]
    if len(sides) != 1:
        raise DataError(
            f"{path}: an array of shape {shape}: exactly one side must be 625 (25x25 pixels) or "
            "4096 (64x64)"
        )
    return sides[0]
