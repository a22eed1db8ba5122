"""CPU seconds and memory of a job's processes, by role, read from /proc."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_ROLES = {
    "GradientWorker": "gradient_worker",
    "InverseWorker": "inverse_worker",
    "ParameterServer": "parameter_server",
}


def descendants() -> Iterator[int]:
    """Yield this process and all its descendants."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    waiting = [os.getpid()]
    while waiting:
        pid = waiting.pop()
        yield pid
        waiting += parents.get(pid, [])


def role_of(pid: int) -> str:
    """Return the role of a process, which Ray names after the class of its actor."""
    if pid == os.getpid():
        return "driver"
    command = _read(pid, "cmdline")
    found = [role for name, role in _ROLES.items() if command.startswith(f"ray::{name}")]
    return found[0] if found else "ray"


def cpu_seconds_by_role() -> Counter[str]:
    """Return the CPU seconds, user and system, that each role has used so far."""
    seconds: Counter[str] = Counter()
    for pid in descendants():
        if fields := _stat(pid):
            seconds[role_of(pid)] += (int(fields[11]) + int(fields[12])) / _TICKS  # type: ignore[assignment]
    return seconds


def private_bytes(pid: int) -> int:
    """Return the anonymous memory of a process; 0 if it is gone."""
    for line in _read(pid, "status").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat that follow the name; an empty list if it is gone."""
    return _read(pid, "stat").rpartition(")")[2].split()


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
