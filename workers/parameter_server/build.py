"""Builds the parameter server of a job, for K-FAC or for a first-order optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from kfac_dist.config import KFACSpec
from kfac_dist.core.blocks.registration import register
from kfac_dist.core.vector import flatten, trainable_parameters
from kfac_dist.optim.precision import PreconditionDtype, choose_precondition_dtype
from kfac_dist.tasks import build_model, load_task, torch_dtype
from workers.exchange.arrays import Array, Arrays
from workers.exchange.messages import JobContext, ServerReport, StepOrder
from workers.exchange.process_group import Group
from workers.parameter_server.first_order import FirstOrderServer
from workers.parameter_server.inverse_store import InverseStore
from workers.parameter_server.kfac import KFACServer
from workers.parameter_server.state import ServerState
from workers.planning import staleness_bound, step_schedule, structure_of


class Server(Protocol):
    """What the actor needs of a parameter server, whichever the optimizer."""

    state: ServerState

    def join(self, group: Group) -> None:
        """Exchange through `group` from now on, and send the workers the parameters."""

    def step(self, order: StepOrder) -> ServerReport:
        """Do the server's part of one step."""

    def next_gammas(self, step: int) -> tuple[float, ...]:
        """Return the gammas to invert with for `step`, empty for a first-order optimizer."""

    def snapshot(self) -> dict[str, Array]:
        """Return everything the next step depends on, by flat names."""

    def restore(self, snapshot: Arrays) -> None:
        """Restore a snapshot."""

    def checksum(self) -> str:
        """Return the checksum of what the gradient workers mirror."""


@dataclass(frozen=True, kw_only=True)
class BuiltServer:
    """A parameter server, and for K-FAC the store in which its inverses arrive.

    `precondition_dtype` is the type in which inverses are applied, if that was measured.
    """

    server: Server
    store: InverseStore | None = None
    precondition_dtype: PreconditionDtype | None = None


def build_server(job: JobContext, device: torch.device, patience_seconds: float) -> BuiltServer:
    """Build the server with the initial parameters of the task's model.

    `patience_seconds` bounds the wait for an inverse in a step.

    Raises:
        InvalidSpecError: the model has a parameter that K-FAC has no block for.
        UserTaskError: the user's task raised.
    """
    spec = job.spec
    task = load_task(spec, job.base_dir, data_dir=job.data_dir, cache_dir=job.cache_dir)
    model = build_model(task, spec.seed, torch_dtype(spec.dtype)).to(device)
    parameters = flatten(list(trainable_parameters(model).values()))
    state = ServerState(parameters, spec.optimizer.l2, spec.optimizer.averaging)
    if not isinstance(spec.optimizer, KFACSpec):
        return BuiltServer(server=FirstOrderServer(spec.optimizer, state))
    registration = register(model, spec.optimizer)
    is_measured = spec.optimizer.precondition_dtype == "auto"
    dtype = choose_precondition_dtype(spec.optimizer, registration.blocks, parameters)
    settings = dtype.resolve(spec.optimizer)
    spec = spec.model_copy(update={"optimizer": settings})
    store = InverseStore(
        layers=registration.names,
        structure=structure_of(settings, registration),
        bound=staleness_bound(spec, job.replay_script),
        staleness=spec.staleness,
        patience_seconds=patience_seconds,
        device=device,
    )
    return BuiltServer(
        server=KFACServer(spec, step_schedule(spec), registration, state, store),
        store=store,
        precondition_dtype=dtype if is_measured else None,
    )
