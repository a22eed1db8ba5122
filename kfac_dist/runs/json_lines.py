"""Files of one JSON object a line that survive a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from kfac_dist.errors import KfacDistError
from kfac_dist.runs.writing import write_whole


class Journal:
    """An append-only file of JSON objects, one a line.

    A line without its newline is what a kill left behind: readers pass over it, and the first
    append after it removes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None

    def append(self, line: str) -> None:
        """Append one object, already in JSON, and hand it to the operating system."""
        if self._file is None:
            self._file = self._open()
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the whole objects in order; none when there is no file.

        Raises:
            KfacDistError: a line that was written whole is not JSON any more.
        """
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    yield parse_line(self.path, number, line)

    def replace(self, lines: Iterator[str]) -> None:
        """Put other lines in the place of all there are."""
        self.close()
        write_whole(self.path, "".join(f"{line}\n" for line in lines))

    def close(self) -> None:
        """Close the file; the next append opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> IO[bytes]:
        file = self.path.open("ab")
        _remove_torn_tail(self.path)
        return file


def parse_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """Return the object in a whole line, the `number`-th from 1, of the journal at `path`.

    Raises:
        KfacDistError: it is no JSON object.
    """
    try:
        values = json.loads(line)
    except ValueError as error:
        raise KfacDistError(f"{path}: line {number} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise KfacDistError(f"{path}: line {number} is not a JSON object")
    return values


def _remove_torn_tail(path: Path) -> None:
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)
