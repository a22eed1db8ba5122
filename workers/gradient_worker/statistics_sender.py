"""From a gradient worker's part of a batch to the inverse workers that own the layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from kfac_dist.config import KFACSpec
from kfac_dist.core.compute import BatchComputer
from kfac_dist.core.factors import KroneckerPair, Link
from kfac_dist.core.passes.chain import Trace
from kfac_dist.core.statistics.sums import BatchStatistics
from workers.exchange.messages import JobContext, StatisticsHeader
from workers.exchange.parcels import StatisticsParcel, pack_statistics
from workers.gradient_worker.batches import BatchPart, Subset

# Inverse worker, header, sums of what its layers need.
Send = Callable[[int, StatisticsHeader, StatisticsParcel | None], None]


class SentStatistics(NamedTuple):
    """Whether the statistics of a step were usable, and the moments, which go another way."""

    usable: bool
    moments: Mapping[str, Tensor] | None


class StatisticsSender:
    """Computes the batch factors of gradient worker `rank` and sends them to their owners.

    `links` are the neighbours of the structure of the inverse.
    """

    def __init__(
        self,
        job: JobContext,
        settings: KFACSpec,
        rank: int,
        computer: BatchComputer,
        links: Sequence[Link],
        send: Send,
    ) -> None:
        self._job = job
        self._settings = settings
        self._rank = rank
        self._computer = computer
        self._links = links
        self._send = send
        self._assignment: Mapping[int, tuple[str, ...]] = {}
        self._assignment_epochs: Mapping[int, int] = {}

    def connect(
        self, assignment: Mapping[int, tuple[str, ...]], assignment_epochs: Mapping[int, int]
    ) -> None:
        """Send to these inverse workers from now on; epochs tell a worker from its successor."""
        self._assignment = assignment
        self._assignment_epochs = assignment_epochs

    def send(
        self,
        step: int,
        part: BatchPart,
        trace: Trace | None,
        bases: Mapping[str, KroneckerPair],
        *,
        usable: bool,
    ) -> SentStatistics:
        """Compute and send the statistics of a step, with moments in `bases`.

        `trace` is what the pass over this part has seen, where it can be made use of.

        They are not usable when a number is not finite, or `usable` is False to begin with because
        the gradient was not: then headers go out alone, and every inverse worker refuses the step.
        """
        rows = part.subset(self._settings.statistics_fraction)
        statistics = self._compute(step, part, rows, trace, bases) if usable else None
        parcel = None if statistics is None else pack_statistics(statistics)
        for worker, layers in self._assignment.items():
            header = StatisticsHeader(
                job=self._job.job,
                step=step,
                rank=self._rank,
                num_cases=len(rows.positions),
                layers=layers,
                assignment_epoch=self._assignment_epochs[worker],
                usable=parcel is not None,
            )
            self._send(worker, header, None if parcel is None else parcel.part(layers, self._links))
        return SentStatistics(
            usable=statistics is not None,
            moments=None if statistics is None else statistics.moments,
        )

    def _compute(
        self,
        step: int,
        part: BatchPart,
        rows: Subset,
        trace: Trace | None,
        bases: Mapping[str, KroneckerPair],
    ) -> BatchStatistics | None:
        statistics = self._computer.statistics(
            rows.take(part.inputs),
            rows.take(part.targets),
            step=step,
            first_row=rows.first_row,
            links=self._links,
            bases=bases,
            trace=trace and trace.rows_at(rows.positions),
        )
        return statistics if statistics.is_finite() else None
