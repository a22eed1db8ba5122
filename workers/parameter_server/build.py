"""Builds a shard of the parameter server of a job, for K-FAC or for a first-order optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from kfac_dist.config import KFACSpec
from kfac_dist.core.blocks.registration import register
from kfac_dist.core.inverse.structure import structure_for
from kfac_dist.core.vector import flatten, trainable_parameters
from kfac_dist.optim.precision import PreconditionDtype, choose_precondition_dtype
from kfac_dist.tasks import build_model, load_task, torch_dtype
from workers.exchange.arrays import Array, Arrays
from workers.exchange.messages import JobContext, ShardReport, StepOrder
from workers.exchange.process_group import Group
from workers.parameter_server.decider import KFACDecider
from workers.parameter_server.first_order import FirstOrderShard
from workers.parameter_server.inverse_store import InverseStore
from workers.parameter_server.kfac import KFACShard
from workers.parameter_server.refresh_requests import RefreshRequests, SendRequest
from workers.parameter_server.state import ShardState
from workers.planning import shard_plan, staleness_bound, step_schedule


class Shard(Protocol):
    """What the actor needs of a shard, whichever the optimizer."""

    state: ShardState

    def join(self, group: Group) -> None:
        """Exchange through `group` from now on, and send the workers the parameters."""

    def step(self, order: StepOrder) -> ShardReport:
        """Do the shard's part of one step."""

    def next_gammas(self, step: int) -> tuple[float, ...]:
        """Return the gammas to invert with for `step`, empty for a first-order optimizer."""

    def snapshot(self) -> dict[str, Array]:
        """Return everything the next step depends on, by flat names."""

    def restore(self, snapshot: Arrays) -> None:
        """Restore a snapshot."""

    def checksum(self) -> str:
        """Return the checksum of what the gradient workers mirror."""


@dataclass(frozen=True, kw_only=True)
class BuiltShard:
    """A shard, and for K-FAC the store in which its inverses arrive.

    `precondition_dtype` is the type in which inverses are applied, if that was measured.
    """

    shard: Shard
    store: InverseStore | None = None
    precondition_dtype: PreconditionDtype | None = None


def build_shard(
    job: JobContext,
    number: int,
    num_shards: int,
    device: torch.device,
    patience_seconds: float,
    send_request: SendRequest,
) -> BuiltShard:
    """Build a shard with its part of the initial parameters of the task's model.

    Args:
        job: the job.
        number: the place of the shard among all, from 0; the first one decides.
        num_shards: how many shards there are.
        device: where it computes.
        patience_seconds: bounds the wait for an inverse in a step.
        send_request: how the first shard asks all inverse workers for inverses.

    Raises:
        InvalidSpecError: the model has a parameter that K-FAC has no block for.
        UserTaskError: the user's task raised.
    """
    spec = job.spec
    task = load_task(spec, job.base_dir, data_dir=job.data_dir, cache_dir=job.cache_dir)
    model = build_model(task, spec.seed, torch_dtype(spec.dtype)).to(device)
    parameters = flatten(list(trainable_parameters(model).values()))
    settings = spec.optimizer
    registration = register(model, settings) if isinstance(settings, KFACSpec) else None
    plan_shards = partial(shard_plan, spec, registration, len(parameters))
    layout = plan_shards(num_shards).layouts[number]
    own = layout.gather(parameters)
    state = ShardState(own, layout, settings.l2, settings.averaging)
    if not isinstance(settings, KFACSpec):
        return BuiltShard(shard=FirstOrderShard(settings, plan_shards, state))
    assert registration is not None
    is_measured = settings.precondition_dtype == "auto"
    dtype = choose_precondition_dtype(settings, registration.blocks, parameters)
    settings = dtype.resolve(settings)
    bound = staleness_bound(spec, job.replay_script)
    links = [link for link in registration.links if link.name in layout.names]
    store = InverseStore(
        layers=layout.names,
        structure=structure_for(settings, layout.names, links),
        bound=bound,
        staleness=spec.staleness,
        patience_seconds=patience_seconds,
        device=device,
    )
    decider = None
    if number == 0:
        requests = RefreshRequests(bound, send_request)
        decider = KFACDecider(settings, step_schedule(spec), requests)
    return BuiltShard(
        shard=KFACShard(settings, plan_shards, state, store, registration.least_cases, decider),
        store=store,
        precondition_dtype=dtype if is_measured else None,
    )
