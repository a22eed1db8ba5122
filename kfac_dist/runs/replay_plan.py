"""Which steps of a recorded run a replay can repeat, and where the replay differs.

A run may have been resumed, with some steps done twice. `RunFolder.read_metrics` leaves only the
last record of each step, and `_History` does the same for the events: together they describe one
run from the first step on.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kfac_dist.config import JobSpec, KFACSpec, parse_spec
from kfac_dist.coordination.steps.recorded import InverseUse, RecordedInverses, ReplayScript
from kfac_dist.coordination.steps.recorded_members import (
    RecordedChange,
    changed_numbers,
    obstacles,
)
from kfac_dist.errors import ConflictError, KfacDistError, NotFoundError
from kfac_dist.runs.checkpoint_folder import list_checkpoints
from kfac_dist.runs.folder import RunFolder
from kfac_dist.runs.records import Event
from kfac_dist.runs.step_record import STEP_NUMBERS, StepRecord

REASON = "replay_differs"
"""The machine word for a replay that differs from the records."""


@dataclass(frozen=True, kw_only=True)
class Stop:
    """The first step that cannot be repeated, and a sentence that says why."""

    step: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class ReplayPlan:
    """What a replay of `job` does: the steps of `records`, which count from 1 without a gap.

    `spec` is the job's, with the workers and bounds of its first attempt. `stop` says why the
    replay ends early; it is None if all steps that were recorded, or asked for, are repeated.
    """

    job: str
    spec: JobSpec
    script: ReplayScript
    records: Sequence[StepRecord]
    stop: Stop | None

    @property
    def last_step(self) -> int:
        """The last step of the replay."""
        return len(self.records)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first number or tensor in which a replay differs from the records."""

    step: int
    field: str
    recorded: Any
    replayed: Any

    def __str__(self) -> str:
        """Return a sentence with both values."""
        return (
            f"step {self.step}: {self.field} is {self.replayed} in the replay and "
            f"{self.recorded} in the records"
        )


def plan_replay(folder: RunFolder, num_steps: int | None) -> ReplayPlan:
    """Plan to repeat the run in `folder`, or its first `num_steps` steps, as far as possible.

    Raises:
        NotFoundError: the run has no step.
        ConflictError: not even the first step can be repeated; the message says why.
        KfacDistError: the records are damaged, or too old to have what a replay needs.
    """
    job, records = folder.read_job(), folder.read_metrics()
    if not records:
        raise NotFoundError(f"{folder.path}: the run of job {job.job} has no step to replay")
    history = _history(folder.read_events())
    stop = _first_stop(records, history)
    possible = stop.step - 1 if stop else len(records)
    if stop is not None and possible == 0:
        raise ConflictError(f"{folder.path}: no step can be replayed: {stop.reason}")
    if num_steps is not None and num_steps <= possible:
        possible, stop = num_steps, None
    replayed = records[:possible]
    gradient_workers = changed_numbers([record.gradient_workers for record in replayed])
    script = ReplayScript(
        inverses=_inverses(replayed, folder),
        checkpoint_steps=frozenset(step for step in history.checkpoint_steps if step <= possible),
        evaluation_steps=frozenset(r.step for r in replayed if r.evaluation is not None),
        gradient_workers=gradient_workers,
    )
    spec = _replayed_spec(folder, history, script.checkpoint_steps, replayed)
    return ReplayPlan(job=job.job, spec=spec, script=script, records=replayed, stop=stop)


@dataclass(frozen=True, kw_only=True)
class _Attempt:
    """An attempt that began with `first_step`, and the settings that affect its numerics."""

    first_step: int
    arithmetic: Mapping[str, Any]


@dataclass
class _History:
    """The events that belong to the steps as they were last done."""

    attempts: list[_Attempt] = field(default_factory=list)
    checkpoint_steps: set[int] = field(default_factory=set)
    without_factors: set[int] = field(default_factory=set)
    stops: list[Stop] = field(default_factory=list)
    changes: list[RecordedChange] = field(default_factory=list)
    epoch: int = 1
    gradient_workers: int = 1

    def go_back_to(self, step: int) -> None:
        """Forget what happened after `step`: those steps are done again."""
        self.attempts = [attempt for attempt in self.attempts if attempt.first_step <= step]
        self.checkpoint_steps = {saved for saved in self.checkpoint_steps if saved <= step}
        self.without_factors = {saved for saved in self.without_factors if saved <= step}
        self.stops = [stop for stop in self.stops if stop.step <= step]
        self.changes = [change for change in self.changes if change.after_step < step]

    def start(self, event: Event) -> None:
        """Begin an attempt, with a group of its own."""
        self.attempts.append(_Attempt(first_step=event.step + 1, arithmetic=event.details))
        self.epoch = 1
        self.gradient_workers = event.details.get("gradient_workers", 1)

    def change(self, event: Event) -> None:
        """Note a change of the members; there is an event for each of them, with one epoch."""
        facts = event.details
        if facts["epoch"] == self.epoch:
            return
        self.changes.append(
            RecordedChange(
                after_step=facts["after_step"],
                workers_before=self.gradient_workers,
                repeats_step=facts["repeats_step"],
                undoes_step=facts["undoes_step"],
                loses_buffers=facts["loses_buffers"],
            )
        )
        self.epoch, self.gradient_workers = facts["epoch"], facts["gradient_workers"]


def _history(events: Iterable[Event]) -> _History:
    history = _History()
    for event in events:
        match event.kind:
            case "resumed":
                history.go_back_to(event.step)
                history.checkpoint_steps.add(event.step)
                if event.step in history.without_factors:
                    history.stops.append(_resumed_without_factors(event))
            case "started":
                history.start(event)
            case "checkpoint":
                history.checkpoint_steps.add(event.step)
            case "factors_missing":
                history.without_factors.add(event.step)
            case "inverse_worker_died":
                history.stops.append(_death(event))
            case "member_died" | "member_left" | "member_joined":
                history.change(event)
    return history


def _death(event: Event) -> Stop:
    reason = (
        f"inverse worker {event.rank} died in step {event.step}, and the averages that its "
        "successor began with are not recorded"
    )
    return Stop(step=max(event.step, 1), reason=reason)


def _resumed_without_factors(event: Event) -> Stop:
    reason = (
        f"step {event.step + 1} was resumed from a checkpoint that lacks the factors of an inverse "
        "worker (factors_missing)"
    )
    return Stop(step=event.step + 1, reason=reason)


def _first_stop(records: Sequence[StepRecord], history: _History) -> Stop | None:
    workers = {record.step: record.gradient_workers for record in records}
    stops = [*_gaps(records), *history.stops, *_changes(history, workers), *_unreported(records)]
    stops += [Stop(step=step, reason=why) for step, why in obstacles(history.changes, workers)]
    first = min(stops, key=lambda stop: stop.step, default=None)
    return first if first is not None and first.step <= len(records) else None


def _gaps(records: Sequence[StepRecord]) -> Iterator[Stop]:
    for expected, record in enumerate(records, start=1):
        if record.step != expected:
            yield Stop(step=expected, reason=f"step {expected} is not in the records")
            return


def _unreported(records: Sequence[StepRecord]) -> Iterator[Stop]:
    """Stop at the first step for which some inverse is unknown, since its shard was lost.

    It is known if the layer's inverse was the same before and afterwards.
    """
    before: dict[str, int] = {}
    stale: Collection[str] = ()
    for index, record in enumerate(records):
        if record.incomplete:
            whole = (after for after in records[index:] if not after.incomplete)
            after = next(whole, None)
            versions = {} if after is None else after.inverse_version_step
            missing = {**before, **versions}.keys() - record.inverse_version_step.keys()
            unsure = {*stale, *(() if after is None else after.stale_layers)}
            for layer in sorted(missing):
                if layer in unsure or before.get(layer) != versions.get(layer):
                    yield Stop(step=record.step, reason=_unknown(layer, record.step))
                    return
        before |= record.inverse_version_step
        stale = record.stale_layers


def _unknown(layer: str, step: int) -> str:
    return (
        f"the shard of layer {layer} was lost before it reported step {step}, so it is not "
        "recorded which inverse was used"
    )


def _changes(history: _History, workers: Mapping[int, int | None]) -> Iterator[Stop]:
    for attempt in history.attempts[1:]:
        before = history.attempts[0].arithmetic
        # The records have the number of gradient workers, and the replay changes it.
        follows = workers.get(attempt.first_step) is not None
        changed = [
            f"{name} {before.get(name)} to {value}"
            for name, value in attempt.arithmetic.items()
            if before.get(name) != value and not (follows and name == "gradient_workers")
        ]
        if changed:
            step = attempt.first_step
            yield Stop(step=step, reason=f"step {step} was resumed with {', '.join(changed)}")


def _inverses(records: Sequence[StepRecord], folder: RunFolder) -> RecordedInverses:
    gammas = {
        (layer, record.inverse_version_step.get(layer)): tuple(made_for)
        for record in reversed(records)
        for layer, made_for in record.inverse_gammas.items()
    }
    uses: dict[str, list[InverseUse]] = {}
    for record in records:
        for layer, version in record.inverse_version_step.items():
            earlier = uses.setdefault(layer, [])
            newest = earlier[-1].version_step if earlier else 0
            if version == newest:
                continue
            where = f"{folder.path}: step {record.step}: version {version} of layer {layer}"
            if not newest < version <= record.step:
                raise KfacDistError(
                    f"{where} is impossible: the layer had version {newest} before, so this one "
                    f"must lie between {newest} and {record.step}"
                )
            if (layer, version) not in gammas:
                raise KfacDistError(
                    f"{where}: the gammas that it was made for are not recorded (inverse_gammas); "
                    "the records were changed, or were written before replays were possible"
                )
            use = InverseUse(
                first_step=record.step, version_step=version, gammas=gammas[layer, version]
            )
            earlier.append(use)
    beyond = {record.step: record.stale_layers for record in records if record.stale_layers}
    return RecordedInverses(uses=uses, beyond_bound=beyond)


def _replayed_spec(
    folder: RunFolder,
    history: _History,
    checkpoint_steps: Collection[int],
    records: Sequence[StepRecord],
) -> JobSpec:
    """Return the specification with the first attempt's settings where they affect numerics.

    It keeps as many checkpoints as the run still has for these steps, so that they can be compared.
    It allows no restart: after the death of an inverse worker the replay would differ. Where the
    number of gradient workers changes, the shards have processes of their own, which stay.
    """
    spec = folder.read_spec()
    oldest = min((info.step for info in list_checkpoints(folder.places.checkpoints)), default=0)
    keep = sum(step >= oldest for step in checkpoint_steps)
    had = history.attempts[0].arithmetic if history.attempts else {}
    workers = {
        "gradient": "gradient_workers",
        "threads": "threads",
        "device": "device",
        "inverse_device": "inverse_device",
    }
    changes: dict[str, dict[str, Any]] = {
        "workers": {key: had[name] for key, name in workers.items() if name in had},
        "staleness": {"delay_steps": {}},
        "checkpoint": {"keep": max(1, keep)},
        "faults": {"max_restarts": 0},
    }
    shards = records[0].shards
    if shards is not None and changed_numbers([record.gradient_workers for record in records]):
        changes["workers"]["parameter_server"] = shards
    if "staleness_max_steps" in had:
        changes["staleness"]["max_steps"] = had["staleness_max_steps"]
    if isinstance(spec.optimizer, KFACSpec) and "precondition_dtype" in had:
        changes["optimizer"] = {"precondition_dtype": had["precondition_dtype"]}
    values = spec.model_dump(mode="json") | {"steps": len(records)}
    for section, inner in changes.items():
        values[section] |= inner
    return parse_spec(values, label=f"{folder.path}, as its first attempt was run")


def first_difference(recorded: StepRecord, replayed: StepRecord) -> Difference | None:
    """Compare two records of a step to the last bit; NaN equals NaN, as null does in JSON."""
    compared = {name for name, number in STEP_NUMBERS.items() if number.compared}
    before, after = _plain(recorded, compared), _plain(replayed, compared)
    if recorded.incomplete:  # only the layers of the shards that reported the step are known
        known, versions = before["inverse_version_step"], after["inverse_version_step"]
        after["inverse_version_step"] = {name: versions.get(name) for name in known}
    for name, value in before.items():
        if after[name] != value:
            return Difference(step=recorded.step, field=name, recorded=value, replayed=after[name])
    return None


def _plain(record: StepRecord, names: set[str]) -> dict[str, Any]:
    """Return numbers as JSON has them, in the order of the fields."""
    plain: dict[str, Any] = json.loads(record.model_dump_json(include=names))
    return plain
