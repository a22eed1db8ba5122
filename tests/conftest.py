"""Shared by all tests: the folders of real data, the settings of hypothesis, groups of tests."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

from tests.paths import ROOT

# No deadline, because machines are shared. Derandomized, so CI tries the same examples each time.
settings.register_profile("kfac_dist", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("kfac_dist")

# A shell without job control ignores Ctrl-C in what it starts in the background; commands that a
# test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# `make test` runs tests in parallel, but those of a group one after the other. So at most two tests
# have clusters of processes at the same time.
_GROUPS = {"benchmarks": "benchmarks", "end_to_end": "processes", "workers": "processes"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(ROOT / "tests").parts[0]
        if folder in _GROUPS:
            item.add_marker(pytest.mark.xdist_group(_GROUPS[folder]))


def _data_folders() -> list[Path]:
    """Return the folders in which real data may be."""
    given = os.environ.get("KFAC_DIST_DATA")
    return [*([Path(given)] if given else []), ROOT.parent / "shared" / "data"]


def _holding(what: str, *patterns: str) -> Path:
    """Return the first folder with a file, in it or one level below, that fits a pattern."""
    places = _data_folders()
    for place in places:
        if any(True for p in patterns for f in (p, f"*/{p}") for _ in place.glob(f)):
            return place
    pytest.skip(f"needs real {what} in KFAC_DIST_DATA or {places[-1]}")


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """A folder with the real MNIST, for --data-dir; skips the test without one."""
    return _holding("MNIST", "train-images-idx3-ubyte", "train-images-idx3-ubyte.gz")


@pytest.fixture(scope="session")
def cifar10_dir() -> Path:
    """A folder with real CIFAR-10, or part of it, for --data-dir; skips the test without one."""
    return _holding("CIFAR-10", "data_batch_1.bin", "data_batch_1.bin.gz")


@pytest.fixture(scope="session")
def text_dir() -> Path:
    """A folder with the text of Tiny Shakespeare, for --data-dir; skips the test without one."""
    return _holding("Tiny Shakespeare", "input.txt")
