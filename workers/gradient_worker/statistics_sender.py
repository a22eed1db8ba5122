"""Computes the statistics of a gradient worker's part, adds up those of all, and sends the sums.

Each layer's sums are formed by one gradient worker, the same one in every step, and sent once to
the inverse worker that owns the layer. So neither side's traffic grows with the number of gradient
workers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kfac_dist.config import KFACSpec
from kfac_dist.coordination.steps.statistics_parts import LayerGroup, layer_groups
from kfac_dist.core.compute import BatchComputer
from kfac_dist.core.factors import KroneckerPair, Link
from kfac_dist.core.passes.chain import Trace
from kfac_dist.core.statistics.sums import BatchStatistics
from workers.exchange.host_copies import HostCopies
from workers.exchange.messages import JobContext, StatisticsHeader, StatisticsMessage
from workers.exchange.parcels import StatisticsOnTheWay, StatisticsParcel, flat_arrays
from workers.exchange.process_group import Group, Kind
from workers.gradient_worker.batches import BatchPart, Subset

SendStatistics = Callable[[int, Mapping[int, list[StatisticsMessage]]], None]
"""Sends the messages of a step to inverse workers, by their rank, and returns once they are there.

It is called in every step with statistics, without messages if this worker adds none up."""

_LOG = logging.getLogger(__name__)


class StatisticsSender:
    """Computes the batch factors of gradient worker `rank` and sends sums to their owners.

    `links` are the pairs of neighbouring layers whose cross factors the inverse needs.
    """

    def __init__(
        self,
        job: JobContext,
        settings: KFACSpec,
        computer: BatchComputer,
        links: Sequence[Link],
        send: SendStatistics,
    ) -> None:
        self._job = job
        self._settings = settings
        self._computer = computer
        self._links = links
        self._send = send
        self._copies = HostCopies(computer.parameters[0].device)
        self._warned = False
        self._assignment: Mapping[int, tuple[str, ...]] = {}
        self._assignment_epochs: Mapping[int, int] = {}
        self._groups: tuple[LayerGroup, ...] | None = None  # planned from the first statistics
        self._group: Group  # set by `join`

    def join(self, group: Group) -> None:
        """Add up with the other gradient workers of `group` from now on."""
        self._group = group
        self._groups = None

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
        self._groups = None

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

        Statistics that are not finite are not usable: every inverse worker refuses the step then,
        and None is returned. When the call returns, all sums that this worker forms have arrived.

        Args:
            step: the step, from 1; it determines the sampled targets.
            part: this worker's part of the batch.
            trace: what the gradient's pass recorded of `part`, where it can be used again.
            bases: the bases of the inverses in use, by layer; empty where no moments are needed.
            usable: False if the gradient was not finite; nothing is computed then.
        """
        rows = part.subset(self._settings.statistics_fraction)
        statistics = self._compute(step, part, rows, trace, bases) if usable else None
        leaving = StatisticsOnTheWay(statistics or self._zero(step, part), self._copies)
        try:
            self._deliver(step, part, leaving.parcel(), usable=statistics is not None)
        finally:
            leaving.release()
        return None if statistics is None else statistics.moments

    def _deliver(
        self, step: int, part: BatchPart, parcel: StatisticsParcel, *, usable: bool
    ) -> None:
        messages: dict[int, list[StatisticsMessage]] = {}
        num_cases = len(part.subset_positions(self._settings.statistics_fraction))
        for group, own, is_usable in self._add_up(parcel, usable=usable):
            header = StatisticsHeader(
                job=self._job.job,
                step=step,
                num_cases=num_cases,
                layers=group.layers,
                assignment_epoch=self._assignment_epochs[group.inverse_worker],
                usable=is_usable,
            )
            message = StatisticsMessage(header=header, parcel=own if is_usable else None)
            messages.setdefault(group.inverse_worker, []).append(message)
        self._send(step, messages)
        self._group.finish_sending()  # the memory of the parcel is used again

    def _zero(self, step: int, part: BatchPart) -> BatchStatistics:
        """Return zeros in the shapes of the statistics."""
        nothing = part.inputs[:0], part.targets[:0]
        return self._computer.statistics(*nothing, step=step, links=self._links)

    def _add_up(
        self, parcel: StatisticsParcel, *, usable: bool
    ) -> list[tuple[LayerGroup, StatisticsParcel, bool]]:
        """Exchange with the other workers; return the sums of the groups that are this one's.

        Each comes with whether the statistics of all workers were usable.
        """
        workers = self._group.workers
        mine: list[tuple[LayerGroup, StatisticsParcel, list[Tensor]]] = []
        for group in self._layer_groups(parcel):
            own = parcel.part(group.layers, self._links)
            summer = group.summed_by(len(workers))
            flat = _flat(own, usable=usable) if len(workers) > 1 or not usable else None
            if summer != self._group.rank:
                assert flat is not None
                self._group.send(Kind.STATISTICS, flat, summer)
            elif len(workers) == 1:
                mine.append((group, own, []))
            else:
                assert flat is not None
                parts = [flat if rank == summer else torch.empty_like(flat) for rank in workers]
                mine.append((group, own, parts))
        return [
            (group, own, usable) if not parts else (group, *self._sum(own, parts))
            for group, own, parts in mine
        ]

    def _sum(self, own: StatisticsParcel, parts: Sequence[Tensor]) -> tuple[StatisticsParcel, bool]:
        """Receive the parts of the other workers, and add all in the order of the ranks."""
        others = [
            (part, rank)
            for part, rank in zip(parts, self._group.workers, strict=True)
            if rank != self._group.rank
        ]
        self._group.receive_all(Kind.STATISTICS, others)
        total = parts[0].clone()
        for part in parts[1:]:
            total.add_(part)
        num_usable = int(total[0])
        return own.with_values(total[1:].numpy()), num_usable == len(parts)

    def _layer_groups(self, parcel: StatisticsParcel) -> tuple[LayerGroup, ...]:
        if self._groups is None:
            sizes = {
                name: sum(array.size for array in arrays.values())
                for name, arrays in parcel.factors.items()
            }
            self._groups = layer_groups(self._assignment, sizes, len(self._group.workers))
        return self._groups

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


def _flat(parcel: StatisticsParcel, *, usable: bool) -> Tensor:
    """Return the arrays of a parcel as one vector, after a 1 if they are usable, else a 0."""
    arrays = [torch.from_numpy(array).reshape(-1) for array in flat_arrays(parcel)]
    flag = torch.full((1,), float(usable), dtype=arrays[0].dtype)
    return torch.cat([flag, *arrays])
