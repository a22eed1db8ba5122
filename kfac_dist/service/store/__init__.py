"""The database of the control plane."""

from __future__ import annotations


class Store:
    """The tables, by verbs."""


def open_store(url: str) -> Store:
    """Open the database at `url`, an SQLAlchemy URL, and bring its tables up to date."""
    raise NotImplementedError(url)
