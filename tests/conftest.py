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


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """A folder that holds the real MNIST, as one passes it to --data-dir; skips without one."""
    given = os.environ.get("KFAC_DIST_DATA")
    places = [Path(given)] if given else []
    places.append(ROOT.parent / "shared" / "data")
    name = "train-images-idx3-ubyte"
    for place in places:
        for folder in (place, place / "mnist"):
            if (folder / name).is_file() or (folder / f"{name}.gz").is_file():
                return place
    pytest.skip(f"needs real MNIST in KFAC_DIST_DATA or {places[-1]}")
