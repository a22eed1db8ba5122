"""From the reports of the actors to the record of a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields

from kfac_dist.runs import Inversion, StalenessSummary, StepRecord
from kfac_dist.runs.records import InversionResult
from workers.driver.crew.processes import GroupShape
from workers.exchange.messages import InverseHeader, InverseStatus, ServerReport, WorkerReport

# Which phases of the actors make up a phase of the record: those of the slowest gradient worker, or
# of the server. Both sides also measure how long they wait for each other, which is left out here.
# The exception is `wait_direction`: the part of preconditioning that does not overlap with the
# workers' statistics.
_WORKER_PHASES = {
    "compute": ("read", "compute"),
    "statistics": ("statistics",),
    "wait_direction": ("wait_direction",),
    "fisher_products": ("fisher_products",),
    "apply": ("apply",),
    "measure": ("measure",),
}
_SERVER_PHASES = {
    "wait_inverse": ("wait_inverse",),
    "precondition": ("precondition",),
    "broadcast": ("send_directions",),
}


# What a record takes from the server's report as it is: the fields with the same names. The others
# (inverse_gammas, numeric_events, phase_seconds) are replaced in `record`.
_REPORTED = [field.name for field in fields(ServerReport) if field.name in StepRecord.model_fields]


class StepRecords:
    """Builds the records of a job's steps, and keeps what they need from earlier steps."""

    def __init__(self, earlier: Iterable[StepRecord] = ()) -> None:
        self._inversion_seconds: dict[int, float] = {}
        self._inverse_events: dict[int, Mapping[str, int]] = {}
        self._retired_events: Counter[str] = Counter()
        self._staleness: list[StalenessSummary] = []
        self._versions: dict[str, int] = {}
        self.initial_objective: float | None = None
        for record in earlier:
            self._remember(record)

    def record(
        self,
        report: ServerReport,
        workers: Sequence[WorkerReport],
        statuses: Mapping[int, InverseStatus],
        shape: GroupShape,
        *,
        is_incomplete: bool = False,
    ) -> StepRecord:
        """Return the record of a step.

        Args:
            report: what the parameter server says of it.
            workers: what the gradient workers say of it; none if all of them were lost since.
            statuses: the health of the inverse workers by rank, when the window of the step ended.
            shape: the size of the group that did it.
            is_incomplete: whether a shard was lost before it reported the step.
        """
        reported = {name: getattr(report, name) for name in _REPORTED}
        combined = {
            "phase_seconds": self._phases(report, workers, statuses),
            "inverse_gammas": self._new_gammas(report),
            "inverse_staleness_steps": _staleness(report),
            "numeric_events": self._numeric_events(report, statuses),
            "exchanged_bytes": max(
                (w.traffic.sent_bytes + w.traffic.received_bytes for w in workers), default=0
            ),
            "num_messages": max((w.traffic.num_messages for w in workers), default=0),
            "incomplete": is_incomplete,
            **asdict(shape),
            "inverse_queue_depth": {
                str(rank): status.queue_depth for rank, status in statuses.items()
            },
            "inversions": [_inversion(header) for header in report.accepted],
        }
        record = StepRecord.model_validate(reported | combined)
        self._remember(record)
        return record

    def _new_gammas(self, report: ServerReport) -> dict[str, list[float]]:
        """Return the gammas of the versions that no earlier step used."""
        return {
            name: list(report.inverse_gammas[name])
            for name, version in report.inverse_version_step.items()
            if self._versions.get(name) != version
        }

    def _remember(self, record: StepRecord) -> None:
        if self.initial_objective is None and record.step == 1:
            self.initial_objective = record.objective
        if record.inverse_staleness_steps is not None:
            self._staleness.append(record.inverse_staleness_steps)
        self._versions |= record.inverse_version_step

    def _phases(
        self,
        report: ServerReport,
        workers: Sequence[WorkerReport],
        statuses: Mapping[int, InverseStatus],
    ) -> dict[str, float]:
        phases = {
            phase: max(
                (sum(w.phase_seconds.get(part, 0.0) for part in parts) for w in workers),
                default=0.0,
            )
            for phase, parts in _WORKER_PHASES.items()
        }
        for phase, parts in _SERVER_PHASES.items():
            phases[phase] = sum(report.phase_seconds.get(part, 0.0) for part in parts)
        # The server waits in its reduce for the slowest worker to compute.
        reduce = report.phase_seconds.get("reduce", 0.0)
        phases["reduce"] = max(0.0, reduce - phases["compute"])
        phases["inversion"] = self._new_inversion_seconds(statuses)
        return {phase: round(seconds, 6) for phase, seconds in phases.items()}

    def _new_inversion_seconds(self, statuses: Mapping[int, InverseStatus]) -> float:
        """Return the time spent inverting since the last record, over all inverse workers."""
        total = 0.0
        for rank, status in statuses.items():
            before = self._inversion_seconds.get(rank, 0.0)
            # A worker that replaced another counts from zero.
            total += status.inversion_seconds - (
                before if before <= status.inversion_seconds else 0
            )
            self._inversion_seconds[rank] = status.inversion_seconds
        return total

    def _numeric_events(
        self, report: ServerReport, statuses: Mapping[int, InverseStatus]
    ) -> dict[str, int]:
        for rank, status in statuses.items():
            now = {
                "refused_statistics": status.refused,
                "duplicate_statistics": status.duplicates,
                "late_statistics": status.late,
                "foreign_statistics": status.foreign,
                "dropped_statistics": status.dropped,
            }
            before = self._inverse_events.get(rank, {})
            if any(before.get(kind, 0) > number for kind, number in now.items()):
                self._retired_events.update(before)
            self._inverse_events[rank] = now
        events = Counter(report.numeric_events) + self._retired_events
        for counts in self._inverse_events.values():
            events.update(counts)
        return {kind: number for kind, number in sorted(events.items()) if number}

    def staleness(self) -> StalenessSummary | None:
        """Return the mean and maximum staleness over all steps; None without inverses."""
        if not self._staleness:
            return None
        return StalenessSummary(
            mean=sum(step.mean for step in self._staleness) / len(self._staleness),
            max=max(step.max for step in self._staleness),
        )


def _inversion(header: InverseHeader) -> Inversion:
    if None in header.pis:
        result: InversionResult = "failed"
    else:
        result = "rescued" if header.rungs else "ok"
    return Inversion(layer=header.layer, seconds=round(header.inversion_seconds, 6), result=result)


def _staleness(report: ServerReport) -> StalenessSummary | None:
    ages = [report.step - version for version in report.inverse_version_step.values()]
    if not ages:
        return None
    return StalenessSummary(mean=sum(ages) / len(ages), max=max(ages))
