"""A gradient worker's part of the algorithm; read `GradientWork.step` first.

No Ray here: the actor in `workers.member.actor` is a shell around this. The shards of the parameter
server own the parameters and the previous update; a gradient worker mirrors them by doing the same
arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.config import AveragingSpec
from kfac_dist.core.compute import BatchComputer, GradientSums
from kfac_dist.core.passes.chain import Trace
from kfac_dist.core.passes.own_passes import RandomStreams
from kfac_dist.core.step.averaging import ParameterAverage
from kfac_dist.core.step.choice import combine
from kfac_dist.core.vector import add_to_parameters, all_finite, assign_parameters, flatten
from kfac_dist.data import MapDataset, Split
from kfac_dist.optim.arithmetic import in_full_precision
from kfac_dist.tasks import Task, user_code
from workers.exchange.arrays import Array, Arrays, to_array, to_tensor
from workers.exchange.checksum import checksum
from workers.exchange.decisions import DecisionMirror
from workers.exchange.messages import EvaluationSums, StepOrder, WorkerReport
from workers.exchange.moments import WorkerMoments
from workers.exchange.process_group import Group
from workers.exchange.shard_plan import ShardPlan
from workers.exchange.step import Coefficients, Directions, WorkerSide
from workers.gradient_worker.batches import BatchPart, BatchReader, Subset
from workers.gradient_worker.buffers import read_buffers, write_buffers
from workers.gradient_worker.evaluation import evaluate
from workers.gradient_worker.reading import CaseReader
from workers.gradient_worker.statistics_sender import StatisticsSender
from workers.heartbeat import beat_step
from workers.phases import Phases


@dataclass(frozen=True, kw_only=True)
class Joined:
    """A gradient worker's ends of the exchange with the shards, once it has joined."""

    group: Group
    plan: ShardPlan
    side: WorkerSide
    moments: WorkerMoments


@dataclass(frozen=True, kw_only=True)
class _StepStart:
    """What a step began with, beside the parameters."""

    buffers: Mapping[str, Array]
    streams: RandomStreams


class GradientWork:
    """Model, data and mirror of the parameters of one gradient worker.

    `build_gradient_work` makes one; `join` comes before the first step.
    """

    def __init__(
        self,
        *,
        task: Task,
        data: Mapping[Split, MapDataset],
        cases: CaseReader,
        computer: BatchComputer,
        reader: BatchReader,
        sender: StatisticsSender | None,
        plan_shards: Callable[[int], ShardPlan],
        has_moments: bool,
        averaging: AveragingSpec | None,
        evaluation_limit: int | None,
        evaluation_chunk: int,
    ) -> None:
        """Store the parts.

        Args:
            task: the user's task; errors of its code are reported as its own.
            data: training and test data.
            cases: reads both, for evaluations.
            computer: computes on the worker's model, which holds the mirrored parameters.
            reader: reads this worker's part of each batch of the training data.
            sender: sends statistics to the inverse workers; None for a first-order optimizer.
            plan_shards: returns how the parameters are cut into a number of shards.
            has_moments: whether second moments of gradients are sent (EKFAC).
            averaging: how shards average their parameters, which is mirrored; None if they do not.
            evaluation_limit: how many cases of each split are evaluated, over all workers; None
                for all.
            evaluation_chunk: how many cases are evaluated together.
        """
        self._task = task
        self._data = data
        self._cases = cases
        self._computer = computer
        self._reader = reader
        self._sender = sender
        self._plan_shards = plan_shards
        self._has_moments = has_moments
        self._averaging = averaging
        self._averages: dict[int, ParameterAverage] = {}  # mirrored, by shard
        self._evaluation_limit = evaluation_limit
        self._evaluation_chunk = evaluation_chunk
        self._parameters = computer.parameters
        self._previous_update = torch.zeros_like(flatten(computer.parameters))
        self._spare = torch.zeros_like(self._previous_update)  # the update before that
        self._parameters_before: Tensor | None = None  # with a first-order optimizer
        self.step_done = 0
        self._step = 0  # the step in hand
        self._applied_step = 0
        self._starts: dict[int, _StepStart] = {}
        self._joined: Joined  # set by `join`

    def join(self, group: Group, step: int) -> None:
        """Take a place in `group` after `step`, with the parameters that the shards have."""
        like = self._previous_update
        self.step_done = step
        self._applied_step = 0
        self._reader.place(group.rank, len(group.workers))
        plan = self._plan_shards(len(group.shards))
        side = WorkerSide(group, plan, like)
        parameters, self._previous_update = side.receive_state()
        assign_parameters(self._parameters, parameters)
        self._averages = {}
        if self._averaging is not None and self._sender is not None:
            for shard, (count, value) in side.receive_averages().items():
                own = ParameterAverage(self._averaging.decay, self._averaging.start)
                own.start_from(count, value)
                self._averages[shard] = own
        layers = [layout.names if self._has_moments else () for layout in plan.layouts]
        moments = WorkerMoments(group, layers, like)
        moments.receive_bases()
        if self._sender is not None:
            self._sender.join(group)
        group.take_traffic()  # traffic is counted per step, and joining is not part of one
        self._joined = Joined(group=group, plan=plan, side=side, moments=moments)

    def connect(
        self, assignment: Mapping[int, tuple[str, ...]], assignment_epochs: Mapping[int, int]
    ) -> None:
        """Send the statistics of these layers to these inverse workers from now on."""
        if self._sender is not None:
            self._sender.connect(assignment, assignment_epochs)

    def expect(self, orders: Sequence[StepOrder]) -> None:
        """Let the batches of coming steps be read ahead."""
        self._reader.expect([order.window for order in orders])

    def step(self, order: StepOrder) -> WorkerReport:
        """Do this worker's part of one step.

        Raises:
            UserTaskError: the user's model or data set raised.
            PeerLostError: another member of the group is gone.
        """
        beat_step(order.plan.step)
        self._begin(order.plan.step)
        if self._sender is None:
            return self._first_order_step(order)
        return self._kfac_step(self._sender, order)

    def _first_order_step(self, order: StepOrder) -> WorkerReport:
        phases = Phases()
        self._send_gradient(order, phases)
        self._receive_parameters(phases)
        return self._report(phases)

    @in_full_precision
    def _kfac_step(self, sender: StatisticsSender, order: StepOrder) -> WorkerReport:
        phases = Phases()
        part, sums = self._send_gradient(order, phases)
        if order.plan.update_factors:
            self._send_statistics(sender, order, part, sums, phases)
        self._take_part_in_choice(part, sums.trace, phases)
        return self._report(phases)

    def _send_gradient(self, order: StepOrder, phases: Phases) -> tuple[BatchPart, GradientSums]:
        part = self._read(order, phases)
        sums = self._compute(part, phases)
        with phases("reduce"):
            self._joined.side.send_gradient(sums, len(part.slice))
        return part, sums

    def _report(self, phases: Phases) -> WorkerReport:
        self.step_done = self._step
        traffic = self._joined.group.take_traffic()
        return WorkerReport(phase_seconds=phases.seconds, traffic=traffic)

    def _begin(self, step: int) -> None:
        """Remember what the user's training pass may change, here and in the step before."""
        self._starts = {s: start for s, start in self._starts.items() if s == step - 1}
        model = self._computer.model
        self._starts[step] = _StepStart(buffers=read_buffers(model), streams=RandomStreams(model))
        self._step = step

    def rewind(self, step: int) -> None:
        """Go back to the end of `step`, which is the last one or the one before it.

        Parameters are then those of before to rounding: the update is subtracted again.
        """
        if self._applied_step > step:
            if self._parameters_before is not None:
                assign_parameters(self._parameters, self._parameters_before)
            else:
                add_to_parameters(self._parameters, -self._previous_update)
                previous, self._spare = self._spare, self._previous_update
                self._previous_update = previous
                for average in self._averages.values():
                    average.undo(self._applied_step)
            self._applied_step = 0
        self.step_done = min(self.step_done, step)
        if (start := self._starts.get(step + 1)) is not None:
            write_buffers(self._computer.model, start.buffers)
            start.streams.restore()

    @property
    def last_step(self) -> int:
        """The last step that was applied or skipped here, even if it has not ended."""
        return max(self._applied_step, self.step_done)

    def mirrored_decision(self) -> DecisionMirror | None:
        """Return what the deciding shard told last; None before the first step with it."""
        numbers = self._joined.side.mirror
        return None if numbers is None else DecisionMirror.from_numbers(numbers, self._step - 1)

    def mirrored_state(self) -> dict[str, Array]:
        """Return the mirrored parameters and previous update [P], named as in checkpoints."""
        return {
            "parameters": to_array(flatten(self._parameters)),
            "update:previous_update": to_array(self._previous_update.clone()),
        }

    def mirrored_average(self, shard: int) -> dict[str, Array]:
        """Return the average [Q] of a shard that is mirrored here, named as in checkpoints."""
        state = self._averages[shard].state_dict()
        return {f"average:{name}": to_array(value) for name, value in state.items()}

    def _user_code(self, doing: str) -> AbstractContextManager[None]:
        return user_code(self._task, f"{doing} in gradient worker {self._joined.group.rank}")

    def _read(self, order: StepOrder, phases: Phases) -> BatchPart:
        with phases("read"):
            return self._reader.read(order.window)

    def _compute(self, part: BatchPart, phases: Phases) -> GradientSums:
        with phases("compute"), self._user_code("the gradient"):
            return self._computer.gradient(part.inputs, part.targets)

    def _send_statistics(
        self,
        sender: StatisticsSender,
        order: StepOrder,
        part: BatchPart,
        sums: GradientSums,
        phases: Phases,
    ) -> None:
        bases, usable = self._joined.moments.bases, _is_finite(sums)
        with phases("statistics"), self._user_code("the statistics"):
            moments = sender.send(order.plan.step, part, sums.trace, bases, usable=usable)
        with phases("reduce"):
            self._joined.side.send_usable(moments is not None)
            self._joined.moments.send(moments)

    def _take_part_in_choice(self, part: BatchPart, trace: Trace | None, phases: Phases) -> None:
        side = self._joined.side
        with phases("wait_direction"):
            directions = side.receive_directions()
        if directions is None:
            return
        if directions.fisher_fraction is not None:
            rows = part.subset(directions.fisher_fraction)
            self._send_fisher_products(part, rows, trace, directions, phases)
        with phases("choose"):
            choice = side.receive_choice()
        if choice is None:
            return
        self._apply(choice, directions, phases)
        with phases("receive_bases"):
            self._joined.moments.receive_bases()
        if choice.measure:
            self._measure(part, phases)

    def _send_fisher_products(
        self,
        part: BatchPart,
        rows: Subset,
        trace: Trace | None,
        directions: Directions,
        phases: Phases,
    ) -> None:
        with phases("fisher_products"):
            vectors = [*directions.vectors, self._previous_update]
            traced = trace and trace.rows_at(rows.positions)
            with self._user_code("the Fisher products"):
                inputs, targets = rows.select(part.inputs), rows.select(part.targets)
                sums = self._computer.fisher_sums(inputs, vectors, traced, targets)
            self._joined.side.send_fisher(sums)

    def _apply(self, choice: Coefficients, directions: Directions, phases: Phases) -> None:
        with phases("apply"):
            direction = directions.vectors[choice.candidate]
            # The update before this one is kept, so that the step can be undone.
            update = combine(
                direction, self._previous_update, choice.alpha, choice.mu, out=self._spare
            )
            self._previous_update, self._spare = update, self._previous_update
            add_to_parameters(self._parameters, update)
            self._applied_step = self._step
            self._average()

    def _average(self) -> None:
        """Average the parameters of the shards whose average this worker mirrors."""
        if not self._averages:
            return
        parameters, layouts = flatten(self._parameters), self._joined.plan.layouts
        for shard, average in self._averages.items():
            average.update(self._step, layouts[shard].gather(parameters))

    def _measure(self, part: BatchPart, phases: Phases) -> None:
        with phases("measure"):
            with self._user_code("the loss"):
                loss = self._computer.loss(part.inputs, part.targets)
            self._joined.side.send_loss(loss)

    def _receive_parameters(self, phases: Phases) -> None:
        with phases("apply"):
            parameters = self._joined.side.receive_parameters()
            if parameters is not None:
                self._parameters_before = flatten(self._parameters)
                assign_parameters(self._parameters, parameters)
                self._applied_step = self._step

    def evaluate(
        self, split: Split, parameters: Array | None, before: EvaluationSums | None
    ) -> EvaluationSums:
        """Evaluate more of this worker's part of a split, after the cases of `before`.

        `parameters` [P], if given, are used instead of the worker's own.
        """
        own = flatten(self._parameters)
        if parameters is not None:
            assign_parameters(self._parameters, to_tensor(parameters))
        try:
            with self._user_code("the evaluation"):
                return evaluate(
                    self._computer,
                    self._task,
                    self._cases,
                    split,
                    limit=self._evaluation_limit,
                    num_workers=len(self._joined.group.workers),
                    rank=self._joined.group.rank,
                    chunk=self._evaluation_chunk,
                    before=before,
                )
        finally:
            assign_parameters(self._parameters, own)

    def buffers(self) -> dict[str, Array]:
        """Return the buffers of this worker's model."""
        return read_buffers(self._computer.model)

    def set_buffers(self, values: Arrays) -> None:
        """Set the buffers of this worker's model."""
        write_buffers(self._computer.model, values)

    def checksums(self) -> tuple[str, ...]:
        """Return the checksum of what this worker mirrors of each shard."""
        parameters = flatten(self._parameters)
        return tuple(
            checksum(layout.gather(parameters), layout.gather(self._previous_update))
            for layout in self._joined.plan.layouts
        )


def _is_finite(sums: GradientSums) -> bool:
    return all_finite((sums.loss, sums.gradient))
