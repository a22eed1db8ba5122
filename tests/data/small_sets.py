"""Small files of the data sets that are read from files, for tests of what comes after reading."""

from __future__ import annotations

from pathlib import Path

import numpy as np

TEXT = "to be, or not to be: that is the question.\n" * 20


def write_cifar10(folder: Path, num_cases: int = 8) -> None:
    """Images whose brightness tells their class."""
    generator = np.random.default_rng(0)
    for name in ("data_batch_1.bin", "test_batch.bin"):
        table = generator.integers(0, 40, (num_cases, 3073)).astype(np.uint8)
        table[:, 0] = np.arange(num_cases) % 10
        table[:, 1:] += 20 * table[:, :1]
        (folder / name).write_bytes(table.tobytes())


def write_text(folder: Path) -> None:
    """860 characters: a sentence of 43 twenty times."""
    (folder / "input.txt").write_text(TEXT)


def write_faces(folder: Path) -> None:
    """40 noise patches of 25x25 pixels."""
    np.savez(folder / "faces.npz", faces=np.random.default_rng(0).normal(size=(40, 625)))
