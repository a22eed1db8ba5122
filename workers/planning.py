"""What is fixed before a job starts: periods, layers and their costs, who owns which."""

from __future__ import annotations

import time

import torch

from kfac_dist.config import BatchSchedule, JobSpec, KFACSpec
from kfac_dist.coordination.assignment import (
    DEFAULT_COST_MODEL,
    CostModel,
    LayerCost,
    fit_cost_model,
)
from kfac_dist.coordination.plan import StepSchedule
from kfac_dist.coordination.schedule import batch_size_at
from kfac_dist.coordination.staleness import StalenessBound
from kfac_dist.core.factors import KroneckerPair
from kfac_dist.core.inverse import invert_pair
from kfac_dist.core.registration import Registration
from kfac_dist.optimizer import step_schedule as kfac_schedule

_MEASURED_ORDERS = (64, 128, 256)
_REPEATS = 3


def step_schedule(spec: JobSpec) -> StepSchedule:
    """Return the periods of a job; a baseline has none that matters."""
    if isinstance(spec.optimizer, KFACSpec):
        return kfac_schedule(spec.optimizer)
    return StepSchedule(
        factor_update_period=1,
        inverse_update_period=1,
        gamma_adapt_period=None,
        damping_adapt_period=None,
    )


def staleness_bound(spec: JobSpec) -> StalenessBound:
    """Return the bound of a job."""
    return StalenessBound(
        max_steps=spec.staleness.max_steps,
        warmup_steps=spec.staleness.warmup_steps,
        schedule=step_schedule(spec),
    )


def batch_size(spec: JobSpec, step: int, num_cases: int) -> int:
    """Return the number of cases in the batch of `step`."""
    size = spec.batch_size
    if isinstance(size, BatchSchedule):
        return batch_size_at(step, (size.initial, size.full_at), num_cases)
    return batch_size_at(step, size, num_cases)


def layer_costs(registration: Registration) -> tuple[LayerCost, ...]:
    """Return the layers as the coordination rules know them, in the order of the model."""
    return tuple(
        LayerCost(name=block.name, dim_A=block.dim_A, dim_G=block.dim_G)
        for block in registration.blocks
    )


def measure_cost_model(dtype: torch.dtype) -> CostModel:
    """Time a few small inversions on this machine; takes some hundredths of a second."""
    samples = []
    for order in _MEASURED_ORDERS:
        factor = torch.eye(order, dtype=dtype)
        pair = KroneckerPair(A=factor, G=factor)
        seconds = min(_time(pair) for _ in range(_REPEATS)) / 2
        samples.append((order, seconds))
    fitted = fit_cost_model(samples)
    return fitted if fitted.cubic > 0 else DEFAULT_COST_MODEL


def _time(pair: KroneckerPair) -> float:
    started = time.perf_counter()
    invert_pair(pair, 1.0)
    return time.perf_counter() - started
