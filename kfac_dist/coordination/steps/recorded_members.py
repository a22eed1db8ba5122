"""Who did each step of a recorded run, and can a replay go through the changes?

Results depend on the number of gradient workers, by rounding, and on nothing else about the group:
neither on who the members are nor on the number of shards. So a replay changes the number where the
run did. It cannot go through a change that left something behind in the run's numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, kw_only=True)
class RecordedChange:
    """A change of the members after `after_step`, which `workers_before` gradient workers did.

    Attributes:
        repeats_step: the step after it had been begun, and was repeated.
        undoes_step: some members had applied that step, and subtracted its update again.
        loses_buffers: a gradient worker was lost with the buffers of its model.
    """

    after_step: int
    workers_before: int
    repeats_step: bool
    undoes_step: bool
    loses_buffers: bool

    def obstacle(self, workers_after: int) -> str | None:
        """Return why no replay can repeat the next step, which `workers_after` did; None if can."""
        step = self.after_step + 1
        begun = f"step {step} was repeated after a member was lost"
        if self.undoes_step:
            return f"{begun}, and an update that was subtracted again is undone only to rounding"
        if self.loses_buffers:
            return (
                f"a gradient worker was lost before step {step}, with the buffers of its model, "
                "which are not recorded"
            )
        if self.repeats_step and workers_after != self.workers_before:
            return (
                f"{begun}, with {workers_after} instead of {self.workers_before} gradient workers; "
                "which statistics of the first try had arrived is not recorded"
            )
        return None


def obstacles(
    changes: Sequence[RecordedChange], workers: Mapping[int, int | None]
) -> Iterator[tuple[int, str]]:
    """Return the steps that no replay can repeat because of changes, each with a sentence.

    `workers` has the number of gradient workers by step.
    """
    for change in changes:
        step = change.after_step + 1
        after = workers.get(step)
        obstacle = change.obstacle(change.workers_before if after is None else after)
        if obstacle is not None:
            yield step, obstacle


def changed_numbers(workers: Sequence[int | None]) -> dict[int, int]:
    """Return, by step, each number of gradient workers that is not that of the step before.

    `workers` has the number of each step from 1 on, None where it is not recorded.
    """
    return {
        step: after
        for step, (before, after) in enumerate(pairwise(workers), start=2)
        if after is not None and after != before
    }
