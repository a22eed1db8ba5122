"""The project's pages in Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.paths import ROOT

# Folders that are no part of the project, or hold what others wrote.
FOREIGN = {".git", ".venv", "node_modules", "runs", "shared", "build"}


def pages() -> Iterator[Path]:
    for path in sorted(ROOT.rglob("*.md")):
        if not FOREIGN & set(path.relative_to(ROOT).parts):
            yield path
