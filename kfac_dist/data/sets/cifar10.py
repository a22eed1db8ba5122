"""CIFAR-10 from its binary version: 50,000 training and 10,000 test images, 3x32x32, ten classes.

A record has 3,073 bytes: the label, then 1,024 bytes of each colour plane (red, green, blue), row
by row. A file may hold any number of records, so a subset is a file of the same format.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from kfac_dist.data.dataset import Split
from kfac_dist.data.decoded import Arrays, decoded_arrays
from kfac_dist.data.download import download
from kfac_dist.data.formats.gzipped import read_unpacked
from kfac_dist.data.places import Places
from kfac_dist.errors import DataError, DataNotFoundError

SHAPE = (3, 32, 32)
NUM_CLASSES = 10
_RECORD_BYTES = 1 + 3 * 32 * 32
_FILES: Mapping[Split, str] = {"train": "data_batch_*.bin", "test": "test_batch.bin"}


@dataclass(frozen=True, kw_only=True)
class Cifar10Archive:
    """The archive of all files: its name, where it can be downloaded, and its md5."""

    name: str
    mirrors: tuple[str, ...]
    md5: str


CIFAR10 = Cifar10Archive(
    name="cifar-10-binary.tar.gz",
    mirrors=("https://www.cs.toronto.edu/~kriz",),
    md5="c32a1d4ab5d03f1284b67883e8d87530",
)


@dataclass(frozen=True, kw_only=True)
class Cifar10Reader:
    """Finds the files, or the archive, in `places`; otherwise downloads the archive to the cache.

    Each place may hold them directly or in a folder `cifar-10-batches-bin/` or `cifar10*/`, and
    the files may be gzipped. Raises DataNotFoundError if they are not found, DataError if a file
    is not one of CIFAR-10.
    """

    places: Places
    archive: Cifar10Archive = CIFAR10

    def read(self, split: Split) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Return images `[N, 3, 32, 32]` and labels `[N]`, in the order of the file names."""
        sources = self._sources(split)

        def decode() -> Arrays:
            contents = self._contents(sources, split)
            table = np.concatenate([_parse(content, name) for name, content in contents.items()])
            return {"images": table[:, 1:].reshape(-1, *SHAPE), "labels": table[:, 0]}

        arrays = decoded_arrays(self.places.cache_dir, sources, f"cifar10 {split}", decode)
        return arrays["images"], arrays["labels"]

    def _sources(self, split: Split) -> list[Path]:
        """Return the files of a split, or the archive alone."""
        for folder in self.places.folders("cifar-10-batches-bin", "cifar10*"):
            plain = {path.name: path for path in folder.glob(_FILES[split])}
            packed = {path.stem: path for path in folder.glob(f"{_FILES[split]}.gz")}
            files = packed | plain
            if files:
                return [files[name] for name in sorted(files)]
            archive = folder / self.archive.name
            if archive.is_file():
                return [archive]
        return [self._download()]

    def _contents(self, sources: list[Path], split: Split) -> dict[str, bytes]:
        if sources[0].name == self.archive.name:
            return self._members(sources[0], split)
        return {str(path): read_unpacked(path) for path in sources}

    def _members(self, path: Path, split: Split) -> dict[str, bytes]:
        content = path.read_bytes()
        self._check_md5(content, path)
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            found = {
                f"{path}, {member.name}": file.read()
                for member in sorted(archive.getmembers(), key=lambda member: member.name)
                if fnmatch(PurePosixPath(member.name).name, _FILES[split])
                and (file := archive.extractfile(member)) is not None
            }
        if not found:
            raise DataError(f"{path}: it contains no {_FILES[split]}")
        return found

    def _download(self) -> Path:
        target = self.places.cache_dir / "cifar10" / self.archive.name
        urls = [f"{base}/{self.archive.name}" for base in self.archive.mirrors]
        try:
            download(urls, target, self._check_md5)
        except DataNotFoundError as error:
            wanted = f"{_FILES['train']} with test_batch.bin (or .gz), or {self.archive.name},"
            ways = self.places.explain_missing("cifar10", wanted, "cifar-10-batches-bin")
            raise DataNotFoundError(
                f"{ways}\n  3. a download, which failed: {error.message}"
            ) from error
        return target

    def _check_md5(self, content: bytes, origin: object) -> None:
        # Detects damage, not an attack: md5 is the checksum that CIFAR-10 is published with.
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != self.archive.md5:
            raise DataError(
                f"{origin}: not CIFAR-10's {self.archive.name}: its md5 is {found} instead of "
                f"{self.archive.md5}; put the right file there"
            )


def _parse(content: bytes, origin: str) -> NDArray[np.uint8]:
    """Return the records of one file, `[N, 3073]`."""
    if not content or len(content) % _RECORD_BYTES:
        raise DataError(
            f"{origin}: {len(content)} bytes unpacked, not a multiple of {_RECORD_BYTES}, "
            "the size of a CIFAR-10 record"
        )
    table = np.frombuffer(content, np.uint8).reshape(-1, _RECORD_BYTES)
    wrong = np.flatnonzero(table[:, 0] >= NUM_CLASSES)
    if len(wrong):
        raise DataError(
            f"{origin}: record {wrong[0]} has the label {table[wrong[0], 0]}, not one "
            f"of 0 to {NUM_CLASSES - 1}; is this the binary version of CIFAR-10?"
        )
    return table
