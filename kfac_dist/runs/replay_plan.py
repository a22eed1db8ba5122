"""What of a recorded run can be done again, and whether it was the same.

Records hide the steps that a resumed attempt did again, and so do the events here: what is left is
one run, from the first step on.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kfac_dist.config import JobSpec, KFACSpec, parse_spec
from kfac_dist.coordination.steps.recorded import InverseUse, RecordedInverses, ReplayScript
from kfac_dist.errors import ConflictError, KfacDistError, NotFoundError
from kfac_dist.runs.checkpoint_folder import list_checkpoints
from kfac_dist.runs.folder import RunFolder
from kfac_dist.runs.records import Event, StepRecord

REASON = "replay_differs"
"""The machine word of a replay that is not what was recorded."""

_COMPARED = (
    "inverse_version_step",
    "loss",
    "objective",
    "num_cases",
    "alpha",
    "mu",
    "damping",
    "gamma",
    "lr",
    "update_norm",
    "predicted_change",
    "reduction_ratio",
)


@dataclass(frozen=True, kw_only=True)
class Stop:
    """The first step that cannot be done again, and a sentence that says why."""

    step: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class ReplayPlan:
    """What is done again of `job`: the steps of `records`, which count from 1 without a gap.

    `spec` is the job's with the workers and bounds that its first attempt had. `stop` is None where
    nothing that was recorded, or asked for, is left out.
    """

    job: str
    spec: JobSpec
    script: ReplayScript
    records: Sequence[StepRecord]
    stop: Stop | None

    @property
    def last_step(self) -> int:
        """The last step that is done again."""
        return len(self.records)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first thing in which a replay is not what was recorded."""

    step: int
    field: str
    recorded: Any
    replayed: Any

    def __str__(self) -> str:
        """Say it with both values."""
        return (
            f"step {self.step}: {self.field} is {self.replayed} in the replay and "
            f"{self.recorded} in the records"
        )


def plan_replay(folder: RunFolder, num_steps: int | None) -> ReplayPlan:
    """Return what of the run in `folder` can be done again, the first `num_steps` at most.

    Raises:
        NotFoundError: it has no step.
        ConflictError: its first step cannot be done again; the message says why.
        KfacDistError: the records are damaged, or too old to have what is needed.
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
    script = ReplayScript(
        inverses=_inverses(replayed, folder),
        checkpoint_steps=frozenset(step for step in history.checkpoint_steps if step <= possible),
        evaluation_steps=frozenset(r.step for r in replayed if r.evaluation is not None),
    )
    spec = _replayed_spec(folder, history, script.checkpoint_steps, possible)
    return ReplayPlan(job=job.job, spec=spec, script=script, records=replayed, stop=stop)


@dataclass(frozen=True, kw_only=True)
class _Attempt:
    """What decides about the numbers of an attempt, which began with `first_step`."""

    first_step: int
    arithmetic: Mapping[str, Any]


@dataclass
class _History:
    """The events that belong to the steps that are left."""

    attempts: list[_Attempt] = field(default_factory=list)
    checkpoint_steps: set[int] = field(default_factory=set)
    without_factors: set[int] = field(default_factory=set)
    stops: list[Stop] = field(default_factory=list)

    def go_back_to(self, step: int) -> None:
        """Forget what came of the steps after `step`, which were done again."""
        self.attempts = [one for one in self.attempts if one.first_step <= step]
        self.checkpoint_steps = {one for one in self.checkpoint_steps if one <= step}
        self.without_factors = {one for one in self.without_factors if one <= step}
        self.stops = [one for one in self.stops if one.step <= step]


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
                attempt = _Attempt(first_step=event.step + 1, arithmetic=event.details)
                history.attempts.append(attempt)
            case "checkpoint":
                history.checkpoint_steps.add(event.step)
            case "factors_missing":
                history.without_factors.add(event.step)
            case "inverse_worker_died":
                history.stops.append(_death(event))
    return history


def _death(event: Event) -> Stop:
    reason = (
        f"inverse worker {event.rank} died in step {event.step}, and what its successor averaged "
        "then is not recorded"
    )
    return Stop(step=max(event.step, 1), reason=reason)


def _resumed_without_factors(event: Event) -> Stop:
    reason = (
        f"step {event.step + 1} was resumed from a checkpoint that lacks the factors of an inverse "
        "worker (factors_missing)"
    )
    return Stop(step=event.step + 1, reason=reason)


def _first_stop(records: Sequence[StepRecord], history: _History) -> Stop | None:
    stops = [*_gaps(records), *history.stops, *_changes(history)]
    first = min(stops, key=lambda stop: stop.step, default=None)
    return first if first is not None and first.step <= len(records) else None


def _gaps(records: Sequence[StepRecord]) -> Iterator[Stop]:
    for expected, record in enumerate(records, start=1):
        if record.step != expected:
            yield Stop(step=expected, reason=f"step {expected} is not in the records")
            return


def _changes(history: _History) -> Iterator[Stop]:
    for attempt in history.attempts[1:]:
        before = history.attempts[0].arithmetic
        changed = [
            f"{name} {before.get(name)} to {value}"
            for name, value in attempt.arithmetic.items()
            if before.get(name) != value
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
            of_layer = uses.setdefault(layer, [])
            newest = of_layer[-1].version_step if of_layer else 0
            if version == newest:
                continue
            where = f"{folder.path}: step {record.step}: version {version} of layer {layer}"
            if not newest < version <= record.step:
                raise KfacDistError(
                    f"{where} cannot be: it was version {newest} before, so it must be between "
                    f"{newest} and {record.step}"
                )
            if (layer, version) not in gammas:
                raise KfacDistError(
                    f"{where}: for which gammas it was made is not recorded (inverse_gammas); the "
                    "records were changed, or were written before replays were possible"
                )
            use = InverseUse(
                first_step=record.step, version_step=version, gammas=gammas[layer, version]
            )
            of_layer.append(use)
    beyond = {record.step: record.stale_layers for record in records if record.stale_layers}
    return RecordedInverses(uses=uses, beyond_bound=beyond)


def _replayed_spec(
    folder: RunFolder, history: _History, checkpoint_steps: Collection[int], num_steps: int
) -> JobSpec:
    """Return the specification as the first attempt had it where that decides about numbers.

    The checkpoints of the steps of which the run still has some are kept. A death of an inverse
    worker ends a replay: it could not be what was recorded any more.
    """
    spec = folder.read_spec()
    oldest = min((info.step for info in list_checkpoints(folder.checkpoints_dir)), default=0)
    keep = sum(step >= oldest for step in checkpoint_steps)
    had = history.attempts[0].arithmetic if history.attempts else {}
    workers = {"gradient": "gradient_workers", "threads": "threads", "device": "device"}
    changes: dict[str, dict[str, Any]] = {
        "workers": {key: had[name] for key, name in workers.items() if name in had},
        "staleness": {"delay_steps": {}},
        "checkpoint": {"keep": max(1, keep)},
        "faults": {"max_restarts": 0},
    }
    if "staleness_max_steps" in had:
        changes["staleness"]["max_steps"] = had["staleness_max_steps"]
    if isinstance(spec.optimizer, KFACSpec) and "precondition_dtype" in had:
        changes["optimizer"] = {"precondition_dtype": had["precondition_dtype"]}
    values = spec.model_dump(mode="json") | {"steps": num_steps}
    for section, inner in changes.items():
        values[section] |= inner
    return parse_spec(values, label=f"{folder.path}, as its first attempt was run")


def first_difference(recorded: StepRecord, replayed: StepRecord) -> Difference | None:
    """Compare two records of a step to the last bit; NaN equals NaN, as null does in JSON."""
    for name in _COMPARED:
        one, other = _plain(recorded, name), _plain(replayed, name)
        if one != other:
            return Difference(step=recorded.step, field=name, recorded=one, replayed=other)
    return None


def _plain(record: StepRecord, name: str) -> Any:
    return json.loads(record.model_dump_json(include={name}))[name]
