"""Changes the numbers of workers of a running job, as is wished for, and says what was done."""

from __future__ import annotations

from collections.abc import Sequence

from kfac_dist.config import WorkersSpec
from kfac_dist.coordination.steps.assignment import LayerCost
from workers.driver.crew.crew import Crew
from workers.driver.crew.inverse.inverse_scaling import InverseScaling, Rescaled
from workers.driver.records.journal import JobJournal
from workers.driver.wishes import WishBox


class Rescaling:
    """Compares the wishes with the crew before each step.

    Args:
        workers: the numbers at the start.
        layers: all layers, in the order of the model; none for a first-order optimizer.
        wishes: what is wished for.
        journal: receives what was done, or why nothing was.
    """

    def __init__(
        self,
        workers: WorkersSpec,
        layers: Sequence[LayerCost],
        wishes: WishBox,
        journal: JobJournal,
    ) -> None:
        self._workers = workers
        self._wishes = wishes
        self._journal = journal
        self._inverse = InverseScaling(layers, workers.inverse)
        self._told: set[str] = set()

    def advance(self, crew: Crew, step: int, statistics_step: int) -> tuple[int, ...]:
        """Do what can be done before `step`; return the inverse workers whose layers are others.

        `statistics_step` is the newest step that computed statistics.
        """
        wishes = self._wishes.newest()
        if wishes.gradient is not None:
            crew.changes.wished = wishes.gradient
        if wishes.inverse is None:
            return ()
        done = self._inverse.advance(crew, wishes.inverse, step, statistics_step)
        if isinstance(done, str):
            self._tell_once(f"{wishes.inverse} inverse workers are wished for: {done}")
        if not isinstance(done, Rescaled):
            return ()
        self._told.clear()
        self._journal.event("inverse_workers_scaled", _message(done, wishes.inverse, step))
        return done.changed

    def _tell_once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            self._journal.event("scale_waits", message)


def _message(done: Rescaled, wished: int, step: int) -> str:
    moved = f"{', '.join(done.moved)} moved" if done.moved else "no layer moved"
    idle = wished - done.num_workers
    rest = f"; there are no layers for {idle} more" if idle else ""
    return f"{done.num_workers} inverse workers from step {step} on: {moved}{rest}"
