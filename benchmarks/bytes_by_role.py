"""How many bytes does a process of each role send and receive in a step, whatever their number?

No process may exchange more with many gradient workers than with two. All members are threads of
this process, with real connections; what counts is the bytes of the tensors, not the time. The
model has 16 equal layers, so that 16 shards have one each. The step counted has statistics and
Fisher products and no search for gamma, whose two further directions each worker receives, too.

    python benchmarks/bytes_by_role.py
    python benchmarks/bytes_by_role.py --short
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import add_output_options, deliver, document, surroundings, table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kfac_dist.core.packing import packed_size  # noqa: E402
from tests.workers.whole_jobs.local_job import LocalJob, user_spec  # noqa: E402
from workers.exchange.messages import StatisticsMessage, Traffic  # noqa: E402
from workers.exchange.parcels import flat_arrays  # noqa: E402

COUNTS = (1, 2, 4, 8, 16)
SHORT_COUNTS = (1, 2, 4)
STEP = 5  # the first without a refresh of the inverses, or a search for gamma
NUM_LAYERS, WIDTH = 16, 48
TASK = f"""\
import torch
from torch import nn
from torch.utils.data import TensorDataset


class Deep:
    distribution = "gaussian"

    def model(self):
        return nn.Sequential(*(nn.Linear({WIDTH}, {WIDTH}) for _ in range({NUM_LAYERS})))

    def train_data(self, data_dir):
        inputs = torch.randn(64, {WIDTH}, generator=torch.Generator().manual_seed(1))
        return TensorDataset(inputs, inputs.flip(1))

    def test_data(self, data_dir):
        return self.train_data(data_dir)
"""


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """What one process sends and receives in a step, the most of all processes of its role."""

    sent: int
    received: int


@dataclass(frozen=True, kw_only=True)
class Counted:
    """The bytes of a step by role, and those of the parameters [P] and packed factors [F]."""

    gradient_workers: int
    shards: int
    parameters: int
    factors: int
    worker: Bytes
    shard: Bytes
    inverse_workers: int
    """What all inverse workers together receive."""

    def expected(self) -> dict[str, float]:
        """Return what each of the numbers is in theory, without small numbers."""
        share = self.parameters / self.shards
        others = self.factors * (self.gradient_workers - 1) / self.gradient_workers
        return {
            "worker_sent": self.parameters + others,
            "worker_received": self.parameters + others,
            "shard_sent": self.gradient_workers * share,
            "shard_received": self.gradient_workers * share,
            "inverse_workers": self.factors,
        }

    def found(self) -> dict[str, int]:
        """Return the counted numbers, by the names of `expected`."""
        return {
            "worker_sent": self.worker.sent,
            "worker_received": self.worker.received,
            "shard_sent": self.shard.sent,
            "shard_received": self.shard.received,
            "inverse_workers": self.inverse_workers,
        }


class _Counting(LocalJob):
    """Counts the bytes of the statistics that inverse workers are sent in the step in hand."""

    statistics_bytes = 0

    def _send(self, step: int, messages: Mapping[int, list[StatisticsMessage]]) -> None:
        parcels = [m.parcel for own in messages.values() for m in own if m.parcel is not None]
        self.statistics_bytes += sum(a.nbytes for parcel in parcels for a in flat_arrays(parcel))
        super()._send(step, messages)


def count(num_workers: int, folder: Path) -> Counted:
    """Count the bytes of one step of a job with this many gradient workers."""
    workers = {"gradient": num_workers, "inverse": 2}
    optimizer = {"inverse_update_period": 4, "gamma": {"adapt_period": None}}
    spec = user_spec(folder, TASK, "Deep", workers=workers, batch_size=64, optimizer=optimizer)
    with closing(_Counting(spec, folder)) as job:
        job.steps(STEP - 1)
        job.statistics_bytes = 0
        job.steps(1)
        plan = job.schedule.plan(STEP)
        assert plan.update_factors
        assert not plan.search_gamma
        assert job.registration is not None
        orders = [order for block in job.registration.blocks for order in block.orders]
        return Counted(
            gradient_workers=num_workers,
            shards=len(job.plan),
            parameters=8 * job.plan.num_parameters,
            factors=8 * sum(packed_size(order) for order in orders),
            worker=_most(report.traffic for report in job.worker_reports),
            shard=_most(report.traffic for report in job.shard_reports),
            inverse_workers=job.statistics_bytes,
        )


def _most(traffics: Iterable[Traffic]) -> Bytes:
    found = list(traffics)
    return Bytes(
        sent=max(traffic.sent_bytes for traffic in found),
        received=max(traffic.received_bytes for traffic in found),
    )


def markdown(rows: Sequence[Counted]) -> str:
    """Return the table, each number as a multiple of P or F with its theory in brackets."""
    header = ["N", "S", "worker sends", "receives", "shard sends", "receives", "inverse workers"]
    lines = []
    for row in rows:
        found, expected = row.found(), row.expected()
        cells = []
        for name, value in found.items():
            unit = row.factors if name == "inverse_workers" else row.parameters
            cells.append(f"{value / unit:.2f} ({expected[name] / unit:.2f})")
        lines.append([row.gradient_workers, row.shards, *cells])
    first = rows[0]
    return document(
        "Bytes by role",
        "What one process of each role sends and receives in a step with statistics, the most of "
        "all processes of the role, as a multiple of the parameters P; what all inverse workers "
        "together receive, as a multiple of the packed factors F. In brackets: the theory, without "
        f"small numbers. Here F = {first.factors / first.parameters:.2f} P.",
        table(header, lines),
        "Beyond two gradient workers each has a shard, so a process exchanges at most what is in "
        "the columns of worker and shard together, and that does not grow with N.",
    )


def main() -> None:
    """Count, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_output_options(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = SHORT_COUNTS if arguments.short else COUNTS
        rows = [count(num_workers, Path(folder)) for num_workers in counts]
    result: dict[str, Any] = {
        "benchmark": "bytes_by_role",
        **surroundings(),
        "rows": [
            {"gradient_workers": row.gradient_workers, "shards": row.shards, **row.found()}
            for row in rows
        ],
    }
    deliver("bytes_by_role", result, markdown(rows), arguments.out)


if __name__ == "__main__":
    main()
