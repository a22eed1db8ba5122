"""What all tests share: where the real data is, and how properties are tried."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# A shared machine is no reason for a property to fail, and CI tries the same examples each time.
settings.register_profile("kfac_dist", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("kfac_dist")

ROOT = Path(__file__).resolve().parents[1]

# Tests that start clusters of processes run one after the other, also where others run beside them.
_WITH_PROCESSES = ("benchmarks", "end_to_end", "workers")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folders = [ROOT / "tests" / name for name in _WITH_PROCESSES]
    for item in items:
        if any(item.path.is_relative_to(folder) for folder in folders):
            item.add_marker(pytest.mark.xdist_group("processes"))


def _given() -> list[Path]:
    """Where real data may be."""
    given = os.environ.get("KFAC_DIST_DATA")
    return [*([Path(given)] if given else []), ROOT.parent / "shared" / "data"]


def _holding(what: str, *patterns: str) -> Path:
    """The first place with a file that fits one of `patterns`, in it or one folder below."""
    places = _given()
    for place in places:
        if any(True for p in patterns for f in (p, f"*/{p}") for _ in place.glob(f)):
            return place
    pytest.skip(f"needs real {what} in KFAC_DIST_DATA or {places[-1]}")


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """A folder that holds the real MNIST, as one passes it to --data-dir; skips without one."""
    return _holding("MNIST", "train-images-idx3-ubyte", "train-images-idx3-ubyte.gz")


@pytest.fixture(scope="session")
def cifar10_dir() -> Path:
    """A folder with real CIFAR-10, or part of it, for --data-dir; skips without one."""
    return _holding("CIFAR-10", "data_batch_1.bin", "data_batch_1.bin.gz")


@pytest.fixture(scope="session")
def text_dir() -> Path:
    """A folder with the text of Tiny Shakespeare, for --data-dir; skips without one."""
    return _holding("Tiny Shakespeare", "input.txt")
