"""What the driver and the actors send each other: frozen dataclasses, with units in the names.

Steps count from 1. Statistics and inverses travel as messages of two parts: a header, defined
here, and a parcel of arrays (`workers.exchange.parcels`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kfac_dist.config import JobSpec
from kfac_dist.coordination.steps.assignment import CostModel, LayerCost
from kfac_dist.coordination.steps.plan import StepPlan
from kfac_dist.coordination.steps.recorded import BeyondBound, ReplayScript
from kfac_dist.coordination.steps.sampling import BatchWindow
from kfac_dist.core.factors import Link
from kfac_dist.core.passes.target_range import TargetRange
from workers.exchange.parcels import InverseParcel, StatisticsParcel


@dataclass(frozen=True, kw_only=True)
class JobContext:
    """What every actor needs to build its part of a job; paths are those of its own machine.

    With a `replay_script` the job repeats what was recorded. `allowed_targets` are those that the
    model's outputs allow, None if all numbers are possible.
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


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """Where the members of a process group meet.

    The parameter server hosts the store and is the last rank, `num_gradient_workers`. `epoch`
    numbers the group: members of different epochs never meet.
    """

    host: str
    port: int
    epoch: int
    num_gradient_workers: int
    timeout_seconds: float


@dataclass(frozen=True, kw_only=True)
class StepOrder:
    """One step, from the driver to all gradient workers and the parameter server."""

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
class ServerReport:
    """What the parameter server reports after a step.

    A field that a first-order optimizer does not have is None, empty or 0 there.

    Attributes:
        applied: whether the parameters were updated.
        loss: mean over the batch before the update, in nats a case.
        objective: `loss` with the l2 term added.
        parameter_version: number of updates applied so far in the job.
        next_gammas: the gammas to invert with in the next step.
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
    refused_in_a_row: int = 0


@dataclass(frozen=True, kw_only=True)
class StatisticsHeader:
    """Describes sums of batch factors over `num_cases` cases, for the inverses of `layers`.

    `rank` is that of the gradient worker. `usable` is False where a number was not finite; the
    message then has no parcel, and every inverse worker refuses the step.
    """

    job: str
    step: int
    rank: int
    num_cases: int
    layers: tuple[str, ...]
    assignment_epoch: int
    usable: bool


@dataclass(frozen=True, kw_only=True)
class StatisticsMessage:
    """One gradient worker's statistics of a step, on their way to one inverse worker."""

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
        exact_step: exact versions up to this step have been made; None for a successor, which does
            not know what its predecessor made.
    """

    rank: int
    layers: tuple[LayerCost, ...]
    links: tuple[Link, ...]
    cost_model: CostModel
    assignment_epoch: int
    applied_step: int
    exact_step: int | None


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
