"""From a gradient worker's part of a batch to the inverse workers that own the layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kfac_dist.config import KFACSpec
from kfac_dist.core.compute import BatchComputer
from kfac_dist.core.factors import KroneckerPair
from workers.batches import BatchPart, Subset
from workers.messages import JobContext, StatisticsHeader
from workers.transport import Array, pack_pairs

# Inverse worker, header, packed sums of its layers.
Send = Callable[[int, StatisticsHeader, Array | None], None]


class StatisticsSender:
    """Computes the batch factors of gradient worker `rank` and sends them to their owners."""

    def __init__(
        self, job: JobContext, settings: KFACSpec, rank: int, computer: BatchComputer, send: Send
    ) -> None:
        self._job = job
        self._settings = settings
        self._rank = rank
        self._computer = computer
        self._send = send
        self._assignment: Mapping[int, tuple[str, ...]] = {}
        self._assignment_epochs: Mapping[int, int] = {}

    def connect(
        self, assignment: Mapping[int, tuple[str, ...]], assignment_epochs: Mapping[int, int]
    ) -> None:
        """Send to these inverse workers from now on; epochs tell a worker from its successor."""
        self._assignment = assignment
        self._assignment_epochs = assignment_epochs

    def send(self, step: int, part: BatchPart, *, usable: bool) -> bool:
        """Compute and send the statistics of a step; return whether they were usable.

        They are not when a number is not finite, or `usable` is False to begin with because the
        gradient was not: then headers go out alone, and every inverse worker refuses the step.
        """
        rows = part.subset(self._settings.statistics_fraction)
        pairs = self._compute(step, part, rows) if usable else None
        for worker, layers in self._assignment.items():
            header = StatisticsHeader(
                job=self._job.job,
                step=step,
                rank=self._rank,
                num_cases=len(rows.positions),
                layers=layers,
                assignment_epoch=self._assignment_epochs[worker],
                usable=pairs is not None,
            )
            array = None if pairs is None else pack_pairs(pairs[name] for name in layers)
            self._send(worker, header, array)
        return pairs is not None

    def _compute(self, step: int, part: BatchPart, rows: Subset) -> dict[str, KroneckerPair] | None:
        pairs = self._computer.statistics(
            rows.take(part.inputs), rows.take(part.targets), step=step, first_row=rows.first_row
        )
        return pairs if all(pair.is_finite() for pair in pairs.values()) else None
