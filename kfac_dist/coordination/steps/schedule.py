"""Values over the steps: learning rate, damping, batch size (algorithm.md section 11).

What is due in a step is counted in `plan.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from kfac_dist.coordination.checks import check_interval
from kfac_dist.errors import InvalidSpecError

ScheduleKind = Literal["constant", "cosine", "exponential"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A value that goes from `initial` to `final`; steps count from 1.

    It rises linearly from 0 to `initial` at step `warmup_steps`, leaves it in the step after, and
    is `final` from step `steps` on. Between the two, with p running from 0 to 1,

        cosine       final + (initial - final) (1 + cos(pi p)) / 2
        exponential  initial (final / initial)^p

    A constant one stays at `initial` whatever `final` and `steps`.

    Raises:
        InvalidSpecError: an exponential end is not above 0, or `steps` comes too early.
    """

    kind: ScheduleKind
    initial: float
    final: float
    steps: int
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        check_interval("warmup_steps", self.warmup_steps, 0)
        if self.kind == "constant":
            return
        check_interval("steps", self.steps, self.warmup_steps + 1)
        if self.kind == "exponential" and not (self.initial > 0 and self.final > 0):
            raise InvalidSpecError(
                "an exponential schedule needs initial and final above 0; "
                f"got {self.initial:g} and {self.final:g}"
            )

    def value(self, step: int) -> float:
        """Return the value of `step`."""
        if step < self.warmup_steps:
            return self.initial * step / self.warmup_steps
        if self.kind == "constant":
            return self.initial
        if step >= self.steps:
            return self.final
        start = max(self.warmup_steps, 1)
        progress = (step - start) / (self.steps - start)
        if self.kind == "cosine":
            weight = (1 + math.cos(math.pi * progress)) / 2
            return self.initial * weight + self.final * (1 - weight)
        ratio: float = (self.final / self.initial) ** progress
        return self.initial * ratio


@dataclass(frozen=True, kw_only=True)
class GrowingBatch:
    """A batch of `initial` cases in step 1 that is the whole training set from `full_at` on.

    Exponential growth is the paper's: `m_k = initial (num_cases / initial)^((k - 1) / (full_at -
    1))`.
    """

    kind: Literal["cosine", "exponential"]
    initial: int
    full_at: int


def batch_size_at(step: int, batch_size: int | GrowingBatch, num_cases: int) -> int:
    """Return the number of cases in the batch of `step`, counted from 1.

    A fixed size is returned as it is. One that grows is rounded; an `initial` above `num_cases`
    means all cases in every step.

    Raises:
        InvalidSpecError: a number is below 1.
    """
    check_interval("step", step, 1)
    check_interval("num_cases", num_cases, 1)
    if isinstance(batch_size, int):
        check_interval("batch_size", batch_size, 1)
        return batch_size
    check_interval("batch_size.initial", batch_size.initial, 1)
    check_interval("batch_size.full_at", batch_size.full_at, 1)
    growth = Schedule(
        kind=batch_size.kind,
        initial=min(batch_size.initial, num_cases),
        final=num_cases,
        steps=batch_size.full_at,
    )
    return round(growth.value(step))
