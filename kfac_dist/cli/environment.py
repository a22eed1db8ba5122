"""Settings from the environment: the home folder, the data sets, Ray's address."""

from __future__ import annotations

import os
from pathlib import Path

from kfac_dist._home import DEFAULT_HOME


def home() -> Path:
    """Return `$KFAC_DIST_HOME`, else the user's default home."""
    return absolute(Path(os.environ.get("KFAC_DIST_HOME") or DEFAULT_HOME))


def data_dir(option: Path | None) -> Path | None:
    """Return the value of `--data-dir`, else `$KFAC_DIST_DATA`, else None."""
    given = option or os.environ.get("KFAC_DIST_DATA")
    return absolute(Path(given)) if given else None


def ray_address() -> str | None:
    """Return `$RAY_ADDRESS`, which Ray sets for the jobs that it runs."""
    return os.environ.get("RAY_ADDRESS")


def absolute(path: Path) -> Path:
    """Make a path absolute, since workers have another working folder. Links are kept."""
    return Path(os.path.abspath(path.expanduser()))  # noqa: PTH100 - resolve() follows links
