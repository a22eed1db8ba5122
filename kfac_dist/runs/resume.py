"""Which specifications may resume a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kfac_dist.config import JobSpec
from kfac_dist.errors import ConflictError

# These sections say how long, where and how safely the job runs, not what it computes.
_FREE = frozenset(
    {"steps", "evaluation", "workers", "staleness", "checkpoint", "faults", "storage"}
)


def check_same_job(old: JobSpec, new: JobSpec, folder: Path) -> None:
    """Raise ConflictError if `new` describes another job than the run of `old` in `folder`.

    Steps, workers, staleness, evaluation, checkpoints, faults and storage may differ.
    """
    before = old.model_dump(mode="json", exclude=set(_FREE))
    after = new.model_dump(mode="json", exclude=set(_FREE))
    differences = list(_differences(before, after, ""))
    if differences:
        raise ConflictError(
            f"{folder}: the run in this folder is another job: {'; '.join(differences)}. Resume "
            "with its own specification, or start a new run with --run-dir"
        )


def _differences(before: Any, after: Any, path: str) -> Iterator[str]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in dict.fromkeys([*before, *after]):
            inner = f"{path}.{key}" if path else str(key)
            yield from _differences(before.get(key), after.get(key), inner)
    elif before != after:
        yield f"{path} is {before!r} there, {after!r} here"
