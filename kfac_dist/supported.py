"""The versions of Python and Ray that kfac-dist is meant for; a test compares pyproject.toml."""

from __future__ import annotations

from typing import NamedTuple

OLDEST_PYTHON = (3, 11)


class RayRange(NamedTuple):
    """The oldest and the newest minor version of Ray whose internals are known."""

    oldest: tuple[int, int]
    newest: tuple[int, int]

    def has(self, version: str) -> bool:
        """Return whether `version`, such as 2.60.0, belongs to one of them."""
        major, minor = version.split(".")[:2]
        return self.oldest <= (int(major), int(minor)) <= self.newest

    def __str__(self) -> str:
        """Write the range as in a sentence: 2.53 to 2.60."""
        return " to ".join(f"{major}.{minor}" for major, minor in self)


RAY = RayRange(oldest=(2, 53), newest=(2, 60))
