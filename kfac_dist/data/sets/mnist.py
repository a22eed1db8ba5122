"""MNIST from its four canonical IDX files: 60,000 training and 10,000 test digits of 28x28."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kfac_dist.data.dataset import Split
from kfac_dist.data.decoded import Arrays, decoded_arrays
from kfac_dist.data.download import download
from kfac_dist.data.formats.gzipped import read_unpacked, unpack
from kfac_dist.data.formats.idx import parse_idx
from kfac_dist.data.places import Places
from kfac_dist.errors import DataError, DataNotFoundError

_SIDE = 28
_PREFIX: Mapping[Split, str] = {"train": "train", "test": "t10k"}


@dataclass(frozen=True, kw_only=True)
class MnistArchive:
    """Where the four files can be downloaded, and the md5 of each when *unpacked*."""

    mirrors: tuple[str, ...]
    md5: Mapping[str, str]


MNIST = MnistArchive(
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        "https://storage.googleapis.com/cvdf-datasets/mnist",
    ),
    md5={
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
)


@dataclass(frozen=True, kw_only=True)
class MnistReader:
    """Finds the files in `places`; otherwise downloads them to the cache.

    Each place may hold the files directly or in a subfolder `mnist/`, gzipped or not. Raises
    DataNotFoundError if a file cannot be found or downloaded, DataError if it is not one of MNIST.
    """

    places: Places
    archive: MnistArchive = MNIST

    def images(self, split: Split) -> NDArray[np.uint8]:
        """Return images `[N, 784]`, uint8, row by row."""
        return self._read(f"{_PREFIX[split]}-images-idx3-ubyte", (_SIDE, _SIDE))

    def labels(self, split: Split) -> NDArray[np.uint8]:
        """Return digits `[N]`, uint8, 0 to 9."""
        return self._read(f"{_PREFIX[split]}-labels-idx1-ubyte", ())[:, 0]

    def _read(self, name: str, case_shape: tuple[int, ...]) -> NDArray[np.uint8]:
        path = self._find(name)

        def decode() -> Arrays:
            content = read_unpacked(path)
            # Before the checksum, because shape and length say more about what is wrong.
            array = parse_idx(content, path, case_shape)
            self._check_md5(name, content, path)
            return {"values": array.reshape(len(array), -1)}

        return decoded_arrays(self.places.cache_dir, [path], f"mnist {name}", decode)["values"]

    def _find(self, name: str) -> Path:
        for folder in self.places.folders("mnist"):
            for path in (folder / name, folder / f"{name}.gz"):
                if path.is_file():
                    return path
        return self._download(name)

    def _download(self, name: str) -> Path:
        target = self.places.cache_dir / "mnist" / f"{name}.gz"

        def check(content: bytes, url: str) -> None:
            self._check_md5(name, unpack(content, url), url)

        try:
            download([f"{base}/{name}.gz" for base in self.archive.mirrors], target, check)
        except DataNotFoundError as error:
            ways = self.places.explain_missing("mnist", f"the file {name} (or {name}.gz)", "mnist")
            raise DataNotFoundError(
                f"{ways}\n  3. a download, which failed: {error.message}\n"
                "The data set mnist-5k needs no files."
            ) from error
        return target

    def _check_md5(self, name: str, content: bytes, origin: object) -> None:
        # Detects damage, not an attack: md5 is the checksum that MNIST is published with.
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        expected = self.archive.md5[name]
        if found != expected:
            raise DataError(
                f"{origin}: not MNIST's {name}: its md5 unpacked is {found} instead of "
                f"{expected}; put the right file there"
            )
