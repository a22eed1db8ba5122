"""Small MNIST-like archives that tests write themselves."""

from __future__ import annotations

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np

from kfac_dist.data.sets.mnist import MnistArchive

NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def idx_bytes(array: np.ndarray) -> bytes:
    """`array` of uint8 in the IDX format."""
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


def small_archive(num_train: int = 20, num_test: int = 8) -> dict[str, bytes]:
    """Unpacked content by file name."""
    generator = np.random.default_rng(3)
    files = {}
    for split, number in (("train", num_train), ("test", num_test)):
        images, labels = NAMES[split]
        files[images] = idx_bytes(generator.integers(0, 256, (number, 28, 28)).astype(np.uint8))
        files[labels] = idx_bytes(generator.integers(0, 10, number).astype(np.uint8))
    return files


def describe(files: dict[str, bytes], mirrors: tuple[str, ...] = ()) -> MnistArchive:
    """The archive that consists of exactly these files."""
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    return MnistArchive(mirrors=mirrors, md5=md5)


def write(files: dict[str, bytes], folder: Path, *, gz: bool = True) -> None:
    """Put the files into `folder`, gzipped or plain."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if gz:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
