"""A race by CPU time: every entrant spends its budget of CPU seconds, in turns with the others.

Only steps count, for every entrant: neither fetching a batch nor an evaluation. A turn is the same
share of the budget for all, so entrants with different budgets finish together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from race import batches, evaluate
from torch import Tensor, nn

from kfac_dist.config import JobSpec
from kfac_dist.core.vector import assign_parameters
from kfac_dist.data import MapDataset
from kfac_dist.tasks import Task, build_model, load_task, torch_dtype

Point = dict[str, float | None]


class Runner(Protocol):
    """An optimizer with its own parameters, in this process or in another."""

    spec: JobSpec
    """The job that gives its batches."""

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        """Do one step and return the CPU seconds it took."""
        ...

    def vectors(self) -> dict[str, Tensor]:
        """Return the vectors [P] to evaluate: `loss` the parameters, `averaged_loss` their mean."""
        ...

    def close(self) -> None:
        """End what the runner has started outside this process."""
        ...


class Setting:
    """The task of a job: its data, its initial parameters, and the loss of any parameters."""

    def __init__(self, spec: JobSpec, task: Task) -> None:
        self.spec = spec
        self.task = task
        self.data: MapDataset = task.train_data()
        self._evaluated = self.model()

    @classmethod
    def load(cls, spec: JobSpec, base_dir: Any, data_dir: Any) -> Setting:
        """Load the task of `spec`; its files are looked for in `base_dir`."""
        return cls(spec, load_task(spec, base_dir, data_dir=data_dir))

    def model(self) -> nn.Module:
        """Return a new model with the initial parameters of the job's seed."""
        return build_model(self.task, self.spec.seed, torch_dtype(self.spec.dtype))

    def loss(self, vector: Tensor) -> float:
        """Return the mean loss of parameters [P] over the whole training set, in nats a case."""
        assign_parameters(list(self._evaluated.parameters()), vector)
        return evaluate(self._evaluated, self.task, self.data)["loss"]


FIRST_MARK = 1 / 15  # of the budget


def marks(budget: float, count: int) -> tuple[float, ...]:
    """Return the CPU seconds of `count` evaluations: a geometric series that ends at `budget`."""
    return tuple(
        budget * FIRST_MARK ** (back / (count - 1 or 1)) for back in reversed(range(count))
    )


@dataclass
class Entrant:
    """A runner, the CPU seconds it has spent, and its curve."""

    name: str
    runner: Runner
    source: Iterator[tuple[Tensor, Tensor]]
    budget: float
    marks: Sequence[float]
    cpu_seconds: float = 0.0
    steps: int = 0
    cases: int = 0
    diverged: bool = False
    curve: list[Point] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Return whether the budget is spent or the loss has diverged."""
        return self.diverged or self.cpu_seconds >= self.budget

    def take_turn(self, share: float, setting: Setting) -> None:
        """Run steps for a share of the budget."""
        until = min(self.cpu_seconds + share * self.budget, self.budget)
        while self.cpu_seconds < until and not self.diverged:
            inputs, targets = next(self.source)
            self.cpu_seconds += self.runner.step(inputs, targets)
            self.steps += 1
            self.cases += len(inputs)
            if self.cpu_seconds >= self.marks[0]:
                self._evaluate(setting)

    def _evaluate(self, setting: Setting) -> None:
        self.marks = [mark for mark in self.marks if mark > self.cpu_seconds] or [math.inf]
        losses = {name: setting.loss(vector) for name, vector in self.runner.vectors().items()}
        self.diverged = not math.isfinite(losses["loss"])
        self.curve.append(
            {"cpu_seconds": round(self.cpu_seconds, 2), "step": self.steps, "cases": self.cases}
            | {name: round(v, 3) if math.isfinite(v) else None for name, v in losses.items()}
        )

    @property
    def seconds_a_step(self) -> float:
        """Mean CPU seconds of a step."""
        return self.cpu_seconds / self.steps


def enter(setting: Setting, name: str, runner: Runner, budget: float, num_marks: int) -> Entrant:
    """Return an entrant with the batches of its job and `num_marks` evaluations."""
    source = batches(runner.spec, setting.data)
    return Entrant(name, runner, source, budget, marks(budget, num_marks))


def race_by_time(setting: Setting, entrants: Sequence[Entrant], num_turns: int) -> None:
    """Run all entrants in `num_turns` turns until their budgets are spent; close their runners."""
    torch.set_num_threads(1)
    try:
        while running := [entrant for entrant in entrants if not entrant.finished]:
            for entrant in running:
                entrant.take_turn(1 / num_turns, setting)
    finally:
        for entrant in entrants:
            entrant.runner.close()


def score(point: Point) -> float:
    """Return the lower loss of parameters and average; infinity if neither is finite."""
    losses = [point.get("loss"), point.get("averaged_loss")]
    return min((loss for loss in losses if loss is not None), default=math.inf)


def seconds_to(curve: Sequence[Point], loss: float, clock: str = "cpu_seconds") -> float | None:
    """Return the seconds after which a curve reaches `loss`; None if it does not.

    Between two points the loss is interpolated linearly in the logarithm of the seconds. For a
    curve that flattens, that overestimates the seconds.
    """
    before: tuple[float, float] | None = None
    for point in curve:
        seconds, reached = point[clock], score(point)
        assert seconds is not None
        if reached <= loss:
            return _between(before, (seconds, reached), loss) if before else seconds
        before = (seconds, reached) if math.isfinite(reached) else None
    return None


def _between(before: tuple[float, float], after: tuple[float, float], loss: float) -> float:
    start, start_loss = before
    end, end_loss = after
    return start * (end / start) ** ((start_loss - loss) / (start_loss - end_loss))
