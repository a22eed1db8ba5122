"""Repeats a recorded run on this machine and compares it with its records to the last bit."""

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
from workers.driver.crew.processes import SERVER_ROLE
from workers.driver.launch import run_job
from workers.driver.records.journal import OnEvent, OnRecord
from workers.exchange.arrays import Array

# Parts of the server's state that depend on inverses that arrived and were not used, or that count
# over a whole run.
_NOT_COMPARED = ("inverse:", "count:", "stale_applied")


@dataclass(frozen=True, kw_only=True)
class ReplayResult:
    """The end of a replay: it did `num_steps` steps, and its records are in `run_dir`.

    `difference` is the first one found, None if all is equal. `checkpoint_step` is the step of the
    checkpoint whose tensors were compared, None if none was. `refused` has a message for each
    newer checkpoint that is damaged.
    """

    run_dir: Path
    num_steps: int
    difference: Difference | None
    checkpoint_step: int | None
    refused: tuple[str, ...]


class _Tensors(NamedTuple):
    """The arrays that a replay must reproduce at `step`; None if no checkpoint has any."""

    step: int | None
    arrays: Mapping[str, Array]
    refused: tuple[str, ...]


@dataclass
class _Comparison:
    """Compares each step as it is recorded, and ends the job at the first difference.

    `watcher` is called with each step first.
    """

    plan: ReplayPlan
    watcher: OnRecord | None
    num_steps: int = 0
    difference: Difference | None = None

    def on_record(self, record: StepRecord) -> None:
        """Raise a JobFailedError if the step differs from the recorded one."""
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
    """Repeat the steps of a recorded run up to the first difference.

    Args:
        plan: the specification, the records and the script of the recorded run.
        checkpoints_dir: the checkpoints of the recorded run. The tensors of the newest whole one
            that the replay writes again are compared as well.
        base_dir: the folder of the user's files that a task may need.
        data_dir: the folder in which data are looked for first, before the cache.
        home: has the data cache.
        run_dir: the new run folder of the replay.
        on_record: called with each step, before it is compared.
        on_event: called with each event.

    Raises:
        KfacDistError: the replay cannot start, or failed for a reason other than a difference.
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
    """Return the tensors of the newest whole checkpoint that the replay will write again."""
    try:
        loaded = load_newest(checkpoints_dir, plan.script.checkpoint_steps)
    except NotFoundError as error:  # all are damaged; the records are still compared
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
    assert loaded is not None, "a replay writes the checkpoints of its script"
    for name, array in recorded.items():
        role, _, key = name.partition("/")
        other = loaded.roles.get(role, {}).get(key)
        expected, found = _digest(array), None if other is None else _digest(other)
        if expected != found:
            return Difference(
                step=step, field=f"checkpoint {name}", recorded=expected, replayed=found
            )
    return None


def _digest(array: Array) -> str:
    """Return the type, the shape and a hash of the bytes of an array."""
    content = hashlib.sha256(array.tobytes()).hexdigest()
    return f"{array.dtype}{list(array.shape)} sha256 {content[:16]}"
