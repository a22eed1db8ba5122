"""The folder that keeps a user's runs, data sets and server, and the names inside it.

Only the command line lets `$KFAC_DIST_HOME` name another one.
"""

from __future__ import annotations

from pathlib import Path

DEFAULT_HOME = Path("~/.kfac_dist")


def default_home() -> Path:
    """Return the home of the current user."""
    return DEFAULT_HOME.expanduser()


def data_cache(home: Path) -> Path:
    """Return the folder of downloaded data sets."""
    return home / "data"


def runs_dir(home: Path) -> Path:
    """Return the folder of run folders, each named after its job."""
    return home / "runs"
