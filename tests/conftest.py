"""What all tests share: where the real data is, and how properties are tried."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.paths import ROOT

# A shared machine is no reason for a property to fail, and CI tries the same examples each time.
settings.register_profile("kfac_dist", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("kfac_dist")

# Where `make test` runs tests side by side, those of a group run one after the other: no more than
# two start clusters of processes at once.
_GROUPS = {"benchmarks": "benchmarks", "end_to_end": "processes", "workers": "processes"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(ROOT / "tests").parts[0]
        if folder in _GROUPS:
            item.add_marker(pytest.mark.xdist_group(_GROUPS[folder]))


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
