"""Computes the statistics of a gradient worker's part and sends them to the inverse workers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from kfac_dist.config import KFACSpec
from kfac_dist.core.compute import BatchComputer
from kfac_dist.core.factors import KroneckerPair, Link
from kfac_dist.core.passes.chain import Trace
from kfac_dist.core.statistics.sums import BatchStatistics
from workers.exchange.host_copies import HostCopies
from workers.exchange.messages import JobContext, StatisticsHeader, StatisticsMessage
from workers.exchange.parcels import StatisticsOnTheWay
from workers.gradient_worker.batches import BatchPart, Subset
from workers.gradient_worker.courier import Courier

SendStatistics = Callable[[int, StatisticsMessage], None]
"""Sends a message to the inverse worker of that rank.

When it returns, the arrays in the message have been read and may be overwritten; Ray has put them
into its store then.
"""

_LOG = logging.getLogger(__name__)


class StatisticsSender:
    """Computes the batch factors of gradient worker `rank` and sends them to their owners.

    `links` are the pairs of neighbouring layers whose cross factors the inverse needs.
    """

    def __init__(
        self,
        job: JobContext,
        settings: KFACSpec,
        rank: int,
        computer: BatchComputer,
        links: Sequence[Link],
        send: SendStatistics,
    ) -> None:
        self._job = job
        self._settings = settings
        self._rank = rank
        self._computer = computer
        self._links = links
        self._send = send
        device = computer.parameters[0].device
        self._copies = HostCopies(device)
        # Without a copy to wait for, the step delivers the messages itself.
        self._courier = Courier() if device.type == "cuda" else None
        self._warned = False
        self._assignment: Mapping[int, tuple[str, ...]] = {}
        self._assignment_epochs: Mapping[int, int] = {}

    def connect(
        self, assignment: Mapping[int, tuple[str, ...]], assignment_epochs: Mapping[int, int]
    ) -> None:
        """Send to these inverse workers from now on.

        Args:
            assignment: the layers that each inverse worker owns.
            assignment_epochs: distinguishes each inverse worker from its predecessors.
        """
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
    ) -> Mapping[str, Tensor] | None:
        """Compute the statistics of a step, send the factors, and return the moments in `bases`.

        Statistics that are not finite are not usable: then only headers are sent, every inverse
        worker refuses the step, and None is returned.

        Args:
            step: the step, from 1; it determines the sampled targets.
            part: this worker's part of the batch.
            trace: what the gradient's pass recorded of `part`, where it can be used again.
            bases: the bases of the inverses in use, by layer; empty where no moments are needed.
            usable: False if the gradient was not finite; nothing is computed then.
        """
        rows = part.subset(self._settings.statistics_fraction)
        statistics = self._compute(step, part, rows, trace, bases) if usable else None
        leaving = None if statistics is None else StatisticsOnTheWay(statistics, self._copies)
        headers = self._headers(step, len(rows.positions), usable=leaving is not None)
        if self._courier is None:
            self._deliver(headers, leaving)
        else:
            self._courier.deliver(lambda: self._deliver(headers, leaving))
        return None if statistics is None else statistics.moments

    def _headers(self, step: int, num_cases: int, *, usable: bool) -> dict[int, StatisticsHeader]:
        return {
            worker: StatisticsHeader(
                job=self._job.job,
                step=step,
                rank=self._rank,
                num_cases=num_cases,
                layers=layers,
                assignment_epoch=self._assignment_epochs[worker],
                usable=usable,
            )
            for worker, layers in self._assignment.items()
        }

    def _deliver(
        self, headers: Mapping[int, StatisticsHeader], leaving: StatisticsOnTheWay | None
    ) -> None:
        if leaving is None:
            for worker, header in headers.items():
                self._send(worker, StatisticsMessage(header=header, parcel=None))
            return
        try:
            parcel = leaving.parcel()
            for worker, header in headers.items():
                own = parcel.part(header.layers, self._links)
                self._send(worker, StatisticsMessage(header=header, parcel=own))
        finally:
            leaving.release()

    def _compute(
        self,
        step: int,
        part: BatchPart,
        rows: Subset,
        trace: Trace | None,
        bases: Mapping[str, KroneckerPair],
    ) -> BatchStatistics | None:
        """Return the statistics of `rows`, None if a number is not finite."""
        statistics = self._computer.statistics(
            rows.select(part.inputs),
            rows.select(part.targets),
            step=step,
            first_row=rows.first_row,
            links=self._links,
            bases=bases,
            trace=trace and trace.rows_at(rows.positions),
        )
        if statistics.is_finite():
            return statistics
        if not self._warned:
            self._warned = True
            layers = ", ".join(statistics.not_finite())
            _LOG.warning("step %d: refused statistics, not finite in layers %s", step, layers)
        return None
