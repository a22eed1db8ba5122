"""The log files of a run: find them, filter them by their names, and read their lines."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO

from kfac_dist.runs.run_places import RunPlaces
from kfac_dist.service.job_records import LogLine

MAX_LINE_BYTES = 64 * 1024
"""Longer lines are sent in pieces of this size."""


@dataclass(frozen=True, kw_only=True)
class LogFilter:
    """Which workers' lines are wanted; an empty set wants all."""

    roles: frozenset[str] = frozenset()
    ranks: frozenset[int] = frozenset()
    attempts: frozenset[int] = frozenset()

    def wants(self, file: LogFile) -> bool:
        """Return whether lines of this file are wanted."""
        return (
            (not self.roles or file.role in self.roles)
            and (not self.ranks or file.rank in self.ranks)
            and (not self.attempts or file.attempt in self.attempts)
        )


@dataclass(frozen=True, kw_only=True, order=True)
class LogFile:
    """The log of one worker in one attempt."""

    attempt: int
    role: str
    rank: int
    name: str

    @classmethod
    def named(cls, name: str) -> LogFile | None:
        """Return the log with this file name, None if logs have no such names."""
        parsed = RunPlaces.parse_log_name(name)
        return cls(**parsed._asdict(), name=name) if parsed else None

    def line(self, text: str) -> LogLine:
        """Return a line of this log as a record."""
        return LogLine(
            role=self.role, rank=self.rank, attempt=self.attempt, text=text, time=_time(text)
        )


def find_logs(folder: Path, wanted: LogFilter) -> list[LogFile]:
    """Return the logs in `folder`, older attempts first; a missing folder has no logs."""
    try:
        names = os.listdir(folder)  # noqa: PTH208 - only names are needed, not paths
    except FileNotFoundError:
        return []
    logs = [log for name in names if (log := LogFile.named(name)) is not None]
    return sorted(log for log in logs if wanted.wants(log))


def open_log_file(folder: Path, log: LogFile) -> IO[bytes] | None:
    """Open a log; return None if it is not a plain file, since a link could lead anywhere."""
    try:
        descriptor = os.open(folder / log.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    # Checked after opening: the name could be made a link between a check and the opening.
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        return None
    return os.fdopen(descriptor, "rb")


def raw_lines(file: IO[bytes], *, partial: bool) -> Iterator[bytes]:
    """Yield lines with their newlines, long ones in pieces.

    A last line without a newline is still being written; it is left out unless `partial`.
    """
    while line := file.readline(MAX_LINE_BYTES):
        if line.endswith(b"\n") or len(line) == MAX_LINE_BYTES or partial:
            yield line
        else:
            return


def tail_offset(file: IO[bytes], num_lines: int) -> int:
    """Return the offset in bytes at which the file's last `num_lines` lines begin."""
    end = file.seek(0, os.SEEK_END)
    if num_lines == 0:
        return end
    position, newlines = end, 0
    while position > 0:
        start = max(0, position - MAX_LINE_BYTES)
        file.seek(start)
        block = file.read(position - start)
        for index in range(len(block) - 1, -1, -1):
            if block[index] == 0x0A and start + index + 1 < end:
                newlines += 1
                if newlines == num_lines:
                    return start + index + 1
        position = start
    return 0


def _time(text: str) -> float | None:
    """Return the time in a line of kfac_dist's own logs, None for any other line."""
    if not text.startswith("{"):
        return None
    try:
        return datetime.fromisoformat(json.loads(text)["timestamp"]).timestamp()
    except (ValueError, KeyError, TypeError):
        return None
