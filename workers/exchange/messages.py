"""What the driver and the actors send each other: frozen dataclasses, with units in the names.

Steps count from 1. Statistics and inverses travel as messages of two parts: a header, defined
here, and a parcel of arrays (`workers.exchange.parcels`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kfac_dist.config import JobSpec
from kfac_dist.coordination.steps.assignment import CostModel, LayerCost
from kfac_dist.coordination.steps.plan import StepPlan
from kfac_dist.coordination.steps.recorded import BeyondBound, ReplayScript
from kfac_dist.coordination.steps.sampling import BatchWindow
from kfac_dist.core.factors import Link
from kfac_dist.core.passes.target_range import TargetRange
from workers.exchange.parcels import InverseParcel, StatisticsParcel

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class JobContext:
    """What every actor needs to build its part of a job; paths are those of its own machine.

    With a `replay_script` the job repeats a recorded one. `allowed_targets` are those that the
    model's outputs allow, None if all are possible. Without `delivery` all are on one machine.
    """

    job: str
    attempt: int
    spec: JobSpec
    base_dir: Path
    data_dir: Path | None
    cache_dir: Path
    run_dir: Path
    replay_script: ReplayScript | None = None
    allowed_targets: TargetRange | None = None
    delivery: Delivery | None = None


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """How the files of a job reach the nodes other than `driver_node`, Ray's name of a node.

    `code` refers to the user's code as a package, None where the task needs none. `data_url` is
    where data sets are fetched from, None if they are in folders. `arrivals` is an actor, which
    processes on other nodes tell where they are.
    """

    driver_node: str
    code: Any | None
    data_url: str | None
    arrivals: Any


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """Where the members of a process group meet.

    The driver hosts the store. Ranks 0..N-1 are the gradient workers, the shards of the parameter
    server follow. `epoch` numbers the group: members of different epochs never meet.
    `step` is the last one before it.
    """

    host: str
    port: int
    epoch: int
    num_gradient_workers: int
    num_shards: int
    step: int
    timeout_seconds: float


@dataclass(frozen=True, kw_only=True)
class MemberPlace:
    """The roles of a process: gradient worker `worker`, shard `shard` of `num_shards`, or both."""

    worker: int | None
    shard: int | None
    num_shards: int


@dataclass(frozen=True, kw_only=True)
class StepOrder:
    """One step, from the driver to all gradient workers and shards of the parameter server."""

    plan: StepPlan
    window: BatchWindow


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What a member has sent to others and received: bytes of tensors, and how many tensors."""

    sent_bytes: int = 0
    received_bytes: int = 0
    num_messages: int = 0


@dataclass(frozen=True, kw_only=True)
class WorkerReport:
    """What a gradient worker reports after a step; `phase_seconds` has the time of each phase.

    `traffic` is what it exchanged with the parameter server: gradients, directions and numbers.
    """

    phase_seconds: Mapping[str, float]
    traffic: Traffic


@dataclass(frozen=True, kw_only=True)
class StepDecision:
    """What the deciding shard knows of a step; the fields are those of `ServerReport`."""

    applied: bool
    parameter_version: int
    loss: float
    objective: float
    num_cases: int
    alpha: float | None
    mu: float | None
    update_norm: float
    predicted_change: float | None
    reduction_ratio: float | None
    damping: float | None
    gamma: float | None
    lr: float | None
    next_gammas: tuple[float, ...]
    fisher_noise: float | None = None
    open_search: tuple[float, ...] = ()
    accepted_statistics: bool | None = None
    refused_in_a_row: int = 0


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What a shard of the parameter server reports after a step.

    The fields are those of `ServerReport`, for the layers of the shard. `decision` is the first
    shard's. `traffic` is what the shard exchanged with all others.
    """

    step: int
    decision: StepDecision | None
    inverse_version_step: Mapping[str, int]
    inverse_gammas: Mapping[str, tuple[float, ...]]
    stale_layers: Mapping[str, BeyondBound]
    accepted: tuple[InverseHeader, ...]
    stale_applied_total: int
    numeric_events: Mapping[str, int]
    waited_seconds: float
    phase_seconds: Mapping[str, float]
    traffic: Traffic
    step_seconds: float
    time: float


@dataclass(frozen=True, kw_only=True)
class MemberReport:
    """What a process of the group reports after a step, as a gradient worker and as a shard."""

    worker: WorkerReport | None
    shard: ShardReport | None


@dataclass(frozen=True, kw_only=True)
class ServerReport:
    """What the parameter server reports after a step.

    A field that a first-order optimizer does not have is None, empty or 0 there.

    Attributes:
        applied: whether the parameters were updated.
        loss: mean over the batch before the update, in nats a case.
        objective: `loss` with the l2 term added.
        parameter_version: number of updates applied so far in the job.
        next_gammas: the gammas to invert with in the next step.
        fisher_noise: the noise of the last Fisher products along a direction, infinite before the
            first.
        open_search: the gammas of a search that is due and not decided.
        accepted_statistics: whether the statistics of this step were accepted; None without any.
        inverse_version_step: for each layer, the step of the newest statistics in the inverse
            that was used.
        inverse_gammas: for each layer, the gammas that this version was made for.
        stale_layers: the layers whose inverse was older than the staleness bound, and how it
            was used.
        accepted: headers of the inverses that arrived since the last report.
        stale_applied_total: uses of such an inverse in applied steps, so far in the job.
        numeric_events: numeric trouble so far in the job, counted by kind.
        refused_in_a_row: number of updates of the factors up to this step that were refused, one
            after the other, although the gradients were finite.
        waited_seconds: how long this step waited for inverses.
        phase_seconds: the time of each phase of this step.
        step_seconds: the time of the whole step.
        time: when it ended, in Unix time.
    """

    step: int
    applied: bool
    loss: float
    objective: float
    num_cases: int
    parameter_version: int
    alpha: float | None
    mu: float | None
    update_norm: float
    predicted_change: float | None
    reduction_ratio: float | None
    damping: float | None
    gamma: float | None
    lr: float | None
    next_gammas: tuple[float, ...]
    inverse_version_step: Mapping[str, int]
    inverse_gammas: Mapping[str, tuple[float, ...]]
    stale_layers: Mapping[str, BeyondBound]
    accepted: tuple[InverseHeader, ...]
    stale_applied_total: int
    numeric_events: Mapping[str, int]
    waited_seconds: float
    phase_seconds: Mapping[str, float]
    step_seconds: float
    time: float
    fisher_noise: float | None = None
    open_search: tuple[float, ...] = ()
    accepted_statistics: bool | None = None
    refused_in_a_row: int = 0


def merge_reports(reports: Sequence[ShardReport], names: Sequence[str]) -> ServerReport:
    """Return the report of the whole server from those of its shards, the first one's first.

    Layers are in the order of `names`. A phase takes as long as in the slowest shard.
    """
    first = reports[0]
    assert first.decision is not None, "the first shard decides"
    versions = _joined(report.inverse_version_step for report in reports)
    gammas = _joined(report.inverse_gammas for report in reports)
    used = [name for name in names if name in versions]
    phases = {phase for report in reports for phase in report.phase_seconds}
    events: Counter[str] = Counter()
    for report in reports:
        events.update(report.numeric_events)
    return ServerReport(
        **vars(first.decision),
        step=first.step,
        inverse_version_step={name: versions[name] for name in used},
        inverse_gammas={name: gammas[name] for name in used},
        stale_layers=_joined(report.stale_layers for report in reports),
        accepted=tuple(header for report in reports for header in report.accepted),
        stale_applied_total=sum(report.stale_applied_total for report in reports),
        numeric_events=dict(events),
        waited_seconds=max(report.waited_seconds for report in reports),
        phase_seconds={
            phase: max(report.phase_seconds.get(phase, 0.0) for report in reports)
            for phase in sorted(phases)
        },
        step_seconds=max(report.step_seconds for report in reports),
        time=max(report.time for report in reports),
    )


def _joined(mappings: Iterable[Mapping[str, T]]) -> dict[str, T]:
    return {name: value for mapping in mappings for name, value in mapping.items()}


@dataclass(frozen=True, kw_only=True)
class StatisticsHeader:
    """Describes sums of batch factors of `layers` over all `num_cases` cases of a step.

    `usable` is False where a number of some gradient worker was not finite; the message then has
    no parcel, and every inverse worker refuses the step.
    """

    job: str
    step: int
    num_cases: int
    layers: tuple[str, ...]
    assignment_epoch: int
    usable: bool


@dataclass(frozen=True, kw_only=True)
class StatisticsMessage:
    """Statistics of a step for some layers, on their way to the inverse worker that owns them."""

    header: StatisticsHeader
    parcel: StatisticsParcel | None


@dataclass(frozen=True, kw_only=True)
class RefreshRequest:
    """Asks an inverse worker to invert every layer with each of `gammas`.

    A newer request replaces an older one, unless the older one is `exact`: then statistics of
    later steps wait until every layer has been inverted for it.

    Attributes:
        min_statistics_step: a layer is inverted only after the statistics of this step have been
            averaged or refused.
        gammas_by_layer: if given, only these layers are inverted, each with its own gammas.
    """

    step: int
    gammas: tuple[float, ...]
    min_statistics_step: int
    exact: bool = False
    gammas_by_layer: Mapping[str, tuple[float, ...]] | None = None

    def gammas_of(self, layer: str) -> tuple[float, ...] | None:
        """Return the gammas to invert a layer with, None if it is not to be inverted."""
        if self.gammas_by_layer is None:
            return self.gammas
        return self.gammas_by_layer.get(layer)


@dataclass(frozen=True, kw_only=True)
class InverseHeader:
    """Describes the inverses of one layer, one for each of `gammas`.

    `version_step` is the step of the newest statistics in them. `pis` has one entry for each
    gamma, None where the inversion failed; the parcel holds the other inverses, in order.
    """

    layer: str
    version_step: int
    gammas: tuple[float, ...]
    pis: tuple[float | None, ...]
    rungs: tuple[str, ...]
    inversion_seconds: float


@dataclass(frozen=True, kw_only=True)
class InverseMessage:
    """The inverses of one layer, on their way from an inverse worker to the parameter server."""

    header: InverseHeader
    parcel: InverseParcel


@dataclass(frozen=True, kw_only=True)
class InverseSetup:
    """What an inverse worker is started with.

    Attributes:
        links: from its layers to the next layer of a chain, which another worker may own.
        assignment_epoch: numbers the workers that have had this rank, from 1; statistics sent to
            a predecessor are ignored.
        applied_step: the step of the newest statistics in the averages it starts from.
        exact_step: exact versions up to this step have been made; None if the next version
            does not have to be exact.
        catches_up: it gets again what a predecessor got, and learns which steps to expect.
    """

    rank: int
    layers: tuple[LayerCost, ...]
    links: tuple[Link, ...]
    cost_model: CostModel
    assignment_epoch: int
    applied_step: int
    exact_step: int | None
    catches_up: bool = False


@dataclass(frozen=True, kw_only=True)
class InverseStatus:
    """The health of an inverse worker; counters grow over its life.

    `queue_depth` counts the messages not yet read and the layers not yet refreshed.
    `inversion_seconds` is the sum over all inversions.
    """

    pid: int
    queue_depth: int
    inversion_seconds: float
    duplicates: int
    late: int
    foreign: int
    dropped: int
    refused: int


@dataclass(frozen=True, kw_only=True)
class EvaluationSums:
    """Sums over the cases that one gradient worker evaluated.

    `half_square_norm` is 1/2 ||theta||^2 of the evaluated parameters, the same on every worker.
    `num_left`: cases of the worker's part that it has not evaluated yet.
    """

    num_cases: int
    loss: float
    metrics: Mapping[str, float]
    half_square_norm: float
    num_left: int
