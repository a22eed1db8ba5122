"""Files of one JSON object a line that survive a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from kfac_dist.errors import KfacDistError
from kfac_dist.runs.writing import record_of_run, unwritten, write_whole

_TAIL_BYTES = 1_000_000  # several steps of a run with very many layers


class Journal:
    """An append-only file with one JSON object a line.

    A last line without a newline was cut short by a kill: readers skip it, and the next append
    removes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None

    def append(self, line: str) -> None:
        """Append one object, given as JSON, and flush it to the operating system.

        Raises:
            JobFailedError: the file cannot be written, or is no longer at its path.
        """
        with record_of_run(self.path):
            if self._file is None:
                self._file = self._open()
            # A file that was removed takes all that is written to it, and loses it.
            if not os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
                raise unwritten(self.path, "another file has replaced it")
            self._file.write(line.encode() + b"\n")
            self._file.flush()

    def read(self, damages: list[str] | None = None) -> Iterator[dict[str, Any]]:
        """Yield the objects of all whole lines in order; nothing if the file does not exist.

        With `damages`, lines that are damaged are left out, and what is wrong is appended to it.

        Raises:
            KfacDistError: a whole line is not a JSON object.
        """
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return
                values: dict[str, Any] | None = None
                with tolerated(damages):
                    values = parse_line(self.path, number, line)
                if values is not None:
                    yield values

    def newest(self, key: str) -> int:
        """Return the value of `key` in the last line that can be read, 0 without one."""
        if not self.path.is_file():
            return 0
        with self.path.open("rb") as file:
            file.seek(max(0, self.path.stat().st_size - _TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
        for line in reversed(lines):
            try:
                return int(json.loads(line)[key])
            except (ValueError, KeyError, TypeError):  # damaged, or cut off by the tail
                continue
        return 0

    def replace(self, lines: Iterator[str]) -> None:
        """Replace all lines; a kill leaves the old ones or the new ones."""
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


@contextmanager
def tolerated(damages: list[str] | None) -> Iterator[None]:
    """Append the message of a damage that is found inside the block to `damages`, if given."""
    try:
        yield
    except KfacDistError as error:
        if damages is None:
            raise
        damages.append(error.message)


def parse_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """Return the object in a line of the journal at `path`; `number` counts lines from 1.

    Raises:
        KfacDistError: the line is not a JSON object.
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
