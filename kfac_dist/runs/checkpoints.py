"""Which checkpoints a run has; `workers.checkpoint_folder` writes them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# A checkpoint that is being replaced by another of the same step keeps its place under this
# ending until the new one is there, so that no moment has neither.
REPLACED = ".replaced"
_FOLDER_NAME = re.compile(r"step-([0-9]{8,})(\.replaced)?")


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """A checkpoint folder, not verified."""

    step: int
    path: Path


def list_checkpoints(folder: Path) -> tuple[CheckpointInfo, ...]:
    """Return the checkpoints in `folder`, newest first; none when there is no such folder."""
    if not folder.is_dir():
        return ()
    matches = [(_FOLDER_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    found = [(int(m[1]), m[2] is None, path) for m, path in matches if m and path.is_dir()]
    found.sort(reverse=True)
    return tuple(CheckpointInfo(step=step, path=path) for step, _, path in found)
