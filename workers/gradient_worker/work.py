"""A gradient worker's part of the algorithm; read `step` first.

No Ray: the actor beside it is a shell around it. It mirrors the parameters and
the previous update, which the parameter server owns, by doing the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch

from kfac_dist.config import KFACSpec
from kfac_dist.core.blocks.registration import register
from kfac_dist.core.compute import BatchComputer, GradientSums
from kfac_dist.core.passes.chain import Trace
from kfac_dist.core.passes.distributions import get_distribution
from kfac_dist.core.step.step_rule import combine
from kfac_dist.core.vector import add_to_parameters, assign_parameters, flatten, is_finite
from kfac_dist.data import Split
from kfac_dist.tasks import Task, build_model, load_task, torch_dtype, user_code
from workers.exchange.arrays import Array, Arrays, to_tensor
from workers.exchange.checksum import checksum
from workers.exchange.messages import EvaluationSums, JobContext, StepOrder, WorkerReport
from workers.exchange.moments import WorkerMoments
from workers.exchange.process_group import Group
from workers.exchange.step import Coefficients, Directions, WorkerSide
from workers.gradient_worker.batches import BatchPart, BatchReader, Subset
from workers.gradient_worker.buffers import read_buffers, write_buffers
from workers.gradient_worker.evaluation import evaluate
from workers.gradient_worker.statistics_sender import Send, StatisticsSender
from workers.phases import Phases
from workers.planning import structure_of


class GradientWork:
    """Model, data and mirror of the parameters of gradient worker `rank`."""

    def __init__(self, job: JobContext, rank: int, device: torch.device, send: Send) -> None:
        spec, optimizer = job.spec, job.spec.optimizer
        self._rank = rank
        self._num_workers = spec.workers.gradient
        self._kfac = optimizer if isinstance(optimizer, KFACSpec) else None
        self._task: Task = load_task(
            spec, job.base_dir, data_dir=job.data_dir, cache_dir=job.cache_dir
        )
        self._data = {
            "train": self._task.train_data(),
            "test": self._task.test_data(),
        }
        model = build_model(self._task, spec.seed, torch_dtype(spec.dtype)).to(device)
        registration = register(model, self._kfac) if self._kfac else None
        self._computer = BatchComputer(
            model,
            distribution=get_distribution(self._task.distribution),
            seed=spec.seed,
            registration=registration,
            fisher_type=self._kfac.fisher_type if self._kfac else "mc",
        )
        self._parameters = self._computer.parameters
        self._previous_update = torch.zeros_like(flatten(self._parameters))
        self._reader = BatchReader(
            self._data["train"],
            seed=spec.seed,
            num_shards=self._num_workers,
            rank=rank,
            device=device,
        )
        self._moment_layers: tuple[str, ...] = ()
        self._statistics: StatisticsSender | None = None
        if self._kfac is not None and registration is not None:
            structure = structure_of(self._kfac, registration)
            self._moment_layers = registration.names if structure.observes_moments else ()
            self._statistics = StatisticsSender(
                job, self._kfac, rank, self._computer, structure.links, send
            )
        self._group: Group | None = None
        self._side: WorkerSide | None = None

    def join(self, group: Group) -> None:
        """Exchange through `group` from now on, starting from the server's parameters."""
        like = self._previous_update
        self._group = group
        self._side = WorkerSide(group, like.numel(), like)
        parameters, self._previous_update = self._side.receive_state()
        assign_parameters(self._parameters, parameters)
        self._moments = WorkerMoments(group, self._moment_layers, like)
        self._moments.receive_bases()
        group.take_traffic()  # of a step's, joining is no part

    def connect(
        self, assignment: Mapping[int, tuple[str, ...]], assignment_epochs: Mapping[int, int]
    ) -> None:
        """Send the statistics of these layers to these inverse workers from now on."""
        assert self._statistics is not None, "only K-FAC has inverse workers"
        self._statistics.connect(assignment, assignment_epochs)

    def step(self, order: StepOrder) -> WorkerReport:
        """Do this worker's part of one step.

        Raises:
            UserTaskError: the user's model or data set raised.
            PeerLostError: another member of the group is gone.
        """
        assert self._side is not None, "join a group first"
        phases = Phases()
        part = self._read(order, phases)
        sums = self._compute(part, phases)
        with phases("reduce"):
            self._side.send_gradient(sums, len(part.slice))
        if order.plan.update_factors:
            self._send_statistics(order, self._side, part, sums, phases)
        if self._kfac is None:
            self._receive_parameters(self._side, phases)
        else:
            self._take_part_in_choice(self._side, part, sums.trace, phases)
        return self._report(order, phases)

    def _report(self, order: StepOrder, phases: Phases) -> WorkerReport:
        assert self._group is not None, "a step has a group"
        return WorkerReport(
            rank=self._rank,
            step=order.plan.step,
            phase_seconds=phases.seconds,
            traffic=self._group.take_traffic(),
        )

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
        order: StepOrder,
        side: WorkerSide,
        part: BatchPart,
        sums: GradientSums,
        phases: Phases,
    ) -> None:
        if self._statistics is None:
            return
        bases, usable = self._moments.bases, _is_finite(sums)
        with phases("statistics"), self._user_code("the statistics"):
            sent = self._statistics.send(order.plan.step, part, sums.trace, bases, usable=usable)
        with phases("reduce"):
            side.send_usable(sent.usable)
            self._moments.send(sent.moments)

    def _take_part_in_choice(
        self,
        side: WorkerSide,
        part: BatchPart,
        trace: Trace | None,
        phases: Phases,
    ) -> None:
        with phases("wait_direction"):
            directions = side.receive_directions()
        if directions is None:
            return
        if directions.fisher_fraction is not None:
            rows = part.subset(directions.fisher_fraction)
            self._send_fisher_products(side, part, rows, trace, directions, phases)
        with phases("choose"):
            choice = side.receive_choice()
        if choice is None:
            return
        self._apply(choice, directions, phases)
        with phases("receive_bases"):
            self._moments.receive_bases()
        if choice.measure:
            self._measure(side, part, phases)

    def _send_fisher_products(
        self,
        side: WorkerSide,
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
                sums = self._computer.fisher_sums(rows.take(part.inputs), vectors, traced)
            side.send_fisher(sums)

    def _apply(self, choice: Coefficients, directions: Directions, phases: Phases) -> None:
        with phases("apply"):
            direction = directions.vectors[choice.candidate]
            self._previous_update = combine(
                direction, self._previous_update, choice.alpha, choice.mu
            )
            add_to_parameters(self._parameters, self._previous_update)

    def _measure(self, side: WorkerSide, part: BatchPart, phases: Phases) -> None:
        with phases("measure"):
            with self._user_code("the loss"):
                loss = self._computer.loss(part.inputs, part.targets)
            side.send_loss(loss)

    def _receive_parameters(self, side: WorkerSide, phases: Phases) -> None:
        with phases("apply"):
            parameters = side.receive_parameters()
            if parameters is not None:
                assign_parameters(self._parameters, parameters)

    def evaluate(self, split: Split, parameters: Array | None) -> EvaluationSums:
        """Evaluate this worker's part of a whole split.

        `parameters` [P] are used instead of the worker's own when given.
        """
        own = flatten(self._parameters)
        if parameters is not None:
            assign_parameters(self._parameters, to_tensor(parameters))
        try:
            with self._user_code("the evaluation"):
                return evaluate(
                    self._computer,
                    self._task,
                    self._data[split],
                    num_shards=self._num_workers,
                    rank=self._rank,
                )
        finally:
            assign_parameters(self._parameters, own)

    def buffers(self) -> dict[str, Array]:
        """Return the buffers of this worker's model."""
        return read_buffers(self._computer.model)

    def set_buffers(self, values: Arrays) -> None:
        """Take over buffers."""
        write_buffers(self._computer.model, values)

    def checksum(self) -> str:
        """Return the checksum of the mirrored parameters and previous update."""
        return checksum(flatten(self._parameters), self._previous_update)


def _is_finite(sums: GradientSums) -> bool:
    return is_finite(sums.loss) and is_finite(sums.gradient)
