"""A shard's part of the first-order optimizers: SGD with momentum, and Adam."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from kfac_dist.config import AdamSpec, SGDSpec
from kfac_dist.core.step.block_numbers import block_squares, total_square
from kfac_dist.core.vector import is_finite
from workers.exchange.arrays import Array, Arrays, section, to_arrays, to_tensors
from workers.exchange.checksum import checksum
from workers.exchange.decisions import DecisionMirror
from workers.exchange.messages import ShardReport, StepDecision, StepOrder
from workers.exchange.process_group import Group, Kind
from workers.exchange.shard_plan import ShardPlan
from workers.exchange.step import DecidingSide, ShardSide, StepVerdict
from workers.heartbeat import beat_step
from workers.parameter_server.decider import BatchLosses, l2_term
from workers.parameter_server.state import ShardState
from workers.phases import Phases


class FirstOrderShard:
    """A torch optimizer on a shard's slice [Q] of the parameter vector.

    Workers receive the new parameters after each step.
    """

    def __init__(
        self,
        settings: SGDSpec | AdamSpec,
        plan_shards: Callable[[int], ShardPlan],
        state: ShardState,
    ) -> None:
        self.state = state
        self._plan_shards = plan_shards
        self._optimizer = _optimizer(settings, state.parameters)
        self._counts: Counter[str] = Counter()
        self.step_done = 0
        self._starts: dict[int, dict[str, Array]] = {}
        self._before: dict[int, DecisionMirror] = {}
        self._decided: tuple[int, StepDecision] | None = None
        self._group: Group  # set by `join`
        self._side: ShardSide  # set by `join`
        self._deciding: DecidingSide  # set by `join`, used by the first shard

    def join(self, group: Group, step: int) -> None:
        """Exchange through `group` after `step`, and send the workers this shard's parameters."""
        self.step_done = step
        parameters = self.state.parameters
        self._group = group
        plan = self._plan_shards(len(group.shards))
        self._side = ShardSide(group, plan, parameters)
        self._deciding = DecidingSide(group, plan, parameters)
        self._side.send_state(parameters, torch.zeros_like(parameters))
        group.take_traffic()

    def step(self, order: StepOrder) -> ShardReport:
        """Do the shard's part of one step.

        Raises:
            PeerLostError: another member is gone.
        """
        phases = Phases()
        beat_step(order.plan.step)
        self._begin(order.plan.step)
        with phases("reduce"):
            size = order.window.size
            gradient = self.state.mean_gradient(self._side.receive_gradient(), size)
            losses, goes_on = self._agree(order.plan.step, gradient)
        change = torch.zeros(len(self.state.layout.blocks)).double()
        if goes_on:
            change = self._apply(order, gradient, phases)
        norm = self._norm(change) if goes_on else None
        return self._report(order, losses, norm, phases)

    def _begin(self, step: int) -> None:
        """Remember what is needed to repeat the step, or the one before it."""
        self._starts = {s: start for s, start in self._starts.items() if s == step - 1}
        self._starts[step] = self._own_state()
        self._before = {step: _mirror(self._decided, step - 1)}

    def rewind(self, step: int) -> None:
        """Go back to the end of `step`, which is the last one or the one before it."""
        if (start := self._starts.get(step + 1)) is not None and self.step_done > step:
            self._restore_own(start)
            if self._decided is not None and self._decided[0] != step:
                self._decided = None
        self.step_done = min(self.step_done, step)

    def _agree(self, step: int, gradient: Tensor) -> tuple[BatchLosses | None, bool]:
        """Return the losses, at the first shard, and whether all numbers are finite."""
        finite = torch.tensor([float(is_finite(gradient))]).double()
        if self._side.number > 0:
            self._side.report(Kind.FINITE, finite)
            if self.state.l2:
                self._side.report(Kind.SQUARES, self.state.squares())
            return None, self._side.receive_verdict().goes_on
        loss_sum, num_cases = self._deciding.receive_sums()
        squares = self.state.squares() if self.state.l2 else finite
        before = l2_term(self._deciding, self.state.l2, squares)
        losses = BatchLosses(loss_sum, num_cases, before)
        found = self._deciding.collect(Kind.FINITE, finite)
        goes_on = math.isfinite(losses.loss) and all(bool(flag) for flag in found)
        self._deciding.send_verdict(StepVerdict(goes_on=goes_on, gamma=0.0, search=()))
        self._deciding.send_header(int(goes_on), None, self._before[step])
        self._counts["bad_step"] += not goes_on
        return losses, goes_on

    def _apply(self, order: StepOrder, gradient: Tensor, phases: Phases) -> Tensor:
        """Do torch's step, send the parameters, and return each block's squared change [B]."""
        before = self.state.parameters.clone()
        with phases("apply"):
            self._set_lr(order.plan.lr)
            self.state.parameters.grad = gradient
            self._optimizer.step()
            self.state.applied(order.plan.step)
            self._side.send_parameters(self.state.parameters)
        moved = self.state.layout.regions(self.state.parameters - before)
        return block_squares(moved.values())

    def _norm(self, squares: Tensor) -> float | None:
        """Return the norm of the update, at the first shard."""
        if self._side.number > 0:
            self._side.report(Kind.NUMBERS, squares)
            return None
        return math.sqrt(total_square(self._deciding.collect_blocks(Kind.NUMBERS, squares)))

    def _set_lr(self, lr: float | None) -> None:
        assert lr is not None, "a first-order optimizer has an lr in every step"
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def _report(
        self,
        order: StepOrder,
        losses: BatchLosses | None,
        update_norm: float | None,
        phases: Phases,
    ) -> ShardReport:
        decision = None
        if losses is not None:
            decision = _decision(order, losses, update_norm, self.state.version)
        if decision is not None:
            self._decided = (order.plan.step, decision)
        self.step_done = order.plan.step
        return ShardReport(
            step=order.plan.step,
            decision=decision,
            inverse_version_step={},
            inverse_gammas={},
            stale_layers={},
            accepted=(),
            stale_applied_total=0,
            numeric_events=dict(self._counts),
            waited_seconds=0.0,
            phase_seconds=phases.seconds,
            traffic=self._group.take_traffic(),
            step_seconds=phases.elapsed(),
            time=time.time(),
        )

    def next_gammas(self, step: int) -> tuple[float, ...]:
        """Return no gammas: a first-order optimizer has no inverses."""
        return ()

    def snapshot(self) -> dict[str, Array]:
        """Return everything the next step depends on, by flat names."""
        counts = {f"count:{k}": torch.tensor(v) for k, v in self._counts.items()}
        return self._own_state() | to_arrays(counts)

    def _own_state(self) -> dict[str, Array]:
        optimizer = {
            f"optimizer:{name}": value.clone()
            for name, value in self._optimizer.state[self.state.parameters].items()
            if isinstance(value, Tensor)
        }
        return self.state.snapshot() | to_arrays(optimizer)

    def restore(self, snapshot: Arrays) -> None:
        """Restore a shard's part of a snapshot of the same model."""
        self._counts = Counter({k: int(v) for k, v in section(snapshot, "count:").items()})
        self._restore_own(snapshot)

    def _restore_own(self, snapshot: Arrays) -> None:
        self.state.restore(snapshot)
        self._optimizer.state.clear()
        optimizer = to_tensors(section(snapshot, "optimizer:"))
        for name, value in optimizer.items():
            # Adam keeps its step counter, a scalar, on the host.
            if value.dim() > 0:
                value = value.to(self.state.parameters.device)
            self._optimizer.state[self.state.parameters][name] = value

    def checksum(self) -> str:
        """Return the checksum of what the gradient workers mirror."""
        return checksum(self.state.parameters, torch.zeros_like(self.state.parameters))


def _mirror(decided: tuple[int, StepDecision] | None, last_step: int) -> DecisionMirror:
    known = decided is not None and decided[0] == last_step
    return DecisionMirror(
        step=last_step,
        decision=decided[1] if decided is not None and known else None,
        damping=0.0,
        gamma=0.0,
        fisher_noise=0.0,
        search=(),
    )


def _decision(
    order: StepOrder, losses: BatchLosses, update_norm: float | None, parameter_version: int
) -> StepDecision:
    return StepDecision(
        applied=update_norm is not None,
        parameter_version=parameter_version,
        loss=losses.loss,
        objective=losses.objective,
        num_cases=losses.num_cases,
        alpha=None,
        mu=None,
        update_norm=update_norm or 0.0,
        predicted_change=None,
        reduction_ratio=None,
        damping=None,
        gamma=None,
        lr=order.plan.lr,
        next_gammas=(),
    )


def _optimizer(settings: SGDSpec | AdamSpec, parameters: Tensor) -> torch.optim.Optimizer:
    """Return the torch optimizer; its lr is set in each step."""
    if isinstance(settings, AdamSpec):
        return torch.optim.Adam([parameters], betas=settings.betas, eps=settings.eps)
    return torch.optim.SGD(
        [parameters],
        momentum=settings.momentum,
        nesterov=settings.nesterov and settings.momentum > 0,
    )
