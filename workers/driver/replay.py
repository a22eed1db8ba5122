"""A recorded run done again on this machine, and compared with its records to the last bit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kfac_dist.errors import JobFailedError, NotFoundError
from kfac_dist.runs import RunFolder, StepRecord
from kfac_dist.runs.replay_plan import REASON, Difference, ReplayPlan, first_difference
from workers.checkpoint import load_newest
from workers.driver.checkpointing import FACTORS_ROLE
from workers.driver.crew.crew import SERVER_ROLE
from workers.driver.launch import run_job
from workers.driver.records.journal import OnEvent, OnRecord
from workers.exchange.arrays import Array

# Of the server's state these depend on what came in and was not used, or count over a run.
_NOT_COMPARED = ("inverse:", "count:", "stale_applied")


@dataclass(frozen=True, kw_only=True)
class ReplayResult:
    """How a replay ended: after `num_steps`, with its run in `run_dir`.

    `checkpoint_step` is that of the checkpoint whose tensors were compared, None without any;
    `refused` has a message for each newer one that was not whole.
    """

    run_dir: Path
    num_steps: int
    difference: Difference | None
    checkpoint_step: int | None
    refused: tuple[str, ...]


class _Tensors(NamedTuple):
    """The arrays of the checkpoint of `step` that a replay must have, too; None without any."""

    step: int | None
    arrays: Mapping[str, Array]
    refused: tuple[str, ...]


@dataclass
class _Comparison:
    """Compares each step as it is recorded, and ends the job at the first difference.

    `watcher` is told of each step before.
    """

    plan: ReplayPlan
    watcher: OnRecord | None
    num_steps: int = 0
    difference: Difference | None = None

    def on_record(self, record: StepRecord) -> None:
        """Raise when the step is not what was recorded."""
        if self.watcher is not None:
            self.watcher(record)
        self.num_steps = record.step
        self.difference = first_difference(self.plan.records[record.step - 1], record)
        if self.difference is not None:
            raise JobFailedError(str(self.difference), reason=REASON)


def run_replay(
    plan: ReplayPlan,
    *,
    checkpoints_dir: Path,
    base_dir: Path,
    data_dir: Path | None,
    home: Path,
    run_dir: Path,
    on_record: OnRecord | None = None,
    on_event: OnEvent | None = None,
) -> ReplayResult:
    """Do the steps of `plan` again, in the new run folder `run_dir`, up to the first difference.

    `checkpoints_dir` has the checkpoints of the recorded run; the tensors of the newest whole one
    of a step that is done again are compared, too. User files are looked for in `base_dir`.

    Raises:
        KfacDistError: the replay cannot start, or failed by something else than a difference.
    """
    recorded = _load(checkpoints_dir, plan)
    comparison = _Comparison(plan, on_record)
    try:
        run_job(
            plan.spec,
            base_dir=base_dir,
            data_dir=data_dir,
            home=home,
            run_dir=run_dir,
            resume=False,
            on_record=comparison.on_record,
            on_event=on_event,
            replay_script=plan.script,
        )
    except JobFailedError:
        if comparison.difference is None:
            raise
    difference = comparison.difference
    if difference is None and recorded.step is not None:
        replayed_dir = RunFolder.open(run_dir).places.checkpoints
        difference = _compare(recorded.arrays, recorded.step, replayed_dir)
    return ReplayResult(
        run_dir=run_dir,
        num_steps=comparison.num_steps,
        difference=difference,
        checkpoint_step=recorded.step if comparison.difference is None else None,
        refused=recorded.refused,
    )


def _load(checkpoints_dir: Path, plan: ReplayPlan) -> _Tensors:
    """Return the tensors of the newest whole checkpoint that the replay makes again."""
    try:
        loaded = load_newest(checkpoints_dir, plan.script.checkpoint_steps)
    except NotFoundError as error:  # none is whole; the records are compared all the same
        return _Tensors(None, {}, (error.message,))
    if loaded is None:
        return _Tensors(None, {}, ())
    arrays = {
        f"{role}/{name}": array
        for role in (SERVER_ROLE, FACTORS_ROLE)
        for name, array in loaded.roles.get(role, {}).items()
        if not name.startswith(_NOT_COMPARED)
    }
    return _Tensors(loaded.step, arrays, loaded.refused)


def _compare(recorded: Mapping[str, Array], step: int, checkpoints_dir: Path) -> Difference | None:
    loaded = load_newest(checkpoints_dir, {step})
    assert loaded is not None, "a replay leaves the checkpoints of its replay_script"
    for name, array in recorded.items():
        role, _, key = name.partition("/")
        other = loaded.roles[role].get(key)
        one, replayed = _digest(array), None if other is None else _digest(other)
        if one != replayed:
            return Difference(
                step=step, field=f"checkpoint {name}", recorded=one, replayed=replayed
            )
    return None


def _digest(array: Array) -> str:
    """Return type, shape and a hash of the bytes of an array."""
    content = hashlib.sha256(array.tobytes()).hexdigest()
    return f"{array.dtype}{list(array.shape)} sha256 {content[:16]}"
