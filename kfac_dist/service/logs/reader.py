"""Reads the next lines of all logs of a run, merged by time."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple

from kfac_dist.service.job_records import LogLine
from kfac_dist.service.logs.cursor import LogCursor
from kfac_dist.service.logs.files import (
    LogFile,
    LogFilter,
    find_logs,
    open_log_file,
    raw_lines,
    tail_offset,
)

MAX_LINES = 500
MAX_BYTES = 512 * 1024


class _Read(NamedTuple):
    """A line with its place in the merge.

    `time` never decreases within a log: a line without a time, or with an earlier one, takes that
    of the line before. `end` is the offset in bytes after the line.
    """

    time: float
    log: LogFile
    end: int
    line: LogLine


def read_lines(
    folder: Path,
    wanted: LogFilter,
    cursor: LogCursor,
    *,
    complete: bool,
    tail_lines: int | None = None,
) -> tuple[list[LogLine], LogCursor]:
    """Return the next batch of lines after `cursor`, and the cursor after them.

    Lines of one worker stay in order; lines of different workers are merged by time.

    Args:
        folder: the folder of the logs.
        wanted: the logs to read.
        cursor: where to begin in each log; logs it does not know begin at their start.
        complete: nobody writes to the logs any more, so a last line without newline is whole.
        tail_lines: begin this many lines before the end of each log that `cursor` does not know.
    """
    offsets = dict(cursor.offsets)
    lines: list[LogLine] = []
    num_bytes = 0
    with ExitStack() as stack:
        streams = []
        for log in find_logs(folder, wanted):
            file = open_log_file(folder, log)
            if file is None:
                continue
            stack.enter_context(file)
            if tail_lines is not None and log.name not in offsets:
                offsets[log.name] = tail_offset(file, tail_lines)
            streams.append(_read(file, log, offsets.get(log.name, 0), partial=complete))
        for read in heapq.merge(*streams):
            lines.append(read.line)
            num_bytes += read.end - offsets.get(read.log.name, 0)
            offsets[read.log.name] = read.end
            if len(lines) == MAX_LINES or num_bytes >= MAX_BYTES:
                break
    return lines, LogCursor(offsets=offsets)


def _read(file: IO[bytes], log: LogFile, offset: int, *, partial: bool) -> Iterator[_Read]:
    file.seek(offset)
    time = 0.0
    for raw in raw_lines(file, partial=partial):
        offset += len(raw)
        line = log.line(raw.removesuffix(b"\n").decode("utf-8", errors="replace"))
        time = max(time, line.time or 0.0)
        yield _Read(time, log, offset, line)
