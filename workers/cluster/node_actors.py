"""Small actors with which the driver reaches the nodes that its job has processes on."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from kfac_dist.runs.run_places import RunPlaces
from workers.this_node import attempt_folder, job_folder, node_id

# Large enough for a burst of lines, small enough for a message.
_MOST_BYTES = 4_000_000

# Ray's type stubs do not have what is used here.
_remote: Any = ray.remote


class Arrivals:
    """Knows on which nodes processes of the job have begun; beside the driver."""

    def __init__(self) -> None:
        self._nodes: dict[str, None] = {}

    def note(self, node: str) -> None:
        """Note a node."""
        self._nodes[node] = None

    def nodes(self) -> list[str]:
        """Return the nodes that were noted, in the order of arrival."""
        return list(self._nodes)


class NodeKeeper:
    """Reads and removes what the processes of a job write on one node.

    It keeps no state, so Ray may start it again.
    """

    def __init__(self, job: str, attempt: int) -> None:
        self._folder = job_folder(job, node_id())
        self._places = RunPlaces(attempt_folder(job, attempt, node_id()))
        for path in self._folder.glob("a*"):  # of attempts whose driver was killed
            if path != self._places.folder:
                shutil.rmtree(path, ignore_errors=True)

    def read(self, known: Mapping[str, int], *, whole_lines: bool) -> dict[str, bytes]:
        """Return what each log has beyond the `known` number of bytes, at most 4 MB in all.

        Args:
            known: by the name of a log, how many of its bytes the driver has.
            whole_lines: leave a last line that has no end yet for the next time.
        """
        left, found = _MOST_BYTES, {}
        for path in sorted(self._places.logs.glob("*")):
            if RunPlaces.parse_log_name(path.name) is None:
                continue
            chunk = _read(path, known.get(path.name, 0), left)
            if whole_lines and len(chunk) < left:
                chunk = chunk[: chunk.rfind(b"\n") + 1]
            if chunk:
                found[path.name] = chunk
                left -= len(chunk)
            if not left:
                break
        return found

    def remove(self) -> None:
        """Remove everything of the job from this node."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _read(path: Path, start: int, most: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(most)


ArrivalsActor: Any = _remote(num_cpus=0, max_restarts=0)(Arrivals)
NodeKeeperActor: Any = _remote(num_cpus=0, max_restarts=-1)(NodeKeeper)
