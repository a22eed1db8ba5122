"""Which specification may go on with a run, and whether there is anything left to do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kfac_dist.config import JobSpec
from kfac_dist.errors import ConflictError, InvalidSpecError

# These say how long, where and how safely the job runs, not what it computes.
_FREE = frozenset({"steps", "evaluation", "workers", "staleness", "checkpoint", "faults"})

_CHECKPOINT = re.compile(r"step-([0-9]+)")


def check_same_job(old: JobSpec, new: JobSpec, folder: Path) -> None:
    """Raise ConflictError when `new` would make another job of the run with `old`.

    Steps, workers, staleness, evaluation, checkpoints and faults may differ.
    """
    before = old.model_dump(mode="json", exclude=set(_FREE))
    after = new.model_dump(mode="json", exclude=set(_FREE))
    differences = list(_differences(before, after, ""))
    if differences:
        raise ConflictError(
            f"{folder}: the run in this folder is another job: {'; '.join(differences)}. Resume "
            "with its own specification, or start a new run with --run-dir"
        )


def check_steps_left(spec: JobSpec, checkpoints_dir: Path) -> None:
    """Raise InvalidSpecError when the newest checkpoint is of a later step than the last one.

    At the last step itself nothing is left to do but to evaluate.
    """
    if not checkpoints_dir.is_dir():
        return
    matches = [_CHECKPOINT.fullmatch(path.name) for path in checkpoints_dir.iterdir()]
    newest = max((int(match[1]) for match in matches if match), default=0)
    if spec.steps < newest:
        raise InvalidSpecError(
            f"steps: {spec.steps} is below the step of the newest checkpoint in "
            f"{checkpoints_dir}, {newest}, and a run does not go back; use at least {newest}, or "
            "start a new run with --run-dir"
        )


def _differences(before: Any, after: Any, path: str) -> Iterator[str]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in dict.fromkeys([*before, *after]):
            inner = f"{path}.{key}" if path else str(key)
            yield from _differences(before.get(key), after.get(key), inner)
    elif before != after:
        yield f"{path} is {before!r} there, {after!r} here"
