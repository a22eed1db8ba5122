"""What is fixed before a job starts: periods, the costs of the layers, and who owns which."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kfac_dist.config import BatchSchedule, JobSpec, KFACSpec, WorkersSpec
from kfac_dist.coordination.steps.assignment import (
    DEFAULT_COST_MODEL,
    CostModel,
    LayerCost,
    assign,
    assign_runs,
    fit_cost_model,
    reassign,
)
from kfac_dist.coordination.steps.plan import StepSchedule
from kfac_dist.coordination.steps.recorded import ReplayScript
from kfac_dist.coordination.steps.schedule import GrowingBatch, batch_size_at
from kfac_dist.coordination.steps.staleness import StalenessBound
from kfac_dist.core.blocks.registration import Registration
from kfac_dist.core.factors import KroneckerPair, LayerSnapshot, Link
from kfac_dist.core.inverse.structure import Structure, structure_for
from kfac_dist.optim.precision import PreconditionDtype
from kfac_dist.optim.schedules import kfac_schedule, schedule_of
from kfac_dist.tasks import torch_dtype
from workers.device import DevicePlan
from workers.exchange.messages import InverseSetup
from workers.exchange.shard_plan import ShardPlan, plan_shards

_MEASURED_ORDERS = (96, 192, 384)
_REPEATS = 2
_PROBE = Link("measured", "next")


def step_schedule(spec: JobSpec) -> StepSchedule:
    """Return the periods and schedules of a job.

    The periods have no effect on a first-order optimizer.
    """
    if isinstance(spec.optimizer, KFACSpec):
        return kfac_schedule(spec.optimizer)
    return StepSchedule(
        factor_update_period=1,
        inverse_update_period=1,
        gamma_adapt_period=None,
        damping_adapt_period=None,
        lr=schedule_of(spec.optimizer.lr),
    )


def staleness_bound(spec: JobSpec, replay_script: ReplayScript | None = None) -> StalenessBound:
    """Return the staleness bound of a job; with a `replay_script`, the recorded versions."""
    return StalenessBound(
        max_steps=spec.staleness.max_steps,
        warmup_steps=spec.staleness.warmup_steps,
        schedule=step_schedule(spec),
        delay_steps=spec.staleness.delay_steps,
        recorded=None if replay_script is None else replay_script.inverses,
    )


def has_mirrors(spec: JobSpec) -> bool:
    """Return whether gradient workers mirror all that a shard has beside its inverses.

    They mirror parameters, previous update, averages and decisions. EKFAC's moments and the state
    of a first-order optimizer are nowhere else than at their shard.
    """
    return isinstance(spec.optimizer, KFACSpec) and spec.optimizer.inverse != "ekfac"


def num_versions_used(spec: JobSpec) -> int:
    """Return how many versions of a layer's inverse a step may choose from.

    It is one, the newest, unless delays are scripted.
    """
    period = step_schedule(spec).inverse_update_period
    longest = max(spec.staleness.delay_steps.values(), default=0)
    return 1 if longest == 0 else 2 + longest // period


def arithmetic_of(
    spec: JobSpec,
    devices: DevicePlan,
    precondition_dtype: PreconditionDtype | None,
    float32_precision: str,
) -> dict[str, Any]:
    """Return the settings that affect an attempt's numerics and may differ between attempts.

    `precondition_dtype` is the type in which inverses are applied, if that was measured.
    `float32_precision` is what the user's settings allow for float32 products; K-FAC's own are in
    full precision anyway.
    """
    arithmetic: dict[str, Any] = {
        "gradient_workers": spec.workers.gradient,
        "threads": spec.workers.threads or 1,
        "device": devices.kind,
        "inverse_device": devices.inverse_kind,
        "float32_precision": float32_precision,
        "staleness_max_steps": spec.staleness.max_steps,
    }
    if isinstance(spec.optimizer, KFACSpec):
        measured = precondition_dtype.dtype if precondition_dtype else None
        arithmetic["precondition_dtype"] = measured or spec.optimizer.precondition_dtype
    return arithmetic


def room_for_replay(workers: WorkersSpec, script: ReplayScript | None) -> WorkersSpec | None:
    """Return the most workers that a replay has at once; None without a script."""
    if script is None:
        return None
    most = max(workers.gradient, script.most_gradient_workers)
    return workers.model_copy(update={"gradient": most})


def batch_size(spec: JobSpec, step: int, num_cases: int) -> int:
    """Return the number of cases in the batch of `step`."""
    size = spec.batch_size
    if isinstance(size, BatchSchedule):
        growing = GrowingBatch(kind=size.schedule, initial=size.initial, full_at=size.full_at)
        return batch_size_at(step, growing, num_cases)
    return batch_size_at(step, size, num_cases)


def structure_of(settings: KFACSpec, registration: Registration) -> Structure[Any]:
    """Return the structure of the inverse for the layers of a model."""
    return structure_for(settings, registration.names, registration.links)


def shard_plan(
    spec: JobSpec, registration: Registration | None, num_parameters: int, num_shards: int
) -> ShardPlan:
    """Return how the parameters are cut into at most `num_shards` shards.

    `registration` is None for a first-order optimizer. Layers that the inverse links stay together.
    """
    links: tuple[Link, ...] = ()
    if isinstance(spec.optimizer, KFACSpec) and registration is not None:
        links = structure_of(spec.optimizer, registration).links
    return plan_shards(registration, links, num_parameters, num_shards)


def layer_costs(registration: Registration) -> tuple[LayerCost, ...]:
    """Return the layers as the coordination rules need them, in the order of the model."""
    return tuple(LayerCost(name=block.name, orders=block.orders) for block in registration.blocks)


def inverse_setups(
    spec: JobSpec, registration: Registration, applied_step: int
) -> list[InverseSetup]:
    """Return what each inverse worker is started with; workers without layers are left out.

    `applied_step` is the step of the newest statistics in the averages they start from.
    """
    assert isinstance(spec.optimizer, KFACSpec)
    layers, links = layer_costs(registration), structure_of(spec.optimizer, registration).links
    model = measure_cost_model(spec.optimizer, torch_dtype(spec.dtype))
    assignment = (assign_runs if links else assign)(layers, spec.workers.inverse, model)
    return [
        InverseSetup(
            rank=rank,
            layers=tuple(layer for layer in layers if layer.name in names),
            links=tuple(link for link in links if link.name in names),
            cost_model=model,
            assignment_epoch=1,
            applied_step=applied_step,
            exact_step=applied_step,
        )
        for rank, names in assignment.items()
        if names
    ]


def rescaled_setups(
    setups: Mapping[int, InverseSetup],
    layers: Sequence[LayerCost],
    num_workers: int,
    statistics_step: int,
) -> dict[int, InverseSetup]:
    """Return the setups of `num_workers` inverse workers, few layers of which have moved.

    A worker that keeps its layers keeps its setup. Workers without layers are left out.

    Args:
        setups: the present ones, by rank; at least one.
        layers: all layers, in the order of the model.
        num_workers: how many workers there shall be, with the ranks from 0.
        statistics_step: the averages contain the statistics up to this step, and all exact versions
            up to it have been made.
    """
    model = next(iter(setups.values())).cost_model
    links = tuple(link for setup in setups.values() for link in setup.links)
    present = {rank: [layer.name for layer in setup.layers] for rank, setup in setups.items()}
    ranks = list(range(num_workers))
    assignment = (
        assign_runs(layers, ranks, model) if links else reassign(present, layers, ranks, model)
    )
    rescaled = {}
    for rank, names in assignment.items():
        before = setups.get(rank)
        own = tuple(layer for layer in layers if layer.name in names)
        if before is not None and own == before.layers:
            rescaled[rank] = before
        elif own:
            rescaled[rank] = InverseSetup(
                rank=rank,
                layers=own,
                links=tuple(link for link in links if link.name in names),
                cost_model=model,
                assignment_epoch=1 if before is None else before.assignment_epoch + 1,
                applied_step=statistics_step,
                exact_step=statistics_step,
            )
    return rescaled


def measure_cost_model(settings: KFACSpec, dtype: torch.dtype) -> CostModel:
    """Fit the cost model to small inversions timed here; this takes some tenths of a second."""
    structure = structure_for(settings, _PROBE, [_PROBE])
    samples = []
    for order in _MEASURED_ORDERS:
        snapshot = probe_snapshot(order, dtype, linked=bool(structure.links))
        # Half the time of two factors: the cost model is for one matrix. The minimum is the
        # measurement that was disturbed least.
        seconds = min(_time(structure, snapshot) for _ in range(_REPEATS)) / 2
        samples.append((order, seconds))
    # A fit without a cubic term comes from a disturbed measurement, and would say nothing about
    # large matrices.
    fitted = fit_cost_model(samples)
    return fitted if fitted.cubic > 0 else DEFAULT_COST_MODEL


def probe_snapshot(order: int, dtype: torch.dtype, *, linked: bool) -> LayerSnapshot:
    """Return factors, all of one order, for a layer; with `linked` also those of a next layer.

    The cross factors are half the factors.
    """
    rows = torch.randn(2 * order, order, dtype=dtype, generator=torch.Generator().manual_seed(0))
    factor = rows.T @ rows / len(rows)
    pair, cross = KroneckerPair(A=factor, G=factor), KroneckerPair(A=factor / 2, G=factor / 2)
    if not linked:
        return LayerSnapshot(step=1, pair=pair)
    return LayerSnapshot(step=1, pair=pair, next_pair=pair, cross=cross)


def _time(structure: Structure[Any], snapshot: LayerSnapshot) -> float:
    started = time.perf_counter()
    structure.invert_at_gammas(snapshot, [1.0])
    return time.perf_counter() - started
