"""A gradient worker's part of the algorithm; read `GradientWork.step` first.

No Ray here: the actor in `workers.gradient_worker.actor` is a shell around this. The parameter
server owns the parameters and the previous update; a gradient worker mirrors them by doing the
same arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from kfac_dist.core.compute import BatchComputer, GradientSums
from kfac_dist.core.passes.chain import Trace
from kfac_dist.core.step.choice import combine
from kfac_dist.core.vector import add_to_parameters, assign_parameters, flatten, is_finite
from kfac_dist.data import MapDataset, Split
from kfac_dist.tasks import Task, user_code
from workers.exchange.arrays import Array, Arrays, to_tensor
from workers.exchange.checksum import checksum
from workers.exchange.messages import EvaluationSums, StepOrder, WorkerReport
from workers.exchange.moments import WorkerMoments
from workers.exchange.process_group import Group
from workers.exchange.step import Coefficients, Directions, WorkerSide
from workers.gradient_worker.batches import BatchPart, BatchReader, Subset
from workers.gradient_worker.buffers import read_buffers, write_buffers
from workers.gradient_worker.evaluation import evaluate
from workers.gradient_worker.reading import CaseReader
from workers.gradient_worker.statistics_sender import StatisticsSender
from workers.phases import Phases


@dataclass(frozen=True, kw_only=True)
class Joined:
    """A gradient worker's ends of the exchange with the parameter server, once it has joined."""

    group: Group
    side: WorkerSide
    moments: WorkerMoments


class GradientWork:
    """Model, data and mirror of the parameters of gradient worker `rank`.

    `build_gradient_work` makes one; `join` comes before the first step.
    """

    def __init__(
        self,
        *,
        rank: int,
        num_workers: int,
        task: Task,
        data: Mapping[Split, MapDataset],
        cases: CaseReader,
        computer: BatchComputer,
        reader: BatchReader,
        sender: StatisticsSender | None,
        moment_layers: Sequence[str],
        evaluation_limit: int | None,
        evaluation_chunk: int,
    ) -> None:
        """Store the parts.

        Args:
            rank: the worker's place among `num_workers` gradient workers, from 0.
            num_workers: see `rank`.
            task: the user's task; errors of its code are reported as its own.
            data: training and test data.
            cases: reads both, for evaluations.
            computer: computes on the worker's model, which holds the mirrored parameters.
            reader: reads this worker's part of each batch of the training data.
            sender: sends statistics to the inverse workers; None for a first-order optimizer.
            moment_layers: the layers with second moments to send (EKFAC), empty without any.
            evaluation_limit: how many cases of each split are evaluated, over all workers; None
                for all.
            evaluation_chunk: how many cases are evaluated together.
        """
        self._rank = rank
        self._num_workers = num_workers
        self._task = task
        self._data = data
        self._cases = cases
        self._computer = computer
        self._reader = reader
        self._sender = sender
        self._moment_layers = moment_layers
        self._evaluation_limit = evaluation_limit
        self._evaluation_chunk = evaluation_chunk
        self._parameters = computer.parameters
        self._previous_update = torch.zeros_like(flatten(computer.parameters))
        self._joined: Joined  # set by `join`

    def join(self, group: Group) -> None:
        """Exchange through `group` from now on, starting from the server's parameters."""
        like = self._previous_update
        side = WorkerSide(group, like.numel(), like)
        parameters, self._previous_update = side.receive_state()
        assign_parameters(self._parameters, parameters)
        moments = WorkerMoments(group, self._moment_layers, like)
        moments.receive_bases()
        group.take_traffic()  # traffic is counted per step, and joining is not part of one
        self._joined = Joined(group=group, side=side, moments=moments)

    def connect(
        self, assignment: Mapping[int, tuple[str, ...]], assignment_epochs: Mapping[int, int]
    ) -> None:
        """Send the statistics of these layers to these inverse workers from now on."""
        if self._sender is not None:
            self._sender.connect(assignment, assignment_epochs)

    def step(self, order: StepOrder) -> WorkerReport:
        """Do this worker's part of one step.

        Raises:
            UserTaskError: the user's model or data set raised.
            PeerLostError: another member of the group is gone.
        """
        phases = Phases()
        part = self._read(order, phases)
        sums = self._compute(part, phases)
        with phases("reduce"):
            self._joined.side.send_gradient(sums, len(part.slice))
        if self._sender is None:
            self._receive_parameters(phases)
        else:
            if order.plan.update_factors:
                self._send_statistics(self._sender, order, part, sums, phases)
            self._take_part_in_choice(part, sums.trace, phases)
        traffic = self._joined.group.take_traffic()
        return WorkerReport(phase_seconds=phases.seconds, traffic=traffic)

    def _user_code(self, doing: str) -> AbstractContextManager[None]:
        return user_code(self._task, f"{doing} in gradient worker {self._rank}")

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
            self._previous_update = combine(
                direction, self._previous_update, choice.alpha, choice.mu
            )
            add_to_parameters(self._parameters, self._previous_update)

    def _measure(self, part: BatchPart, phases: Phases) -> None:
        with phases("measure"):
            with self._user_code("the loss"):
                loss = self._computer.loss(part.inputs, part.targets)
            self._joined.side.send_loss(loss)

    def _receive_parameters(self, phases: Phases) -> None:
        with phases("apply"):
            parameters = self._joined.side.receive_parameters()
            if parameters is not None:
                assign_parameters(self._parameters, parameters)

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
                    num_workers=self._num_workers,
                    rank=self._rank,
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

    def checksum(self) -> str:
        """Return the checksum of the mirrored parameters and previous update."""
        return checksum(flatten(self._parameters), self._previous_update)


def _is_finite(sums: GradientSums) -> bool:
    return is_finite(sums.loss) and is_finite(sums.gradient)
