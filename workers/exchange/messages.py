"""What crosses between the driver and the actors: frozen, with versions and units in the names.

Steps count from 1. Arrays travel beside these headers (`workers.exchange.parcels`).
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


@dataclass(frozen=True, kw_only=True)
class JobContext:
    """What every actor needs to build its part of a job; paths are of the machine it runs on.

    With a `replay_script` the job does again what was recorded.
    """

    job: str
    attempt: int
    spec: JobSpec
    base_dir: Path
    data_dir: Path | None
    cache_dir: Path
    run_dir: Path
    replay_script: ReplayScript | None = None


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
    """What a member has sent to others and received, in bytes of tensors, and how many tensors."""

    sent_bytes: int = 0
    received_bytes: int = 0
    num_messages: int = 0


@dataclass(frozen=True, kw_only=True)
class WorkerReport:
    """What a gradient worker says after a step; `phase_seconds` by verb.

    `traffic` is what it exchanged with the parameter server: gradients, directions and numbers.
    """

    rank: int
    step: int
    phase_seconds: Mapping[str, float]
    traffic: Traffic


@dataclass(frozen=True, kw_only=True)
class ServerReport:
    """What the parameter server says after a step.

    `loss` is the mean over the batch before the update, in nats a case; `objective` adds the l2
    term. What first-order optimizers do not have is None or empty. `next_gammas` are those to
    invert with in the next step. `inverse_version_step` maps each layer to the step of the newest
    statistics in the inverse that was used, `inverse_gammas` to what its version was made for;
    `stale_layers` went beyond the bound. `accepted` are the inverses that came in since the last
    report. `numeric_events`, `stale_applied_total` and `parameter_version` grow over the job; the
    seconds are of this step.
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


@dataclass(frozen=True, kw_only=True)
class StatisticsHeader:
    """Sums of batch factors for `layers`, from one gradient worker to one inverse worker.

    Sums run over `num_cases` cases. With `usable` False a number was not finite: no parcel comes
    with it, and the step is refused on all inverse workers alike.
    """

    job: str
    step: int
    rank: int
    num_cases: int
    layers: tuple[str, ...]
    assignment_epoch: int
    usable: bool


@dataclass(frozen=True, kw_only=True)
class RefreshRequest:
    """Invert every layer anew with each of `gammas`; a newer request replaces an older one.

    With `gammas_by_layer` only the layers in it are inverted, each with its own gammas. A layer is
    not inverted before the statistics of `min_statistics_step` have been dealt with. An `exact`
    request is not replaced: statistics of later steps than its own wait until every layer has been
    inverted for it.
    """

    step: int
    gammas: tuple[float, ...]
    min_statistics_step: int
    exact: bool = False
    gammas_by_layer: Mapping[str, tuple[float, ...]] | None = None

    def gammas_of(self, layer: str) -> tuple[float, ...] | None:
        """Return the gammas to invert a layer with, None where it is to be left."""
        if self.gammas_by_layer is None:
            return self.gammas
        return self.gammas_by_layer.get(layer)


@dataclass(frozen=True, kw_only=True)
class InverseHeader:
    """The inverses of one layer, from an inverse worker to the parameter server.

    `version_step` is the step of the newest statistics in them. `pis` has one entry for each of
    `gammas`, None where the inversion failed; the parcel holds the others, in order.
    """

    layer: str
    version_step: int
    gammas: tuple[float, ...]
    pis: tuple[float | None, ...]
    rungs: tuple[str, ...]
    inversion_seconds: float


@dataclass(frozen=True, kw_only=True)
class InverseSetup:
    """What an inverse worker is started with: its layers, and what it expects of one message.

    `links` are those of its layers with the next in a chain, which may be another worker's.
    `applied_step` is the step of the newest statistics in the averages it is given.
    """

    rank: int
    layers: tuple[LayerCost, ...]
    links: tuple[Link, ...]
    cost_model: CostModel
    assignment_epoch: int
    applied_step: int


@dataclass(frozen=True, kw_only=True)
class InverseStatus:
    """The health of an inverse worker; counters grow over its life.

    `inversion_seconds` is the sum over all inversions; `queue_depth` the messages not yet dealt
    with and the layers not yet refreshed.
    """

    rank: int
    pid: int
    queue_depth: int
    applied_step: int
    num_inversions: int
    inversion_seconds: float
    duplicates: int
    late: int
    foreign: int
    dropped: int
    refused: int


@dataclass(frozen=True, kw_only=True)
class EvaluationSums:
    """Sums over the cases that one gradient worker evaluated.

    `half_square_norm` is 1/2 ||theta||^2 of the parameters evaluated, the same on every worker.
    """

    num_cases: int
    loss: float
    metrics: Mapping[str, float]
    half_square_norm: float
