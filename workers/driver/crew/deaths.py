"""What is known of the death of a process: from Ray, from its log, from what it printed.

Ray's raylet is the parent of the workers and keeps their exit codes to itself. So a worker's log
has who called `os._exit`, and `.out` has what the interpreter says of a fatal signal.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from kfac_dist.runs.logs import log_tail
from workers.actor import EXIT_EVENT
from workers.device import DEVICE_LOST_EXIT

_PID = re.compile(r"\bpid: (\d+)")
_EXIT_TYPE = re.compile(r"Worker exit type: (\S+)")
_FATAL = "Fatal Python error: "
_KILLED = "it printed no error, as after SIGKILL: by hand, or by the system for memory"
_DEVICE_LOST = (
    f"its GPU reported an error, so it ended itself with exit code {DEVICE_LOST_EXIT}; its log has "
    "the error"
)
_LAST_LINES = 3
_LONGEST_LINE = 200


@dataclass(frozen=True, kw_only=True)
class InverseWorkerDied:
    """The death of a worker; `num_deaths` counts all deaths of this attempt, this one included.

    `pid` is None if it died before its process was known. `exit` is Ray's word for how it ended,
    or "stalled" or "preempted" if the driver killed it; `why` then says more. A preempted worker
    does not count in `num_deaths`.
    """

    rank: int
    pid: int | None
    layers: tuple[str, ...]
    exit: str
    why: str
    num_deaths: int


def pid_of(error: BaseException | None, known: int) -> int | None:
    """Return the process id of an actor that died, if the caller or Ray knows it."""
    found = _PID.search(str(error))
    return known or (int(found[1]) if found else 0) or None


def exit_type(error: BaseException | None) -> str:
    """Return Ray's word for how the process of an actor ended."""
    found = _EXIT_TYPE.search(str(error))
    return found[1] if found else type(error).__name__


def named(member: str, pid: int | None) -> str:
    """Return the member with its process id, where that is known."""
    return member if pid is None else f"{member} (pid {pid})"


def why_it_died(log: Path) -> str:
    """Return what the process with this log left behind that explains its death, as a phrase."""
    if (note := _exit_note(log_tail(log))) is not None:
        return note
    printed = log_tail(log.with_suffix(".out")).splitlines()
    fatal = [line for line in printed if line.startswith(_FATAL)]
    if fatal:
        return f"it ended by a signal: {fatal[-1].removeprefix(_FATAL)}"
    if not printed:
        return _KILLED
    last = " | ".join(line.strip()[:_LONGEST_LINE] for line in printed[-_LAST_LINES:])
    return f"the last that it printed: {last}"


def _exit_note(tail: str) -> str | None:
    """Return the note of `workers.actor` that the process called `os._exit`, if there is one."""
    for line in reversed(tail.splitlines()):
        if EXIT_EVENT in line:
            facts = json.loads(line)
            if facts["status"] == DEVICE_LOST_EXIT:
                return _DEVICE_LOST
            return f"os._exit({facts['status']}) was called at {facts['where']}"
    return None


def tails(log: Path) -> str:
    """Return the end of the log, and of what the process printed."""
    printed = log_tail(log.with_suffix(".out"))
    return "\n".join(part for part in (log_tail(log), printed) if part)
