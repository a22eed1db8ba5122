"""Logs by role and rank: one JSON object a line."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import cast

import structlog
from structlog.typing import FilteringBoundLogger

_TAIL_BYTES = 4000


def open_log(path: Path, **bound: object) -> FilteringBoundLogger:
    """Return a logger that appends to `path` and puts `bound` into every line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logger = structlog.wrap_logger(
        structlog.WriteLogger(path.open("a", encoding="utf-8", buffering=1)),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(default=str),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(0),
        cache_logger_on_first_use=True,
    )
    return cast("FilteringBoundLogger", logger.bind(**bound))


def redirect_output(log_path: Path) -> None:
    """Append what this process and its children print to a `.out` file beside the log.

    The file descriptors are replaced, so this covers C libraries and subprocesses too.
    """
    path = log_path.with_suffix(".out")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as printed:
        os.dup2(printed.fileno(), sys.stdout.fileno())
        os.dup2(printed.fileno(), sys.stderr.fileno())


def log_tail(path: Path) -> str:
    """Return the last lines of a log; empty if the file does not exist.

    At most 4000 bytes: of a last line that is longer, its end.
    """
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        is_cut = file.seek(0, os.SEEK_END) > _TAIL_BYTES
        file.seek(-_TAIL_BYTES if is_cut else 0, os.SEEK_END if is_cut else os.SEEK_SET)
        tail = file.read().decode("utf-8", errors="replace").strip()
    # The first line of the tail is probably cut off at its beginning.
    return tail.partition("\n")[2] or tail if is_cut else tail
