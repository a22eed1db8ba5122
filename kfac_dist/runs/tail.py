"""Following a journal while another process writes it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kfac_dist.runs.json_lines import parse_line


class JournalTail:
    """Reads each whole line of a journal once; every call resumes where the last one stopped.

    If the journal was replaced by another file, reading starts again at the first line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rewind()

    def rewind(self) -> None:
        """Start again at the first line."""
        self._inode: int | None = None
        self._offset = 0
        self._line = 0

    def read(self, most: int) -> list[tuple[int, dict[str, Any]]]:
        """Return at most `most` new objects, each with the number of its line, from 1.

        Raises:
            KfacDistError: a whole line is not a JSON object.
        """
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return []
        found: list[tuple[int, dict[str, Any]]] = []
        with file:
            self._check_replaced(file.fileno())
            file.seek(self._offset)
            while len(found) < most:
                line = file.readline()
                if not line.endswith(b"\n"):  # the end, or a line still being written
                    break
                self._offset += len(line)
                self._line += 1
                found.append((self._line, parse_line(self._path, self._line, line)))
        return found

    def _check_replaced(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        if status.st_ino != self._inode or status.st_size < self._offset:
            self.rewind()
            self._inode = status.st_ino
