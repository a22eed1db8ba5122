"""What value do the learning rate, the damping and the batch size have in a step?

See docs/algorithm.md#schedules. What is due in a step is counted in `plan.py`.
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
    """A value that changes from `initial` to `final`; steps count from 1.

    It rises linearly from 0 to `initial` at step `warmup_steps`, leaves `initial` in the next step,
    and is `final` from step `steps` on. In between, with p from 0 to 1, it is

        cosine       final + (initial - final) (1 + cos(pi p)) / 2
        exponential  initial (final / initial)^p

    A constant schedule stays at `initial` and ignores `final` and `steps`.

    Raises:
        InvalidSpecError: an exponential schedule has an end that is not above 0, or `steps` is not
            after `warmup_steps`.
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
        """Return the value in `step`."""
        if step < self.warmup_steps:
            return self.initial * step / self.warmup_steps
        if self.kind == "constant":
            return self.initial
        if step >= self.steps:
            return self.final
        start = max(self.warmup_steps, 1)  # the last step with the value `initial`
        progress = (step - start) / (self.steps - start)
        if self.kind == "cosine":
            weight = (1 + math.cos(math.pi * progress)) / 2
            return self.initial * weight + self.final * (1 - weight)
        ratio: float = (self.final / self.initial) ** progress
        return self.initial * ratio


@dataclass(frozen=True, kw_only=True)
class GrowingBatch:
    """A batch of `initial` cases in step 1 that grows to the whole training set at `full_at`.

    The paper grows it exponentially: in step k it has

        initial (num_cases / initial)^((k - 1) / (full_at - 1))

    cases (docs/algorithm.md#schedules).
    """

    kind: Literal["cosine", "exponential"]
    initial: int
    full_at: int


def batch_size_at(step: int, batch_size: int | GrowingBatch, num_cases: int) -> int:
    """Return the number of cases in the batch of `step`, counted from 1.

    A fixed size is returned unchanged. A growing size is rounded; if its `initial` is above
    `num_cases`, every batch has all cases.

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
