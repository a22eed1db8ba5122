"""The store of the server and of the commands that work on it directly."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kfac_dist.service.store import Store


def open_home_store(home: Path, url: str | None) -> Store:
    """Open the store at `url`, else at `$KFAC_DIST_STORE`, else in the file `store.db` of `home`.

    `home` must exist.

    Raises:
        UsageError: the URL is malformed or names an unsupported database.
        UnreachableError: the database does not answer.
    """
    from kfac_dist.service.store import open_store

    return open_store(url or os.environ.get("KFAC_DIST_STORE") or f"sqlite:///{home}/store.db")
