"""The parameter server for first-order optimizers: SGD with momentum, and Adam."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from kfac_dist.config import AdamSpec, SGDSpec
from workers.exchange.arrays import Array, Arrays, section, to_arrays, to_tensors
from workers.exchange.checksum import checksum
from workers.exchange.messages import ServerReport, StepOrder
from workers.exchange.process_group import Group
from workers.exchange.step import ServerSide
from workers.parameter_server.state import MeanGradient, ServerState
from workers.phases import Phases


class FirstOrderServer:
    """A torch optimizer on the parameter vector.

    Workers receive the new parameters after each step.
    """

    def __init__(self, settings: SGDSpec | AdamSpec, state: ServerState) -> None:
        self.state = state
        self._optimizer = _optimizer(settings, state.parameters)
        self._counts: Counter[str] = Counter()
        self._side: ServerSide  # set by `join`

    def join(self, group: Group) -> None:
        """Exchange through `group` from now on, and send the workers the parameters."""
        parameters = self.state.parameters
        self._side = ServerSide(group, parameters.numel(), parameters)
        self._side.send_state(parameters, torch.zeros_like(parameters))

    def step(self, order: StepOrder) -> ServerReport:
        """Do the server's part of one step.

        Raises:
            PeerLostError: a gradient worker is gone.
        """
        phases = Phases()
        with phases("reduce"):
            mean = self.state.mean(self._side.receive_gradient())
        if not mean.is_finite():
            self._side.skip_step()
            self._counts["bad_step"] += 1
            return self._report(order, mean, None, phases)
        before = self.state.parameters.clone()
        with phases("apply"):
            self._set_lr(order.plan.lr)
            self.state.parameters.grad = mean.gradient
            self._optimizer.step()
            self.state.applied(order.plan.step)
            self._side.send_parameters(self.state.parameters)
        norm = float(torch.linalg.vector_norm(self.state.parameters - before))
        return self._report(order, mean, norm, phases)

    def _set_lr(self, lr: float | None) -> None:
        assert lr is not None, "a first-order optimizer has an lr in every step"
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def _report(
        self, order: StepOrder, mean: MeanGradient, update_norm: float | None, phases: Phases
    ) -> ServerReport:
        return ServerReport(
            step=order.plan.step,
            applied=update_norm is not None,
            loss=mean.loss,
            objective=mean.objective,
            num_cases=order.window.size,
            parameter_version=self.state.version,
            alpha=None,
            mu=None,
            update_norm=update_norm or 0.0,
            predicted_change=None,
            reduction_ratio=None,
            damping=None,
            gamma=None,
            lr=order.plan.lr,
            next_gammas=(),
            inverse_version_step={},
            inverse_gammas={},
            stale_layers={},
            accepted=(),
            stale_applied_total=0,
            numeric_events=dict(self._counts),
            waited_seconds=0.0,
            phase_seconds=phases.seconds,
        )

    def next_gammas(self, step: int) -> tuple[float, ...]:
        """Return no gammas: a first-order optimizer has no inverses."""
        return ()

    def snapshot(self) -> dict[str, Array]:
        """Return everything the next step depends on, by flat names."""
        optimizer = {
            f"optimizer:{name}": value.clone()
            for name, value in self._optimizer.state[self.state.parameters].items()
            if isinstance(value, Tensor)
        }
        counts = {f"count:{k}": torch.tensor(v) for k, v in self._counts.items()}
        return self.state.snapshot() | to_arrays(optimizer | counts)

    def restore(self, snapshot: Arrays) -> None:
        """Restore a snapshot of the same model."""
        self.state.restore(snapshot)
        self._counts = Counter({k: int(v) for k, v in section(snapshot, "count:").items()})
        optimizer = to_tensors(section(snapshot, "optimizer:"))
        for name, value in optimizer.items():
            # Adam keeps its step counter, a scalar, on the host.
            if value.dim() > 0:
                value = value.to(self.state.parameters.device)
            self._optimizer.state[self.state.parameters][name] = value

    def checksum(self) -> str:
        """Return the checksum of what the gradient workers mirror."""
        return checksum(self.state.parameters, torch.zeros_like(self.state.parameters))


def _optimizer(settings: SGDSpec | AdamSpec, parameters: Tensor) -> torch.optim.Optimizer:
    """Return the torch optimizer; its lr is set in each step."""
    if isinstance(settings, AdamSpec):
        return torch.optim.Adam([parameters], betas=settings.betas, eps=settings.eps)
    return torch.optim.SGD(
        [parameters],
        momentum=settings.momentum,
        nesterov=settings.nesterov and settings.momentum > 0,
    )
