"""Turns an exception into a message on stderr and an exit code. Stdout stays clean.

Each line of a message begins with `error: `; with `-o json` there is one object
`{"error": {"type", "message", "exit_code"}}` instead. An exception that is not a KfacDistError is
a bug: its traceback goes into a file, and the exit code is 70.
"""

from __future__ import annotations

import errno
import json
import os
import select
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import IO

import typer

from kfac_dist.cli.environment import home
from kfac_dist.cli.terminal import plain
from kfac_dist.errors import KfacDistError

INTERRUPTED = 130
_USAGE, _ABORTED, _INTERNAL = 2, 1, 70


class Interrupted(Exception):  # noqa: N818 - not an error
    """An interrupt with a hint about what happens now and how to continue.

    It is not a KeyboardInterrupt, which typer would turn into a bare exit code. With `-o json`,
    `facts` are added to the object.
    """

    def __init__(self, hint: str, facts: Mapping[str, object] | None = None) -> None:
        super().__init__(hint)
        self.hint = hint
        self.facts = facts or {}


def output_closed() -> int | None:
    """Return the exit code if the reader of this command's output has gone, as `| head` does.

    The reader has what it wanted, so that is 0. None if the output is still read.
    """
    closed = [stream for stream in (sys.stdout, sys.stderr) if _has_no_reader(stream)]
    for stream in closed:  # what is still buffered must not fail at the end of the process
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return 0 if closed else None


def _has_no_reader(stream: IO[str]) -> bool:
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)
    except (OSError, ValueError):  # not a file, or closed
        return False
    return any(happened & (select.POLLERR | select.POLLNVAL) for _, happened in poll.poll(0))


def as_exit_code(error: BaseException, arguments: Sequence[str]) -> int:
    """Write the message of `error` and return the exit code; `arguments` is the command line."""
    kind, message, code = _describe(error)
    if _wants_json(arguments):
        facts = error.facts if isinstance(error, Interrupted) else {}
        body = {"type": kind, "message": message, "exit_code": code, **facts}
        _say(json.dumps({"error": body}, ensure_ascii=False))
    else:
        for line in message.splitlines():
            _say(line if code == INTERRUPTED else f"error: {line}")
    return code


def _describe(error: BaseException) -> tuple[str, str, int]:
    kind = type(error).__name__
    if isinstance(error, KfacDistError):
        return kind, error.message, error.exit_code
    if isinstance(error, Interrupted):
        return kind, f"interrupted; {error.hint}", INTERRUPTED
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted", "interrupted", INTERRUPTED
    if isinstance(error, typer.TyperException):
        return "UsageError", f"{error.format_message()} (see --help)", _USAGE
    if isinstance(error, typer.Abort):
        return "Aborted", "aborted", _ABORTED
    report = _write_traceback(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS):
        return kind, f"{error.strerror}: {error.filename} (details: {report})", _ABORTED
    text = f"internal error ({kind}: {error}); please report it with {report}"
    return "InternalError", text, _INTERNAL


def _write_traceback(error: BaseException) -> Path:
    """Write the traceback into the home folder, else into a temporary one, and return its path."""
    text = "".join(traceback.format_exception(error))
    name = time.strftime("crash-%Y%m%d-%H%M%S.log")
    try:
        folder = home() / "crashes"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="kfac_dist-"))
        (folder / name).write_text(text)
    return folder / name


def _wants_json(arguments: Sequence[str]) -> bool:
    """Return whether the command line, which may have failed to parse, asks for JSON."""
    options = {"-ojson", "--output=json"} & set(arguments)
    return bool(options) or any(
        option in ("-o", "--output") and value == "json" for option, value in pairwise(arguments)
    )


def _say(line: str) -> None:
    try:
        sys.stderr.write(plain(line) + "\n")
        sys.stderr.flush()
    except OSError:  # nobody reads it: the pipe or the terminal is gone
        output_closed()
