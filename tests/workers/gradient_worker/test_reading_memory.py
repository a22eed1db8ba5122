"""A process that reads a data set of files does not hold it: 30 MiB of cases more, no more memory.

What it maps from files is left out: all processes of a machine share that, and the system may drop
it. What is bought with the bound of 15 MiB is the noise of the allocator.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kfac_dist.data import BatchedDataset, Places, find_case_source, find_text_source
from workers.driver.memory import mapped_bytes, resident_bytes
from workers.gradient_worker.reading import CaseRange, ThreadReader

SIDE = 32
MEBIBYTE = 2**20


def places(folder: Path) -> Places:
    return Places(data_dir=folder, cache_dir=folder / "cache")


def write_npz(folder: Path, megabytes: int, save: Callable[..., None], dtype: type) -> None:
    shape = (megabytes * MEBIBYTE // (np.dtype(dtype).itemsize * SIDE * SIDE), SIDE, SIDE)
    values = np.random.default_rng(0).integers(0, 256, shape).astype(dtype)
    labels = np.arange(len(values)) % 10
    save(folder / "data.npz", x_train=values, y_train=labels, x_test=values[:9], y_test=labels[:9])


def packed(folder: Path, megabytes: int) -> None:
    write_npz(folder, megabytes, np.savez_compressed, np.uint8)


def wide(folder: Path, megabytes: int) -> None:
    write_npz(folder, megabytes, np.savez, np.float64)  # cast to float32 when it is read


def cifar(folder: Path, megabytes: int) -> None:
    for name, size in (("data_batch_1.bin", megabytes), ("test_batch.bin", 1)):
        table = np.zeros((size * MEBIBYTE // 3073, 3073), np.uint8)
        (folder / name).write_bytes(table.tobytes())


def text(folder: Path, megabytes: int) -> None:
    (folder / "input.txt").write_text("to be, or not to be; " * (megabytes * MEBIBYTE // 21))


def faces(folder: Path, megabytes: int) -> None:
    rows = megabytes * MEBIBYTE // (4 * 625)
    values = np.random.default_rng(0).normal(size=(rows, 625)).astype(np.float32)
    np.savez_compressed(folder / "faces.npz", faces=values)


def opened(name: str, folder: Path) -> BatchedDataset:
    options = {"limit": None, "places": places(folder), "dtype": torch.float32}
    if name == "text":
        return find_text_source(name, **options).windows("train", context=64, stride=64)
    source = find_case_source(name, **options)
    return source.reconstruction("train") if name == "faces" else source.classification("train")


def private_bytes() -> int:
    gc.collect()
    return resident_bytes() - mapped_bytes()


def most_held(name: str, folder: Path) -> int:
    """Return by how much this process grows when it reads all of the data set in batches."""
    before = private_bytes()
    dataset = opened(name, folder)
    reader = ThreadReader({"train": dataset}, seed=0)
    ranges = [
        CaseRange(split="train", epoch=None, start=start, stop=min(start + 256, len(dataset)))
        for start in range(0, len(dataset), 256)
    ]
    most = 0
    for place, cases in enumerate(ranges):
        reader.read(cases, ranges[place + 1 : place + 3])
        most = max(most, resident_bytes() - mapped_bytes())
    reader.close()
    return most - before


@pytest.mark.parametrize(
    ("write", "name"),
    [(packed, "npz"), (wide, "npz"), (cifar, "cifar10"), (text, "text"), (faces, "faces")],
)
def test_memory_does_not_grow_with_the_data_set(write, name, tmp_path):
    held = []
    for megabytes in (2, 32):
        folder = tmp_path / str(megabytes)
        folder.mkdir()
        write(folder, megabytes)
        opened(name, folder)  # the first process decodes it
        most_held(name, folder)  # and the allocator gets what a batch needs
        held.append(most_held(name, folder))
    assert held[1] - held[0] < 15 * MEBIBYTE
