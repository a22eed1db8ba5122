"""Builds a shard of the parameter server of a job, for K-FAC or for a first-order optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from kfac_dist.config import KFACSpec
from kfac_dist.core.blocks.registration import Registration, register
from kfac_dist.core.inverse.structure import structure_for
from kfac_dist.core.vector import flatten, trainable_parameters
from kfac_dist.optim.precision import PreconditionDtype, choose_precondition_dtype
from kfac_dist.tasks import build_model, load_task, torch_dtype
from workers.exchange.arrays import Array, Arrays
from workers.exchange.messages import JobContext, ShardReport, StepOrder
from workers.exchange.process_group import Group
from workers.exchange.shard_plan import ShardPlan
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

    step_done: int

    def join(self, group: Group, step: int) -> None:
        """Exchange through `group` after `step`, and send the workers the parameters."""

    def rewind(self, step: int) -> None:
        """Go back to the end of `step`, which is the last one or the one before it."""

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


class ShardBuilder:
    """Builds shards of the parameter server, with the initial parameters of the task's model.

    The task is loaded once; a process may get another shard when the members of the group change.

    Args:
        job: the job.
        device: where shards compute.
        patience_seconds: bounds the wait for an inverse in a step.
        send_request: how the first shard asks all inverse workers for inverses.

    Raises:
        InvalidSpecError: the model has a parameter that K-FAC has no block for.
        UserTaskError: the user's task raised.
    """

    def __init__(
        self,
        job: JobContext,
        device: torch.device,
        patience_seconds: float,
        send_request: SendRequest,
    ) -> None:
        spec, settings = job.spec, job.spec.optimizer
        self._job = job
        self._device = device
        self._patience_seconds = patience_seconds
        self._send_request = send_request
        task = load_task(spec, job.base_dir, data_dir=job.data_dir, cache_dir=job.cache_dir)
        model = build_model(task, spec.seed, torch_dtype(spec.dtype)).to(device)
        self._parameters = flatten(list(trainable_parameters(model).values()))
        self._registration: Registration | None = None
        self._dtype: PreconditionDtype | None = None
        if isinstance(settings, KFACSpec):
            self._registration = register(model, settings)
            self._dtype = choose_precondition_dtype(
                settings, self._registration.blocks, self._parameters
            )

    def build(self, number: int, num_shards: int) -> BuiltShard:
        """Build shard `number` of `num_shards`, counted from 0; the first one decides."""
        spec, settings = self._job.spec, self._job.spec.optimizer
        plan_shards = partial(shard_plan, spec, self._registration, len(self._parameters))
        layout = plan_shards(num_shards).layouts[number]
        own = layout.gather(self._parameters)
        state = ShardState(own, layout, settings.l2, settings.averaging)
        if not isinstance(settings, KFACSpec):
            return BuiltShard(shard=FirstOrderShard(settings, plan_shards, state))
        return self._build_kfac(settings, number, plan_shards, state)

    def _build_kfac(
        self,
        settings: KFACSpec,
        number: int,
        plan_shards: Callable[[int], ShardPlan],
        state: ShardState,
    ) -> BuiltShard:
        registration, dtype = self._registration, self._dtype
        assert registration is not None
        assert dtype is not None
        spec, layout = self._job.spec, state.layout
        is_measured = settings.precondition_dtype == "auto"
        settings = dtype.resolve(settings)
        bound = staleness_bound(spec, self._job.replay_script)
        links = [link for link in registration.links if link.name in layout.names]
        store = InverseStore(
            layers=layout.names,
            structure=structure_for(settings, layout.names, links),
            bound=bound,
            staleness=spec.staleness,
            patience_seconds=self._patience_seconds,
            device=self._device,
        )
        decider = None
        if number == 0:
            requests = RefreshRequests(bound, self._send_request)
            decider = KFACDecider(settings, step_schedule(spec), requests)
        return BuiltShard(
            shard=KFACShard(settings, plan_shards, state, store, registration.least_cases, decider),
            store=store,
            precondition_dtype=dtype if is_measured else None,
        )
